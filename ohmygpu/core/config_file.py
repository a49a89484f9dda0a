"""`config.toml` as a file: reading its text, and changing it without losing what people wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import ConfigError
from .files import write_whole, writing
from .locks import locked

MAX_CONFIG_BYTES = 256 * 1024


def read_config_text(path: Path) -> str:
    """Text of the config file, "" when there is none. Raises ConfigError when it is unreadable."""
    try:
        if not path.exists():
            return ""
        if not path.is_file():
            raise ConfigError(f"{path} is not a file; move it away", origin=str(path))
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"cannot read {path}: {reason}", origin=str(path)) from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"{path} is larger than {MAX_CONFIG_BYTES} bytes; that cannot be our settings",
            origin=str(path),
        )
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path} line {line}: not UTF-8 text; save the file as UTF-8", origin=f"{path}:{line}"
        ) from error


def write_setting(path: Path, key: str, value: Any) -> None:
    """Set `section.name` in the file at `path`, comments and order kept; the file changes at once.

    Raises ConfigError, with the file untouched, when it is not TOML or cannot be written.
    """
    import tomlkit  # slow to import, and few commands change settings
    from tomlkit.exceptions import TOMLKitError

    section, _, name = key.partition(".")
    with writing(path.parent, "config.toml"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = path.resolve()  # a link to a file kept elsewhere stays a link
        with locked(path.with_name(f".{path.name}.lock")):
            try:
                document = tomlkit.parse(read_config_text(path))
                table = document.get(section)
                if table is None:
                    table = tomlkit.table()
                    document[section] = table
                elif not hasattr(table, "keys"):
                    raise ConfigError(
                        f"{path}: {section} must be a table [{section}]; correct it by hand",
                        key=section,
                        origin=str(path),
                    )
                table[name] = value
                text = tomlkit.dumps(document)
            except (TOMLKitError, ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{path} is not valid TOML: {str(error)[:200]}; correct it by hand",
                    origin=str(path),
                ) from error
            write_whole(path, text.encode("utf-8"))

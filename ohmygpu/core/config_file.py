"""Changing `config.toml` without losing what people wrote into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import ConfigError
from .files import write_whole, writing
from .locks import locked
from .settings import read_config_text


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

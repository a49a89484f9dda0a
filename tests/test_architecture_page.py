"""docs/architecture.md against the tree: every path exists, every module is to be found."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TABLES = PAGE.partition("## Where is what")[2].partition("## Who may import whom")[0]
PATHS = re.findall(r"`([\w/*]+\.py)`", TABLES)


def modules_of(path: str) -> set[Path]:
    """The files that a path of the page means."""
    top = ROOT if path.startswith("converters/") else ROOT / "ohmygpu"
    return set(top.glob(path))


def test_every_path_in_the_tables_exists() -> None:
    assert len(PATHS) > 50
    assert [path for path in PATHS if not modules_of(path)] == []


def test_every_module_is_in_the_tables() -> None:
    named = set().union(*map(modules_of, PATHS))
    modules = {*ROOT.glob("ohmygpu/**/*.py"), *ROOT.glob("converters/*.py")}
    missing = {path for path in modules - named if path.name != "__init__.py"}
    assert sorted(str(path.relative_to(ROOT)) for path in missing) == []

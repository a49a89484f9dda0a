"""docs/adding-an-architecture.md against the files it shows."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding-an-architecture.md").read_text(encoding="utf-8")
SHOWN = (
    "converters/nemotron.py",
    "ohmygpu/convert/gguf_nemotron.py",
    "tests/ladder/cases/nemotron.py",
)


def test_all_code_of_the_page_is_in_the_files_of_its_example() -> None:
    files = [(ROOT / name).read_text(encoding="utf-8") for name in SHOWN]
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 4
    for block in blocks:
        assert any(block in file for file in files), block


def test_every_file_the_page_names_exists() -> None:
    everywhere = [
        ROOT / folder
        for folder in ("", "converters", "ohmygpu", "ohmygpu/convert", "tests/convert")
    ]
    names = set(re.findall(r"`([\w/]+\.(?:py|md))`", PAGE)) - {
        "modeling_nemotron.py",  # of transformers
        "configuration_nemotron.py",
        "conversion/nemotron.py",  # of llama.cpp
    }
    assert names
    for name in names:
        found = [folder / name for folder in everywhere if (folder / name).is_file()]
        assert found or list((ROOT / "tests").glob(f"ladder/{name}")), name

"""The wheel holds every package, and nothing beside them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_package_list_names_every_folder_with_python_files() -> None:
    listed = set(project()["tool"]["setuptools"]["packages"])
    found = {"ohmygpu.converters"}
    for path in ROOT.glob("ohmygpu/**/*.py"):
        found.add(".".join(path.parent.relative_to(ROOT).parts))
    assert found == listed


def test_the_wheel_holds_ohmygpu_alone_with_every_module(tmp_path: Path) -> None:
    # from a copy: setuptools would also pack what an older build left in build/
    copy = tmp_path / "source"
    for name in ("ohmygpu", "converters"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(copy)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "ohmygpu",
        wheel.name.split("-py3")[0] + ".dist-info",
    }
    for path in [*ROOT.glob("ohmygpu/**/*.py"), *ROOT.glob("converters/**/*.py")]:
        inside = path.relative_to(ROOT)
        if inside.parts[0] == "converters":
            inside = Path("ohmygpu") / inside
        assert inside.as_posix() in names
    assert "ohmygpu/py.typed" in names
    for path in ROOT.glob("ohmygpu/**/*.txt"):
        assert path.relative_to(ROOT).as_posix() in names


def test_every_dependency_has_its_reason_in_the_contributing_page() -> None:
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    metadata = project()["project"]
    requirements = list(metadata["dependencies"])
    for extra, members in metadata["optional-dependencies"].items():
        requirements += [member for member in members if extra in ("test", "dev", "reference")]
    for requirement in requirements:
        name = requirement.split(">")[0].split("=")[0].split("[")[0]
        if name != "ohmygpu":
            assert f"`{name}`" in text, f"docs/contributing.md gives no reason for {name}"

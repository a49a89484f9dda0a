"""The dependency arrows of docs/architecture.md, read from the code's own import statements."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# part → the parts of ours it may import (itself is always allowed)
ALLOWED = {
    "core": set(),
    "runtime_api": {"core"},
    "runtime_wire": set(),
    "convert": {"core"},
    "exporter": {"core"},
    "converters": {"convert", "core"},
    "runtime_onnx": {"core", "runtime_api", "runtime_wire"},
    "plan": {"core", "convert", "exporter"},
    "verify": {"core", "convert"},
    "effort": {"core", "convert"},
    "install": {"core", "convert", "effort", "exporter", "plan", "verify"},
    "client": {"core", "runtime_api"},
    "daemon": {"core", "runtime_api", "runtime_wire", "install", "verify"},
    "cli": {"core", "runtime_api", "client", "install", "verify", "mcp", "tui"},
    "mcp": {"core", "runtime_api", "client"},
    "tui": {"core", "runtime_api", "client"},
}
# runs in the exporter's own environment, with its packages and nothing of ours
ELSEWHERE = ROOT / "ohmygpu" / "exporter" / "script.py"

# the one place where the terminal starts the daemon in its own process
EXCEPTIONS = {("ohmygpu/cli/serve.py", "daemon")}

# third-party package → the parts that may import it
ONLY_IN = {
    "onnxruntime": {"runtime_onnx"},
    "onnx": {"convert"},
    "transformers": {"convert"},
    "quart": {"daemon"},
    "hypercorn": {"daemon"},
    "click": {"cli"},
    "tqdm": {"cli"},
    "mcp": {"mcp"},
    "huggingface_hub": {"core"},
    "httpx2": {"core", "client"},
    "google": {"convert"},
    "packaging": {"core"},
    "pydantic": {"mcp"},
    "tomlkit": {"core"},
    "werkzeug": {"daemon"},
    "tokenizers": {"convert", "runtime_onnx"},
    "jinja2": {"runtime_onnx"},
    "torch": set(),
}


def source_files() -> list[Path]:
    return sorted([*ROOT.glob("ohmygpu/**/*.py"), *ROOT.glob("converters/**/*.py")])


def part_of(module: str) -> str:
    """`ohmygpu.core.refs` → core; `ohmygpu` itself → "" (only __version__ lives there)."""
    names = module.split(".")
    return names[1] if len(names) > 1 else ""


def module_name(path: Path) -> str:
    names = list(path.relative_to(ROOT).with_suffix("").parts)
    if names[0] == "converters":
        names.insert(0, "ohmygpu")
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, at any depth of nesting."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield base
            if base == "ohmygpu" or base.startswith("ohmygpu."):
                yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_the_arrows_allow(path: Path) -> None:
    part = part_of(module_name(path))
    relative = str(path.relative_to(ROOT))
    for name in imports(path):
        top = name.split(".")[0]
        if top == "ohmygpu":
            target = part_of(name)
            if target in ("", part, "__version__") or not (set(ALLOWED) & {target}):
                continue
            if (relative, target) in EXCEPTIONS or part in ("", "__main__"):
                continue
            assert target in ALLOWED[part], f"{relative} may not import {name}"
        elif top in ONLY_IN and path != ELSEWHERE:
            assert part in ONLY_IN[top], f"{relative} may not import {name}"


def test_what_is_imported_is_declared_with_a_reason_and_nothing_else_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    declared = {re.split(r"[^A-Za-z0-9_-]", entry)[0] for entry in required}
    ours = [path for path in source_files() if path != ELSEWHERE]
    names = (name.split(".")[0] for path in ours for name in imports(path))
    imported = {name for name in names if name not in sys.stdlib_module_names}
    imported = {"protobuf" if name == "google" else name for name in imported} - {"ohmygpu"}
    assert imported == declared
    reasons = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    assert not {name for name in declared if f"`{name}`" not in reasons}


def test_the_program_that_exports_needs_only_its_own_environment() -> None:
    from ohmygpu.exporter.environment import requirements

    names = {name.split(".")[0] for name in imports(ELSEWHERE)}
    packages = {entry.split("==")[0] for entry in requirements()} | {"onnx_ir"}  # of onnxscript
    assert names - set(sys.stdlib_module_names) <= packages


def test_every_part_of_the_package_has_a_rule() -> None:
    parts = {part_of(module_name(path)) for path in source_files()}
    assert parts - {"", "__main__"} == set(ALLOWED)


def test_converters_are_reached_only_by_the_family_look_up() -> None:
    for path in source_files():
        if path.is_relative_to(ROOT / "converters"):
            continue
        for name in imports(path):
            assert not name.startswith("ohmygpu.converters"), f"{path} imports {name}"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from ohmygpu.cli import main\n"
        "sys.argv = ['omg', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'transformers', 'torch', 'quart', 'httpx2',"
        " 'huggingface_hub', 'tokenizers', 'mcp'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "sys.exit(f'--help imported {loaded}' if loaded else 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_describing_a_model_needs_no_http() -> None:
    code = (
        "import sys\nfrom ohmygpu.client import ModelInfo\nassert ModelInfo.from_disk\n"
        "sys.exit('httpx2' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

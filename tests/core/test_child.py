from __future__ import annotations

import json
import subprocess
from pathlib import Path

from ohmygpu.core.child import python_module, without_secrets


def test_a_child_gets_the_environment_without_what_may_hold_credentials() -> None:
    secrets = {"HF_TOKEN": "a", "PIP_INDEX_URL": "https://user:b@index", "OHMYGPU_PYPI_INDEX": "c"}
    assert without_secrets({"PATH": "/bin", **secrets}) == {"PATH": "/bin"}


def test_a_file_of_the_working_folder_is_not_run_in_place_of_a_module(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    command = [*python_module("json.tool"), "--compact"]
    done = subprocess.run(
        command, cwd=tmp_path, check=True, input='{"a": 1}', text=True, capture_output=True
    )
    assert json.loads(done.stdout) == {"a": 1}

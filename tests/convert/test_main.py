"""`python -m ohmygpu.convert`, the process that compiles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Compiled = Callable[..., Path]


def run_compiler(lines: str) -> subprocess.CompletedProcess[str]:
    """`python -m ohmygpu.convert` with stdin held open until it has answered."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ohmygpu.convert"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stdin, process.stdout, process.stderr:
        process.stdin.write(lines)
        process.stdin.flush()
        out, err = process.stdout.read(), process.stderr.read()
        return subprocess.CompletedProcess([], process.wait(), out, err)


def job(gguf: Path, output: Path, recipe: str = "exact") -> str:
    files = {gguf.name: str(gguf)}
    fields = {"files": files, "output": str(output), "recipe": recipe, "target": "cpu"}
    return json.dumps(fields) + "\n"


def test_the_compiler_process_gives_the_bytes_of_the_function(
    smollm2_gguf: Path, smollm2: Compiled, tmp_path: Path
) -> None:
    result = run_compiler(job(smollm2_gguf, tmp_path))
    messages = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, result.stderr
    assert len(messages) >= 2
    assert all(set(message) == {"done_bytes", "total_bytes"} for message in messages[:-1])
    assert messages[-1]["compiled"]["layers"] == 30
    wanted = smollm2("exact")
    for path in wanted.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("not json\n", "invalid_request", "not a compile job"),
        ('{"files": []}\n', "invalid_request", "not a compile job"),
        (job(Path("missing.gguf"), Path("out"), "q9"), "invalid_request", "no recipe 'q9'"),
    ],
)
def test_the_compiler_process_reports_errors_as_json(line: str, code: str, message: str) -> None:
    result = run_compiler(line)
    assert result.returncode == 1
    error = json.loads(result.stdout)["error"]
    assert error["code"] == code
    assert message in error["message"]
    assert "Traceback" not in result.stderr


def test_the_compiler_process_answers_even_what_nobody_foresaw(tmp_path: Path) -> None:
    file = tmp_path / "a-file"
    file.write_text("")
    gguf = tmp_path / "folder.gguf"
    gguf.mkdir()
    result = run_compiler(job(gguf, file))
    assert result.returncode == 1
    assert json.loads(result.stdout.splitlines()[-1])["error"]["message"]


def test_the_compiler_process_ends_when_its_input_closes(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ohmygpu.convert"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdout:
        process.stdin.write(job(smollm2_gguf, tmp_path, "q4").encode())
        process.stdin.flush()
        assert b"done_bytes" in process.stdout.readline()
        process.stdin.close()
        assert process.wait(timeout=30) != 0
    assert not (tmp_path / "compile.json").exists()

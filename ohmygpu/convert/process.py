"""Runs a compile in a process of its own: `python -m ohmygpu.convert`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ohmygpu.core.child import python_module
from ohmygpu.core.job import Words, run_job
from ohmygpu.core.records import CompiledModel

COMPILER = python_module("ohmygpu.convert")

_WORDS = Words("the compile", "the compiler", "pull again")


def compile_in_subprocess(
    files: Mapping[str, Path],
    output: Path,
    recipe: str,
    target: str,
    progress: Callable[[int, int], None],
    cancel: threading.Event,
    command: Sequence[str] | None = None,
    calibration: Path | None = None,
    show_inputs: bool = False,
    exporter: Sequence[str] = (),
) -> CompiledModel:
    """`compile_model` in a subprocess, which is gone when this returns or raises.

    With `exporter`, the command that exports, transformers makes the graph. Raises what the compile
    raises; Cancelled; OutOfMemory when the system killed it; OhMyGPUError when it ended without an
    answer.
    """
    job = {
        "files": {name: str(path) for name, path in files.items()},
        "output": str(output),
        "recipe": recipe,
        "target": target,
        "calibration": None if calibration is None else str(calibration),
        "show_inputs": show_inputs,
        "exporter": list(exporter),
    }
    run_job(command or COMPILER, job, "compiled", progress, cancel, _WORDS)
    return CompiledModel.load(output)

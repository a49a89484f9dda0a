"""The long way to a compile: look at what the layers' inputs are before rounding their weights.

    compile to float32 → let the model write text → gather the inputs' moments → round knowing them

The first two results are temporary; what is left of a process that was killed goes with the
store's next sweep of temporaries.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .core.child import python_module
from .core.events import Event, EventSink
from .core.job import Progress, Words, run_job
from .core.repository import Repository
from .core.sizes import human_bytes

WORKER = (*python_module("ohmygpu.runtime_onnx.worker"), "calibrate", "-")

_WORDS = Words("the calibration", "the calibrating process", "pull again")
_MINUTES_PER_GIB = 5.0  # of float32 weights, on two cores; measured on models of 0.5 to 6 GiB
_MOMENTS_SHARE = 1.0  # disk that the moments need, as a share of the float32 weights


@contextmanager
def known_inputs(
    repository: Repository,
    sources: Mapping[str, Path],
    float_bytes: int,
    name: str,
    sink: EventSink,
    cancel: threading.Event,
) -> Iterator[Path]:
    """A folder of second moments of the layers' inputs, for the length of the block.

    `float_bytes` is what the weights take in float32, about. `sink` receives `compile` events, the
    first of which says how long this will take. Raises DiskFull with both numbers before anything
    is done, Cancelled, and what compiling and running raise.
    """
    from .convert.process import compile_in_subprocess

    repository.check_space(
        int(float_bytes * (1 + _MOMENTS_SHARE)), f"looking at the layers of {name} (temporary)"
    )
    minutes = round(float_bytes / (1 << 30) * _MINUTES_PER_GIB)
    duration = f"{minutes} minutes" if minutes > 1 else "a minute"
    size = human_bytes(float_bytes)
    sink(
        Event(
            "compile",
            f"the effort for {name} is high: about {duration} on two cores, "
            f"and {size} of disk for a float32 copy that goes afterwards",
        )
    )
    model, moments = repository.new_compiled(), repository.new_compiled()
    try:
        compile_in_subprocess(
            sources,
            model,
            "f32",
            "cpu",
            _reporter(sink, f"compiling {name} to float32 (temporary)"),
            cancel,
            show_inputs=True,
        )
        run_job(
            WORKER,
            {"folder": str(model), "output": str(moments)},
            "inputs",
            _reporter(sink, f"looking at what the layers of {name} are given"),
            cancel,
            _WORDS,
        )
        repository.discard(model)
        yield moments
    finally:
        repository.discard(model)
        repository.discard(moments)


def _reporter(sink: EventSink, message: str) -> Progress:
    def report(done_bytes: int, total_bytes: int) -> None:
        sink(Event("compile", message, done_bytes=done_bytes, total_bytes=total_bytes))

    sink(Event("compile", message))
    return report

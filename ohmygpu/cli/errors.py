"""Errors at the terminal: one sentence on stderr and an exit code that scripts can rely on.

    0    done
    1    something else failed
    2    the command line, a name, a setting or a request is not valid
    3    no such model, revision or other named thing
    4    the daemon is not running, or something else answers in its place
    5    the model's provider cannot be reached, or asks to wait
    6    access denied: private or gated model, wrong or missing token
    7    the model is of a kind that cannot be compiled, or its files are damaged
    8    not enough room now: disk, memory or the queue is full
    9    the model failed while it was loading or answering
    10   something stands in the way: name taken, port in use, daemon already running
    130  interrupted with Ctrl-C

`OMG_DEBUG=1` in the environment shows the traceback too.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from ohmygpu.core import errors as domain

from .output import note, prepare_streams

INTERRUPTED = 130

# First match wins, so a subclass stands before its base.
_EXIT_CODES: tuple[tuple[type[domain.OhMyGPUError], int], ...] = (
    (domain.InvalidRequest, 2),
    (domain.NotFound, 3),
    (domain.DaemonNotRunning, 4),
    (domain.NetworkError, 5),
    (domain.AccessDenied, 6),
    (domain.UnsupportedModel, 7),
    (domain.CorruptFile, 7),
    (domain.DiskFull, 8),
    (domain.OutOfMemory, 8),
    (domain.Busy, 8),
    (domain.RuntimeFailure, 9),
    (domain.Conflict, 10),
    (domain.DaemonAlreadyRunning, 10),
    (domain.PortInUse, 10),
    (domain.NotTheDaemon, 4),
    (domain.Cancelled, INTERRUPTED),
)


def exit_code(error: domain.OhMyGPUError) -> int:
    """The exit code of an error; 1 for one without a rule."""
    for kind, code in _EXIT_CODES:
        if isinstance(error, kind):
            return code
    return 1


def explain(error: domain.OhMyGPUError) -> str:
    """The error as a sentence, with near names where its text has none yet."""
    suggestions = [str(name) for name in error.details.get("suggestions") or ()]
    if suggestions and not any(name in error.message for name in suggestions):
        return f"{error.message}; did you mean {' or '.join(suggestions[:3])}?"
    return error.message


def run(command: click.Command, arguments: Sequence[str] | None) -> int:
    """Run a command line; the exit code. Whatever goes wrong has been said on stderr."""
    prepare_streams()
    try:
        result = command.main(
            args=None if arguments is None else list(arguments),
            prog_name=_program_name(),
            standalone_mode=False,
        )
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return 1
    except domain.OhMyGPUError as error:
        return _report(explain(error), exit_code(error))
    except OSError as error:
        _discard_output()
        return _report(f"the operating system refused: {_describe(error)}", 1)
    except Exception as error:  # noqa: BLE001 - the last place where a bug can become a sentence
        what = f"unexpected {type(error).__name__}: {error}"
        return _report(f"{what} (a bug in ohmygpu; OMG_DEBUG=1 shows where)", 1)


def _report(sentence: str, code: int) -> int:
    if os.environ.get("OMG_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    note(f"Error: {sentence}")
    return code


def _describe(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{what}: {error.filename}" if error.filename else what


def _program_name() -> str:
    stem = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else ""
    return "ohmygpu" if stem == "ohmygpu" else "omg"


def _discard_output() -> None:
    """Let what is still buffered go nowhere: the interpreter would fail on it once more at exit."""
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
    except (OSError, ValueError, AttributeError):  # not a real file: nothing is buffered either
        return

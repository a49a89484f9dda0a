"""The environment that models without a family file are exported in: torch and transformers.

It lies in `<home>/exporter/<key>/`, is made once, when a user agreed to its size, and shared by all
exports; nothing of it is imported by ohmygpu or needed to serve. Packages are downloaded first and
installed from there, into a folder that is renamed when it is whole: after a kill the environment
is there or not, and the next try downloads only what is missing.

    <home>/exporter/.lock            exclusive while it is made or removed, shared while it is used
    <home>/exporter/.partial-<key>/  what is being made: wheels, venv
    <home>/exporter/<key>/           a virtual environment
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ohmygpu.core import files
from ohmygpu.core.child import without_secrets
from ohmygpu.core.errors import (
    Cancelled,
    ConfigError,
    Conflict,
    ConsentNeeded,
    NetworkError,
)
from ohmygpu.core.events import Event, EventSink
from ohmygpu.core.job import Words, run_job
from ohmygpu.core.locks import FileLock
from ohmygpu.core.settings import Settings
from ohmygpu.core.sizes import human_bytes

EXPORTER_VERSION = 1
"""Part of every exported model's key: raise it when the same model exports to another graph."""

TRANSFORMERS = "5.23.0"
TORCH = "2.13.0"
PACKAGES = (
    f"transformers=={TRANSFORMERS}",
    "onnx==1.23.2",
    "onnxruntime==1.32.0",
    "onnxscript==0.7.2",
    "numpy==2.4.6",
    "safetensors==0.8.0",
)
DOWNLOAD_BYTES = 290_000_000  # measured on Linux x86_64, Python 3.11
INSTALLED_BYTES = 1_280_000_000

SCRIPT = Path(__file__).with_name("script.py")
_WORDS = Words("the export", "the exporter", "pull again")
_NAMES_BUILD = sys.platform == "linux"  # where torch alone would mean CUDA, and gigabytes
_VENV_OPTIONS: tuple[str, ...] = ()
_POLL_S = 0.2
_MEASURE_EVERY = 10  # polls
_OWN_INDEX = ("index-url", "extra-index-url", "find-links", "no-index")
# pip, ending with its parent: see core.child.die_with_parent.
_PIP = (
    "import ctypes, runpy, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)\n"
    "sys.argv[0] = 'pip'\n"
    "runpy.run_module('pip', run_name='__main__')\n"
)


def requirements() -> tuple[str, ...]:
    """What is installed."""
    build = "+cpu" if _NAMES_BUILD else ""
    return (f"torch=={TORCH}{build}", *PACKAGES)


def version() -> str:
    """What decides an exported graph beside the model: part of its key."""
    return f"exporter {EXPORTER_VERSION}, transformers {TRANSFORMERS}, torch {TORCH}"


def key() -> str:
    """Names the environment: other packages or another Python are another one."""
    parts = [*requirements(), sys.version.partition(" ")[0], sys.platform]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def find(settings: Settings) -> Path | None:
    """The Python that exports: the setting exporter.python, or that of the environment made here.

    None where there is none yet. Raises ConfigError when the setting names no program.
    """
    if settings.exporter.python:
        python = Path(settings.exporter.python).expanduser()
        if not os.access(python, os.X_OK) or python.is_dir():
            raise ConfigError(
                f"exporter.python = {python} is not a Python; name one that has torch and "
                "transformers, or leave the setting out",
                key="exporter.python",
            )
        return python
    python = _python(settings.home / "exporter" / key())
    return python if python.exists() else None


def check_consent(settings: Settings, agreed: bool, subject: str) -> None:
    """Raise ConsentNeeded, with the sizes, unless there is an environment or the user agreed."""
    if agreed or find(settings) is not None:
        return
    raise ConsentNeeded(
        f"{subject}: transformers has to export it, in an environment of its own that takes about "
        f"{human_bytes(DOWNLOAD_BYTES)} to download and {human_bytes(INSTALLED_BYTES)} on disk, "
        'once for all such models; agree with --yes (over HTTP: "export": true)',
        param="export",
        download_bytes=DOWNLOAD_BYTES,
        disk_bytes=INSTALLED_BYTES,
    )


@contextmanager
def in_use(settings: Settings, sink: EventSink, cancel: threading.Event) -> Iterator[Path]:
    """The Python that exports, made if need be, and kept from being removed meanwhile.

    Raises NetworkError, DiskFull, Cancelled, ConfigError or OhMyGPUError with pip's last words.
    """
    found = find(settings)
    if settings.exporter.python and found is not None:
        yield found
        return
    if found is None:
        _make(settings, sink, cancel)
    lock = FileLock(_lock_path(settings.home), shared=True, keep=True)
    lock.acquire(cancel=cancel)
    try:
        found = find(settings)
        if found is None:
            raise Conflict("the exporter's environment was removed meanwhile; pull again")
        yield found
    finally:
        lock.release()


def command(python: Path) -> list[str]:
    """The command that exports; -I: of its own packages alone, whatever this environment says."""
    return [str(python), "-I", str(SCRIPT)]


def try_config(
    python: Path, config: Mapping[str, Any], sink: EventSink, cancel: threading.Event
) -> None:
    """Export a small model with this config. Raises UnsupportedModel with the reason."""
    sink(Event("prepare", f"trying to export a small {config.get('model_type')} with this config"))
    job = {"task": "try", "config": dict(config)}
    run_job(command(python), job, "exported", lambda done, total: None, cancel, _WORDS)


def remove(home: Path, *, current: bool) -> int:
    """Remove environments of other versions and unfinished ones, with `current` all; bytes freed.

    Raises Conflict while one is being made or used and `current` is asked for.
    """
    folder = home / "exporter"
    if not folder.is_dir():
        return 0
    lock = FileLock(_lock_path(home), keep=True)
    if not lock.try_acquire():
        if current:
            raise Conflict("the exporter's environment is in use; wait for the pull to end")
        return 0
    try:
        freed = 0
        for path in folder.iterdir():
            if path.is_dir() and (current or path.name != key()):
                freed += _size(path)
                shutil.rmtree(path, ignore_errors=True)
        return freed
    finally:
        lock.release()


def _make(settings: Settings, sink: EventSink, cancel: threading.Event) -> None:
    """Make the environment, or wait for who does."""
    folder = settings.home / "exporter"
    with files.writing(settings.home, "the exporter's environment"):
        folder.mkdir(parents=True, exist_ok=True)
        files.check_space(folder, DOWNLOAD_BYTES + INSTALLED_BYTES, "the exporter's environment")
        lock = FileLock(_lock_path(settings.home), keep=True)
        lock.acquire(
            cancel=cancel,
            on_wait=lambda: sink(Event("prepare", "another process makes or uses the exporter")),
        )
        try:
            if find(settings) is None:
                _build(settings, folder, sink, cancel)
        finally:
            lock.release()


def _build(settings: Settings, folder: Path, sink: EventSink, cancel: threading.Event) -> None:
    partial = folder / f".partial-{key()}"
    venv, wheels, scratch = partial / "venv", partial / "wheels", partial / "pip"
    for unfinished in (venv, scratch):
        shutil.rmtree(unfinished, ignore_errors=True)
    for path in (wheels, scratch):
        path.mkdir(parents=True, exist_ok=True)
    runner = _Runner(partial, scratch, settings, sink, cancel)
    venv_command = [sys.executable, "-m", "venv", *_VENV_OPTIONS, str(venv)]
    runner.run(venv_command, "making the exporter's environment")
    pip = [str(_python(venv)), "-c", _PIP]
    runner.download(pip, wheels)
    offline = [
        "install",
        "--no-compile",
        "--no-index",
        "--find-links",
        str(wheels),
        *requirements(),
    ]
    runner.run([*pip, *offline], "installing torch and transformers for the exporter")
    venv.rename(folder / key())
    files.sync_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)


class _Runner:
    """Runs the commands that make an environment, telling how much is there."""

    def __init__(
        self,
        partial: Path,
        scratch: Path,
        settings: Settings,
        sink: EventSink,
        cancel: threading.Event,
    ) -> None:
        self._partial = partial
        self._sink = sink
        self._cancel = cancel
        self._torch_index = settings.exporter.torch_index
        self._environment = _environment(settings, scratch)

    def download(self, pip: list[str], wheels: Path) -> None:
        """Download the packages; torch for the CPU from its own index, unless pip has it.

        Where pip was told an index or a folder, that is asked alone first: it may be the only one
        within reach.
        """
        what = ["download", "--only-binary=:all:", "--dest", str(wheels), *requirements()]
        message = "downloading torch and transformers for the exporter"
        extra = ["--extra-index-url", self._torch_index]
        if not _NAMES_BUILD:
            extra = []
        elif self._has_own_index(pip):
            try:
                self.run([*pip, *what], message)
                return
            except NetworkError as failure:
                if "torch==" not in failure.details["reason"]:
                    raise
        self.run([*pip, *what, *extra], message)

    def run(self, command: Sequence[str], message: str) -> None:
        """Run a command to its end. Raises Cancelled, or an error with its last words."""
        total = DOWNLOAD_BYTES + INSTALLED_BYTES
        self._sink(Event("prepare", message))
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is ours to handle
            )
            try:
                polls = 0
                while process.poll() is None:
                    if self._cancel.wait(_POLL_S):
                        raise Cancelled("making the exporter's environment was cancelled")
                    polls += 1
                    if polls % _MEASURE_EVERY == 0:
                        done = min(_size(self._partial), total)
                        self._sink(Event("prepare", message, done_bytes=done, total_bytes=total))
            finally:
                process.kill()
                process.wait()
            if process.returncode:
                raise _failure(message, log)

    def _has_own_index(self, pip: list[str]) -> bool:
        found = subprocess.run(
            [*pip, "config", "list"],
            capture_output=True,
            text=True,
            env=self._environment,
            check=False,
        )
        return any(f".{name}=" in found.stdout for name in _OWN_INDEX) or (
            "PIP_INDEX_URL" in self._environment
        )


def _failure(message: str, log: IO[bytes]) -> NetworkError:
    log.seek(0)
    text = log.read().decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "Error"))] or lines[-1:]
    if "ensurepip" in text:
        errors = ["Python cannot make virtual environments here (on Debian: install python3-venv)"]
    reason = "".join(char for char in (errors or ["no reason given"])[-1] if char.isprintable())
    return NetworkError(
        f"{message} failed: {reason[:300]}; check the network and pip's settings, then pull again, "
        "or name a Python that has torch and transformers in exporter.python",
        reason=reason,
    )


def _environment(settings: Settings, scratch: Path) -> dict[str, str]:
    """What pip runs with: the user's own settings of it, and nothing of this Python's."""
    environment = without_secrets(os.environ)
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"):
        environment.pop(name, None)
    if "pypi.index" in settings.origins:
        environment["PIP_INDEX_URL"] = settings.pypi.index
    quiet = {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "1"}
    return environment | quiet | {"TMPDIR": str(scratch)}


def _python(venv: Path) -> Path:
    if sys.platform == "win32":
        return venv / "Scripts" / "python.exe"
    return venv / "bin" / "python"


def _lock_path(home: Path) -> Path:
    return home / "exporter" / ".lock"


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                total += (Path(root) / name).lstat().st_size
    return total

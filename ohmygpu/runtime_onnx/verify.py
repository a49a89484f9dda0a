"""Measures how close a compiled graph is to the same weights in float32, on a text of ours.

Both graphs read the same documents, each in one context of its own, a run of positions at a time:
the logits of one run, (S, V), are all that is held of either. The float32 graph's weights stay in
their file, mapped: where they do not fit in memory, a run reads them from the disk layer by layer,
once, however many positions it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core import hardware
from ohmygpu.core.errors import InvalidRequest, RuntimeFailure
from ohmygpu.core.fidelity import TEXT_VERSION, Fidelity
from ohmygpu.core.records import GRAPH_FILE, CompiledModel

from .divergence import Comparison, Logits
from .kv_cache import DeviceKVCache, HostKVCache, KVCache
from .loading import check_memory
from .model import check_files
from .session import open_session, open_streamed
from .tokenizer import Tokenizer

TEXT_FOLDER = Path(__file__).parent / "fidelity_text"

SKIPPED_TOKENS = 4  # positions at the start of a document, where there is next to no context
_LOGITS_BYTES = 192 << 20  # of the float32 graph's logits held at a time
_RUN_TOKENS = 128  # positions that the compiled graph computes at a time

Report = Callable[[int, int], None]
"""Called with (done_bytes, total_bytes) of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyJob:
    """What to measure: `graph` in `folder`, against model.onnx in `reference`."""

    model: str  # the installed name, for messages
    folder: str
    reference: str  # folder of the same weights compiled to float32 for the CPU
    graph: str = GRAPH_FILE
    execution_provider: str = "auto"  # of the graph; the reference runs on the CPU
    threads: int = 0  # 0 = one per physical core

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> VerifyJob:
        """From JSON. Raises InvalidRequest when fields are missing, unknown or of a wrong type."""
        try:
            job = VerifyJob(**data)
        except TypeError as error:
            raise InvalidRequest(f"not a measuring job: {error}") from error
        for name, value in asdict(job).items():
            if type(value) is not (int if name == "threads" else str):
                raise InvalidRequest(f"not a measuring job: {name} is {value!r}", param=name)
        return job


def documents(folder: Path = TEXT_FOLDER) -> dict[str, str]:
    """The shipped text: name → document, in order."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def measure(job: VerifyJob, report: Report = lambda done, total: None) -> Fidelity:
    """Run both graphs over the shipped text and compare.

    Raises CorruptFile, OutOfMemory or RuntimeFailure where a graph cannot be opened.
    """
    folder = Path(job.folder)
    compiled = check_files(folder)
    tokenizer = Tokenizer(folder, compiled)
    texts = documents()
    ids = [tokenizer.encode(text)[: compiled.context_length] for text in texts.values()]
    longest = max(map(len, ids))
    check_memory(compiled, longest, hardware.memory_available_bytes())
    threads = job.threads or hardware.physical_cores()
    reference = GraphRun.streamed(Path(job.reference), longest, threads)
    if reference.vocab_size != compiled.vocab_size:
        raise RuntimeFailure(f"{job.model} and its reference have different vocabularies")
    graph = GraphRun.opened(folder, compiled, job, longest, threads)
    sizes = [len(text.encode("utf-8")) for text in texts.values()]
    comparison = Comparison()
    for number, tokens in enumerate(ids):
        report(sum(sizes[:number]), sum(sizes))
        compare(reference, graph, np.array(tokens, np.int64), comparison)
    report(sum(sizes), sum(sizes))
    if not comparison.positions:
        raise RuntimeFailure(
            f"the context of {job.model}, {compiled.context_length} tokens, is too short to measure"
        )
    return Fidelity(
        **comparison.summary(),
        text_version=TEXT_VERSION,
        execution_provider=graph.execution_provider,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def compare(
    reference: GraphRun, graph: GraphRun, tokens: NDArray[np.int64], comparison: Comparison
) -> None:
    """Run one document (S,) through both and collect its positions but the first and the last."""
    size = max(1, _LOGITS_BYTES // (4 * reference.vocab_size))
    for start in range(0, len(tokens) - 1, size):
        wanted = reference.forward(tokens[start : start + size], start)
        for offset in range(0, len(wanted), _RUN_TOKENS):
            first = start + offset
            piece = wanted[offset : offset + _RUN_TOKENS]
            found = graph.forward(tokens[first : first + len(piece)], first)
            skipped = max(0, SKIPPED_TOKENS - first)
            following = tokens[first + skipped + 1 : first + len(piece) + 1]
            kept = slice(skipped, skipped + len(following))
            if len(following):
                comparison.add(piece[kept], found[kept], following)


class GraphRun:
    """A graph with room for one sequence; `forward` computes the next positions of it."""

    def __init__(
        self, session: Any, compiled: CompiledModel, cache: KVCache, execution_provider: str
    ) -> None:
        self.vocab_size = compiled.vocab_size
        self.execution_provider = execution_provider
        self._session = session
        self._cache = cache

    @staticmethod
    def streamed(folder: Path, tokens: int, threads: int) -> GraphRun:
        """The float32 graph in `folder`, its weights read from the file as they are needed."""
        compiled = check_files(folder)
        session = open_streamed(folder, threads)
        return GraphRun(session, compiled, HostKVCache(compiled, 1, tokens), "CPU")

    @staticmethod
    def opened(
        folder: Path, compiled: CompiledModel, job: VerifyJob, tokens: int, threads: int
    ) -> GraphRun:
        """The graph that `job` names, as serving opens it."""
        opened = open_session(folder, compiled, job.execution_provider, threads, job.graph)
        kind = DeviceKVCache if opened.execution_provider == "CUDA" else HostKVCache
        return GraphRun(
            opened.session, compiled, kind(compiled, 1, tokens), opened.execution_provider
        )

    def forward(self, tokens: NDArray[np.int64], past: int) -> Logits:
        """Logits (S, V) of `tokens` (S,), which follow the first `past` of the sequence."""
        total = past + len(tokens)
        binding = self._session.io_binding()
        self._cache.bind(binding, 0, 1)
        for name, array in (
            ("input_ids", tokens[None]),
            ("seqlens_k", np.array([total - 1], np.int32)),
            ("total_sequence_length", np.array(total, np.int32)),
            ("logit_rows", np.arange(len(tokens), dtype=np.int64)),
        ):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        logits = np.empty((len(tokens), self.vocab_size), np.float32)
        place = ("cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        binding.bind_output("logits", *place)
        self._session.run_with_iobinding(binding)
        return logits

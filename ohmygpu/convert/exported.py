"""Compiles a model without a family file: transformers exports the graph, the rest is ours.

Files are read and checked as for any compile, the tokenizer is prepared the same way; the graph
and its weights come from the exporter, a program of another Python (`exporter/script.py`), which
answers with a description of what it made.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ohmygpu.core.errors import OhMyGPUError
from ohmygpu.core.job import Words, run_job
from ohmygpu.core.records import COMPILE_FILE, CompiledModel, ExportedGraph

from .extent import check_context, check_extent
from .family import CONVERTER_VERSION
from .source import Source, open_source
from .tokenizer import prepare_tokenizer
from .weights import Progress

UNTOLD_CONTEXT_TOKENS = 2048
"""The context of a model whose config names no limit (ALiBi): what those are trained on."""

_WORDS = Words("the export", "the exporter", "pull again")


def compile_exported(
    files: Mapping[str, Path], output: Path, exporter: Sequence[str], progress: Progress
) -> CompiledModel:
    """Export the model in `files` into the folder `output` with the command `exporter`.

    Writes what `compile_model` writes. Raises UnsupportedModel, CorruptFile or OutOfMemory.
    """
    output.mkdir(parents=True, exist_ok=True)
    with closing(open_source(files)) as source:
        check_extent(source.config, len(source.tensors))
        tokenizer = prepare_tokenizer(source, output)
        total = sum(path.stat().st_size for path in files.values())

        def report(done_steps: int, steps: int) -> None:
            progress(total * done_steps // max(steps, 1), total)

        job = {
            "task": "export",
            "files": {name: str(path) for name, path in files.items()},
            "output": str(output),
        }
        # The exporter ends with this process, whoever ends that: nothing here has to be cancelled.
        answer = run_job(exporter, job, "exported", report, threading.Event(), _WORDS)
        described = _describe(source, answer, output)
    compiled = CompiledModel(
        **described,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        generation=dict(tokenizer.generation),
    )
    compiled.save(output)
    return compiled


def _describe(source: Source, answer: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Fields of CompiledModel from the exporter's answer."""
    try:
        graph = ExportedGraph.from_dict(
            {name: answer[name] for name in ExportedGraph.__dataclass_fields__}
        )
        context_tokens = int(answer["context_tokens"]) or UNTOLD_CONTEXT_TOKENS
        check_context(context_tokens)
        *_, kv_heads, head_dim = graph.cache[0]
        heads = int(answer["heads"]) or kv_heads
        return {
            "family": str(source.config["model_type"]),
            "converter_version": CONVERTER_VERSION,
            "recipe": "f32",
            "target": "cpu",
            "context_length": context_tokens,
            "vocab_size": int(answer["vocab_size"]),
            "layers": len(graph.cache) // 2,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "kv_dtype": "float32",
            "parameters": int(answer["parameters"]),
            "weights_bytes": (output / "model.onnx.data").stat().st_size,
            "source_format": source.format,
            "quantization": "f32",
            "hidden_size": int(answer["hidden_size"]),
            "heads": heads,
            "feed_forward_length": int(answer["feed_forward_length"]),
            "rope_theta": 0.0,
            "score_heads": heads,
            "norm_epsilon": 0.0,
            "license": str(source.config.get("license") or ""),
            "files": _sizes(output),
            "exported": graph,
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise OhMyGPUError(f"the exporter's answer is not a description: {error}") from error


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.iterdir()) if path.name != COMPILE_FILE)
    return {path.name: path.stat().st_size for path in files}

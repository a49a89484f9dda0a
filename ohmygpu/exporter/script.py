"""Exports a model to ONNX with transformers; run by the Python of the isolated environment.

Imports nothing of ohmygpu, which is not installed there. The first line of standard input is a job:

    {"task": "export", "files": {name: path}, "output": folder}
    {"task": "try", "config": config.json as an object}

`try` exports a model of two layers and random weights with this config, which is how a model that
cannot be exported is told before its weights are downloaded. Standard output carries JSON lines:
{"done_bytes", "total_bytes"} as it goes, then exactly one of {"exported": description of the graph}
and {"error": {"code", "message", "details"}}. The process ends when standard input does.

The exported graph (B rows, S new tokens, P tokens before them):

    input_ids (B, S), attention_mask (B, P+S), position_ids (B, S)       int64; only what it uses
    input.past_key_values.layers.N.keys|values (B, K, P, D)              float32
    → logits (B, 1, V): of the last token, or (B, S, V) where `last_only` is false
    → output.past_key_values.layers.N.keys|values (B, K, P+S, D)
"""

from __future__ import annotations

import copy
import ctypes
import gc
import inspect
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

# A config or a file of a model must not make transformers fetch anything.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

STEPS = ("loading the weights", "tracing", "writing", "comparing")
_PAST, _PRESENT = "input.past_key_values.layers.", "output.past_key_values.layers."
_FED = ("input_ids", "attention_mask", "position_ids")
_TOLERANCE = 2e-3  # of the largest logit: float32 summed in another order gives about 1e-5
_TRIAL_LAYERS = 2
_TRIAL_VOCABULARY = 512
_TRIAL_PARAMETERS = 800_000_000  # a larger trial model would take too much memory
_TRIAL_WINDOW = 6
_WINDOW_KEYS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Refusal(Exception):
    """Why a model cannot be exported; `code` as in ohmygpu's errors."""

    def __init__(self, message: str, code: str = "unsupported_model") -> None:
        super().__init__(message)
        self.code = code


def main() -> int:
    """Read a job, do it, report. Returns 0, or 1 after an error line."""
    _settle_in()
    line = sys.stdin.buffer.readline()
    threading.Thread(target=_watch_stdin, daemon=True).start()
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints goes to standard error

    def write(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    try:
        job = json.loads(line)
        if job["task"] == "try":
            answer = {"exported": try_config(job["config"])}
        else:
            files = {name: Path(path) for name, path in job["files"].items()}
            answer = {"exported": export_files(files, Path(job["output"]), write)}
    except Refusal as error:
        answer = {"error": {"code": error.code, "message": str(error), "details": {}}}
    except ImportError as error:
        text = f"the Python that exports lacks a package: {error}; install it there"
        answer = {"error": {"code": "runtime_failure", "message": text, "details": {}}}
    except MemoryError:
        text = "not enough memory to export the model; stop other programs and pull again"
        answer = {"error": {"code": "out_of_memory", "message": text, "details": {}}}
    except Exception as error:  # noqa: BLE001 (the parent needs an answer, whatever happened)
        traceback.print_exc()
        text = f"transformers cannot export this model: {_reason(error)}"
        answer = {"error": {"code": "unsupported_model", "message": text, "details": {}}}
    write(answer)
    return 1 if "error" in answer else 0


def export_files(files: dict[str, Path], output: Path, write: Any) -> dict[str, Any]:
    """Export the model in `files` into `output`: model.onnx and model.onnx.data."""

    def report(step: int) -> None:
        write({"done_bytes": step, "total_bytes": len(STEPS)})

    report(0)
    model = load(files)
    report(1)
    exported = export(model)
    report(2)
    sample = samples(model)
    facts = sizes(model)
    del model
    output.mkdir(parents=True, exist_ok=True)
    exported.save_program(output)
    del exported.program
    gc.collect()  # before ONNX Runtime loads the same weights
    report(3)
    description = describe(output / "model.onnx", sample)
    report(4)
    return description | facts


def try_config(config: dict[str, Any]) -> dict[str, Any]:
    """Export a small model with this config. Raises Refusal, or what transformers raises.

    `tried` is false where no model small enough can be made of it.
    """
    import torch

    small = shrunk(config)
    with torch.device("meta"):
        build(config)
        try:
            size = sum(parameter.numel() for parameter in build(small).parameters())
        except Exception:  # noqa: BLE001 (of any config class: sizes that go together were torn)
            return {"tried": False}
    if size > _TRIAL_PARAMETERS:
        return {"tried": False}
    torch.manual_seed(0)
    model = build(small)
    exported = export(model)
    with tempfile.TemporaryDirectory() as folder:
        exported.save_program(Path(folder))
        return describe(Path(folder) / "model.onnx", samples(model)) | {"tried": True}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with two layers and a small vocabulary; its other sizes are the model's own."""
    small = copy.deepcopy(config)
    layers = [int(small[key]) for key in _LAYER_KEYS if isinstance(small.get(key), int)]
    small |= {key: _TRIAL_LAYERS for key in _LAYER_KEYS if isinstance(small.get(key), int)}
    if layers:
        for key, value in small.items():
            if isinstance(value, list) and len(value) == layers[0]:  # one entry for each layer
                small[key] = value[:_TRIAL_LAYERS]
    for key in _WINDOW_KEYS:
        if isinstance(small.get(key), int):
            small[key] = min(small[key], _TRIAL_WINDOW)  # so that the samples reach beyond it
    kinds = small.get("attention_types")  # gpt_neo: [[kinds of layers, how often], …]
    if isinstance(kinds, list) and len(kinds) == 1 and len(kinds[0][0]) == _TRIAL_LAYERS:
        small["attention_types"] = [[kinds[0][0], 1]]
    if int(small.get("vocab_size") or 0) > _TRIAL_VOCABULARY:
        small["vocab_size"] = _TRIAL_VOCABULARY
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            small[key] = None
    return small


def build(config: dict[str, Any]) -> Any:
    """A model of random weights with this config, as transformers knows it by itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    entries = {key: value for key, value in config.items() if key not in ("auto_map", "model_type")}
    read = AutoConfig.for_model(str(config["model_type"]), **entries)
    return AutoModelForCausalLM.from_config(
        read, dtype=torch.float32, trust_remote_code=False
    ).eval()


def load(files: dict[str, Path]) -> Any:
    """The model in `files`, in float32.

    Raises Refusal when weights are missing, left over or not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if config.pop("auto_map", None):  # repositories keep it after transformers adopted a model
            (Path(folder) / "config.json").unlink()
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=False,
        )
    if missing := sorted(found["missing_keys"]):
        raise Refusal(
            f"the files lack {len(missing)} tensors, {missing[0]} among them", "corrupt_file"
        )
    if left := sorted(found["unexpected_keys"]):
        raise Refusal(
            f"the files hold {len(left)} tensors that the model has not, {left[0]} among them",
            "corrupt_file",
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise Refusal(f"the tensor {name} holds values that are not finite", "corrupt_file")
    # One copy in memory that nothing else maps: the files may be freed while we go on.
    return model.eval()


def sizes(model: Any) -> dict[str, Any]:
    """What is shown of a model, and how long its texts may be (0: its config does not say)."""
    import torch
    import transformers

    def first(*names: str) -> int:
        found = (getattr(model.config, name, None) for name in names)
        return next((int(value) for value in found if isinstance(value, int) and value > 0), 0)

    return {
        "exporter": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "context_tokens": first(
            "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"
        ),
        "hidden_size": first("hidden_size", "n_embd", "d_model"),
        "heads": first("num_attention_heads", "n_head", "n_heads", "attention_heads"),
        "feed_forward_length": first("intermediate_size", "ffn_dim", "n_inner"),
    }


class Exported:
    """A traced model."""

    def __init__(self, program: Any) -> None:
        self.program = program

    def save_program(self, folder: Path) -> None:
        """Write model.onnx, and its weights beside it."""
        import onnx_ir

        onnx_ir.save(self.program, str(folder / "model.onnx"), external_data="model.onnx.data")


def export(model: Any) -> Exported:
    """Trace `model` as a step that continues a cache of keys and values."""
    import torch
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        raise Refusal(f"a {model.config.model_type} keeps a state that is not keys and values")
    rows, past, new = 2, 5, 3
    accepted = inspect.signature(model.forward).parameters
    ids = torch.arange(rows * (past + new)).reshape(rows, -1) % _vocabulary(model)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :past], past_key_values=cache, use_cache=True)
    if not cache.layers or cache.layers[0].keys is None:
        raise Refusal(f"a {model.config.model_type} does not fill a cache of keys and values")
    inputs = {
        "input_ids": ids[:, past:],
        "attention_mask": torch.ones(rows, past + new, dtype=torch.int64),
        "position_ids": torch.arange(past, past + new)[None].repeat(rows, 1),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    inputs = {name: value for name, value in inputs.items() if name in accepted}
    if "past_key_values" not in inputs:
        raise Refusal(f"a {model.config.model_type} takes no cache of keys and values")
    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
    return Exported(exported.program)


def samples(model: Any) -> list[tuple[list[int], Any]]:
    """(tokens, logits of the last one) of three texts of different lengths, from torch."""
    import torch

    generator = torch.Generator().manual_seed(1)
    found = []
    for length in (4, 9, 6):
        ids = torch.randint(0, _vocabulary(model), (1, length), generator=generator)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        found.append((ids[0].tolist(), logits.float().numpy()))
    return found


def describe(path: Path, sample: list[tuple[list[int], Any]]) -> dict[str, Any]:
    """What the engine must know of the graph; it gives the samples' logits, or Refusal is raised.

    Every text runs token by token after its first three, from an empty cache, and then all of them
    as one batch padded on the left. Where only that fails, `batches` is false.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = contract(session)
    caches = []
    worst = 0.0
    for ids, expected in sample:
        cache = empty_cache(graph, 1)
        logits, cache = run(session, graph, [ids[:3]], cache, [[1] * 3])
        for index in range(3, len(ids)):
            caches.append((ids[index], cache)) if index == len(ids) - 1 else None
            logits, cache = run(session, graph, [[ids[index]]], cache, [[1] * (index + 1)])
        worst = max(worst, error_of(logits[0], expected))
    if not worst < _TOLERANCE:
        raise Refusal(
            f"the exported graph gives other logits than the model (off by {worst:.2g} of the "
            "largest)"
        )
    return graph | {"error": worst, "batches": _batches(session, graph, sample, caches)}


def _batches(session: Any, graph: dict[str, Any], sample: Any, caches: Any) -> bool:
    """Whether a decode of rows of different lengths, padded on the left, gives the same logits."""
    import numpy as np

    length = max(cache[0].shape[2] for _, cache in caches)
    joined, masks, tokens = [], [], []
    for index in range(len(graph["cache"])):
        rows = []
        for _, cache in caches:
            padding = length - cache[index].shape[2]
            rows.append(np.pad(cache[index], ((0, 0), (0, 0), (padding, 0), (0, 0))))
        joined.append(np.concatenate(rows))
    for token, cache in caches:
        own = cache[0].shape[2]
        masks.append([0] * (length - own) + [1] * (own + 1))
        tokens.append([token])
    try:
        logits, _ = run(session, graph, tokens, joined, masks)
    except Exception:  # noqa: BLE001 (of ONNX Runtime: a graph that fixed its batch to one row)
        return False
    return all(
        error_of(row, expected) < _TOLERANCE
        for row, (_, expected) in zip(logits, sample, strict=True)
    )


def contract(session: Any) -> dict[str, Any]:
    """Inputs, caches and logits of the graph. Raises Refusal for a graph that is another one."""
    inputs = {entry.name: entry for entry in session.get_inputs()}
    outputs = {entry.name: entry for entry in session.get_outputs()}
    cache = []
    for name, entry in inputs.items():
        if name in _FED:
            continue
        present = name.replace(_PAST, _PRESENT)
        if not name.startswith(_PAST) or present not in outputs:
            raise Refusal(f"the exported graph wants an input {name}, which no text model is given")
        shape = entry.shape
        if len(shape) != 4 or entry.type != "tensor(float)" or isinstance(shape[2], int):
            raise Refusal(f"its cache {name} is not keys or values of each position ({shape})")
        heads, width = outputs[present].shape[1], outputs[present].shape[3]
        heads = heads if isinstance(heads, int) else int(shape[1])
        width = width if isinstance(width, int) else int(shape[3])
        cache.append([name, present, int(heads), int(width)])
    if "input_ids" not in inputs or "attention_mask" not in inputs or not cache:
        raise Refusal("the exported graph has no attention mask or no cache")
    vocabulary = outputs["logits"].shape[2]
    return {
        "inputs": [name for name in inputs if name in _FED],
        "cache": cache,
        "last_only": outputs["logits"].shape[1] == 1,
        "vocab_size": int(vocabulary),
    }


def empty_cache(graph: dict[str, Any], rows: int) -> list[Any]:
    """A cache of no tokens."""
    import numpy as np

    return [np.zeros((rows, heads, 0, width), np.float32) for *_, heads, width in graph["cache"]]


def run(
    session: Any, graph: dict[str, Any], ids: list[list[int]], cache: list[Any], mask: Any
) -> tuple[Any, list[Any]]:
    """(logits of the last tokens (B, V), the cache grown by `ids`)."""
    import numpy as np

    attention = np.array(mask, np.int64)
    positions = np.maximum(attention.cumsum(1) - 1, 0)[:, -len(ids[0]) :]
    fed = {"input_ids": np.array(ids, np.int64), "attention_mask": attention}
    if "position_ids" in graph["inputs"]:
        fed["position_ids"] = positions
    fed |= {entry[0]: value for entry, value in zip(graph["cache"], cache, strict=True)}
    names = ["logits", *(entry[1] for entry in graph["cache"])]
    logits, *present = session.run(names, fed)
    return logits[:, -1], present


def error_of(found: Any, expected: Any) -> float:
    """The largest difference, as a part of the largest expected logit."""
    import numpy as np

    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-6))


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _reason(error: Exception) -> str:
    """The first line of an error that says something, on one line and not too long."""
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return "".join(char for char in text if char.isprintable())[:300]


def _watch_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def _settle_in() -> None:
    if hasattr(os, "nice"):
        os.nice(5)  # an export yields to the models being served
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


if __name__ == "__main__":
    sys.exit(main())

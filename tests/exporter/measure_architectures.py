"""Which architectures transformers exports to graphs that the engine serves: measured, one by one.

    <python of the exporter's environment> tests/exporter/measure_architectures.py [MODEL_TYPE …]

Every causal language model that transformers knows and `converters/` does not is made with a tiny
config and random weights, exported and compared with torch, as `ohmygpu/exporter/script.py` does.
The outcome is written to `ohmygpu/exporter/architectures.json`: what a pull asks before it
downloads weights. Each model runs in a process of its own. Takes about ten seconds for each model.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "ohmygpu" / "exporter" / "architectures.json"
LIMIT_S = 240

_SIZES = {
    64: "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim",
    4: "num_attention_heads n_head num_heads n_heads decoder_attention_heads attention_heads "
    "encoder_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts",
    2: "num_key_value_heads num_kv_heads num_hidden_layers n_layer num_layers n_layers "
    "decoder_layers encoder_layers num_experts_per_tok moe_topk first_k_dense_replace",
    16: "head_dim d_kv kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank "
    "q_lora_rank rotary_dim attention_head_size",
    96: "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim "
    "moe_intermediate_size shared_expert_intermediate_size ffn_hidden_size",
    128: "max_position_embeddings n_positions max_seq_len seq_length max_sequence_length n_ctx",
    256: "vocab_size",
    8: "sliding_window attention_window_size",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts",
}


def exporter() -> Any:
    """The module of the program that exports."""
    path = ROOT / "ohmygpu" / "exporter" / "script.py"
    spec = importlib.util.spec_from_file_location("exporter_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_config(model_type: str) -> dict[str, Any]:
    """A config of this type with small sizes for all keys of its defaults that are sizes."""
    from transformers import CONFIG_MAPPING

    read = CONFIG_MAPPING[model_type]()
    plain = read.to_dict()
    config: dict[str, Any] = {"model_type": model_type}
    for value, names in _SIZES.items():
        for name in names.split():
            if isinstance(plain.get(name), int) and not isinstance(plain.get(name), bool):
                config[name] = value
    for old, new in (getattr(read, "attribute_map", None) or {}).items():
        if old in config and new in config and old != new:
            del config[old]
    if plain.get("num_key_value_heads") is not None and (
        plain["num_key_value_heads"] == plain.get("num_attention_heads")
    ):
        config["num_key_value_heads"] = config.get("num_attention_heads", 4)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(plain.get(name), int):
            config[name] = 0
    if "attention_types" in plain:  # gpt_neo: [[kinds of layers, how often], …]
        config |= {"attention_types": [[["global", "local"], 1]], "window_size": 8}
    if "is_decoder" in plain:
        config["is_decoder"] = True
    layers = plain.get("num_hidden_layers")
    for name, entry in plain.items():
        if isinstance(entry, list) and len(entry) == layers and layers:
            kinds = list(dict.fromkeys(map(json.dumps, entry)))
            config[name] = [json.loads(kinds[index % len(kinds)]) for index in range(2)]
    return config


def attempt(model_type: str, config: dict[str, Any], connection: Any) -> None:
    """Export one model and send the outcome."""
    script = exporter()
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        found = script.try_config(config)
        if not found["tried"]:
            connection.send({"refused": "no small model can be made of its config"})
            return
        connection.send({"batches": found["batches"], "error": float(f"{found['error']:.1g}")})
    except script.Refusal as error:
        connection.send({"refused": str(error)})
    except Exception as error:  # noqa: BLE001 (the outcome is what is measured)
        last = traceback.extract_tb(error.__traceback__)[-1]
        connection.send({"refused": script._reason(error), "at": f"{Path(last.filename).name}"})


def told_by_class(model_type: str, class_name: str) -> str | None:
    """Why a type cannot be exported, where its class says so; None where it does not."""
    import transformers

    config = transformers.CONFIG_MAPPING[model_type]
    if getattr(getattr(transformers, class_name, None), "_is_stateful", False):
        return f"a {model_type} keeps a state that is not keys and values"
    if config.__dict__.get("is_encoder_decoder") or config().is_encoder_decoder:
        return f"a {model_type} is the decoder of an encoder and decoder"
    return None


def measure(model_type: str, class_name: str) -> dict[str, Any]:
    """The outcome for one type, from a forked process: torch is imported once."""
    try:
        told = told_by_class(model_type, class_name)
    except Exception:  # noqa: BLE001 (a config class that has no defaults: the export will tell)
        told = None
    if told:
        return {"refused": told}
    try:
        config = tiny_config(model_type)
    except Exception as error:  # noqa: BLE001
        return {"refused": f"no tiny config: {type(error).__name__}: {str(error)[:150]}"}
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(model_type, config, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LIMIT_S) else {"refused": "takes too long"}
    except EOFError:
        return {"refused": "the export died"}
    finally:
        process.kill()
        process.join()


def main() -> None:
    """Measure the types named, or all; write and print each outcome."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    torch.set_num_threads(2)
    own = {path.stem for path in (ROOT / "converters").glob("*.py")}
    types = sys.argv[1:] or [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in own]
    known: dict[str, Any] = {}
    if RESULT.exists():
        known = json.loads(RESULT.read_text(encoding="utf-8"))["model_types"]
    for model_type in types:
        class_name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        known[model_type] = {"class": class_name, **measure(model_type, class_name)}
        print(model_type, json.dumps(known[model_type]), flush=True)
        data = {
            "transformers": transformers.__version__,
            "torch": re.sub(r"\+.*", "", torch.__version__),
            "model_types": dict(sorted(known.items())),
        }
        RESULT.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

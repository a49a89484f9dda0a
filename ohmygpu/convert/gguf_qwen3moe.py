"""GGUF models of architecture `qwen3moe`: qwen3 with experts in every layer.

The experts of a layer are in one tensor per projection, in some files gate and up in one tensor
too. The weights of the chosen experts always sum to 1 (`norm_topk_prob`): llama.cpp knows no other
way for this architecture.
"""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_keys import Keys, expert_counts
from .gguf_llama import has
from .gguf_names import Entry, Translation, entry, sizes_of, translation
from .gguf_qwen3 import BODY, body_config

_EXPERT = "model.layers.N.mlp.experts.{}"
_ROUTER = {"blk.N.ffn_gate_inp.weight": entry("model.layers.N.mlp.gate.weight", "XE")}
_DOWN = {"blk.N.ffn_down_exps.weight": entry(f"{_EXPERT}.down_proj.weight", "XEM")}
_GATE_AND_UP = {
    "blk.N.ffn_gate_exps.weight": entry(f"{_EXPERT}.gate_proj.weight", "XME"),
    "blk.N.ffn_up_exps.weight": entry(f"{_EXPERT}.up_proj.weight", "XME"),
}
_GATE_UP = {
    "blk.N.ffn_gate_up_exps.weight": Entry(
        (f"{_EXPERT}.gate_proj.weight", f"{_EXPERT}.up_proj.weight"), "XWE", parts="MM"
    )
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "qwen3moe")
    config = body_config(keys, "qwen3_moe", "Qwen3MoeForCausalLM")
    experts, used = expert_counts(keys)
    inner = keys.integer("expert_feed_forward_length", config["intermediate_size"] // used)
    config |= {
        "num_experts": experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    gate_up = _GATE_UP if has(model, "ffn_gate_up_exps.weight") else _GATE_AND_UP
    sizes = sizes_of(config) | {"X": experts, "M": inner, "W": 2 * inner}
    return translation(keys, config, {**BODY, **_ROUTER, **gate_up, **_DOWN}, sizes)

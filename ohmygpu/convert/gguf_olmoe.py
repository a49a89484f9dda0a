"""GGUF models of architecture `olmoe`: queries and keys normalised over all heads, experts in every
layer, whose weights do not sum to 1 in llama.cpp.
"""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_keys import Keys, decoder_config, expert_counts
from .gguf_names import ATTENTION, NORMS, TOP, Translation, entry, sizes_of, translation
from .gguf_rope import rope_config

_LAYER = "model.layers.N"
_TABLE = {
    **TOP,
    **NORMS,
    **ATTENTION,
    "blk.N.attn_q_norm.weight": entry(f"{_LAYER}.self_attn.q_norm.weight", "Q"),
    "blk.N.attn_k_norm.weight": entry(f"{_LAYER}.self_attn.k_norm.weight", "K"),
    "blk.N.ffn_gate_inp.weight": entry(f"{_LAYER}.mlp.gate.weight", "XE"),
    "blk.N.ffn_gate_exps.weight": entry(f"{_LAYER}.mlp.experts.{{}}.gate_proj.weight", "XFE"),
    "blk.N.ffn_up_exps.weight": entry(f"{_LAYER}.mlp.experts.{{}}.up_proj.weight", "XFE"),
    "blk.N.ffn_down_exps.weight": entry(f"{_LAYER}.mlp.experts.{{}}.down_proj.weight", "XEF"),
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "olmoe")
    config = decoder_config(keys, "olmoe", "OlmoeForCausalLM")
    experts, used = expert_counts(keys)
    config |= {
        "hidden_act": "silu",
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "attention_bias": False,
        "num_experts": experts,
        "num_experts_per_tok": used,
        "norm_topk_prob": False,
    }
    config |= rope_config(keys, config)
    return translation(keys, config, _TABLE, sizes_of(config) | {"X": experts})

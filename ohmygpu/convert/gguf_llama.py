"""GGUF models of architecture `llama`: Llama 1 to 3, Mistral 7B, SmolLM, TinyLlama; and Mixtral.

llama.cpp rotates neighbouring pairs of a head's dimensions here, so its converter reordered the
rows of q and k. Llama 3.1's RoPE scaling comes as a tensor of divisors, `rope_freqs`. Mixtral has
the same architecture name; its experts are in one tensor per projection, in older files in one per
expert.
"""

from __future__ import annotations

from typing import Any

from .gguf import GgufModel
from .gguf_keys import Keys, decoder_config, expert_counts
from .gguf_names import (
    ATTENTION,
    GATED_MLP,
    MLP_BIASES,
    NORMS,
    OUTPUT_BIAS,
    QKV_BIASES,
    TOP,
    Translation,
    entry,
    neighbouring_pairs,
    sizes_of,
    translation,
)
from .gguf_rope import rope_config

BODY = {**TOP, **NORMS, **neighbouring_pairs({**ATTENTION, **QKV_BIASES}), **OUTPUT_BIAS}
"""All tensors but those of the feed-forward."""

_MIXTRAL = "model.layers.N.block_sparse_moe"
_ROUTER = {"blk.N.ffn_gate_inp.weight": entry(f"{_MIXTRAL}.gate.weight", "XE")}
_EXPERTS = {
    "blk.N.ffn_gate_exps.weight": entry(f"{_MIXTRAL}.experts.{{}}.w1.weight", "XFE"),
    "blk.N.ffn_down_exps.weight": entry(f"{_MIXTRAL}.experts.{{}}.w2.weight", "XEF"),
    "blk.N.ffn_up_exps.weight": entry(f"{_MIXTRAL}.experts.{{}}.w3.weight", "XFE"),
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "llama")
    if keys.integer("expert_count", 0, least=0):
        return _mixtral(keys)
    config = dense_config(keys, "llama", "LlamaForCausalLM")
    return translation(keys, config, {**BODY, **GATED_MLP, **MLP_BIASES})


def dense_config(keys: Keys, model_type: str, architecture: str) -> dict[str, Any]:
    """The config of a llama, or of an architecture with llama's keys."""
    config = decoder_config(keys, model_type, architecture)
    config |= {
        "hidden_act": "silu",
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "attention_bias": has(keys.model, "attn_q.bias", "attn_qkv.bias", "attn_output.bias"),
        "mlp_bias": has(keys.model, "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
    }
    return config | rope_config(keys, config)


def has(model: GgufModel, *names: str) -> bool:
    """Whether the first layer has a tensor of one of these names."""
    return any(f"blk.0.{name}" in model.tensors for name in names)


def _mixtral(keys: Keys) -> Translation:
    experts, used = expert_counts(keys)
    config = dense_config(keys, "mixtral", "MixtralForCausalLM")
    config |= {"num_local_experts": experts, "num_experts_per_tok": used}
    table = _EXPERTS
    if has(keys.model, "ffn_gate.0.weight"):
        table = {
            name.replace("_exps", f".{expert}"): entry(
                found.names[0].replace("{}", str(expert)), found.shape[1:]
            )
            for name, found in _EXPERTS.items()
            for expert in range(min(experts, len(keys.model.tensors)))
        }
    sizes = sizes_of(config) | {"X": experts}
    return translation(keys, config, {**BODY, **_ROUTER, **table}, sizes)

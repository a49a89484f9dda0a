"""GGUF models of architecture `gemma2`: four norms in a layer, capped scores, every other layer
local.

Files hold norm weights with the 1 that the model adds to them already added. The scale of the
attention is not in the files: as in llama.cpp, the model of 46 layers (27B) has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .gguf import GgufModel
from .gguf_keys import Keys, decoder_config
from .gguf_names import ATTENTION, GATED_MLP, TOP, Translation, entry, translation
from .gguf_rope import rope_config

ADDED_ONE = -1.0
"""What to add to a stored norm weight, for Hugging Face's own."""

_LAYER = "model.layers.N"
TABLE = {
    **TOP,
    "output_norm.weight": entry("model.norm.weight", "E", shift=ADDED_ONE),
    **ATTENTION,
    **GATED_MLP,
    "blk.N.attn_norm.weight": entry(f"{_LAYER}.input_layernorm.weight", "E", shift=ADDED_ONE),
    "blk.N.post_attention_norm.weight": entry(
        f"{_LAYER}.post_attention_layernorm.weight", "E", shift=ADDED_ONE
    ),
    "blk.N.ffn_norm.weight": entry(
        f"{_LAYER}.pre_feedforward_layernorm.weight", "E", shift=ADDED_ONE
    ),
    "blk.N.post_ffw_norm.weight": entry(
        f"{_LAYER}.post_feedforward_layernorm.weight", "E", shift=ADDED_ONE
    ),
}
_LAYERS_OF_27B = 46


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "gemma2")
    config = gemma_config(keys, "gemma2", "Gemma2ForCausalLM", _LAYERS_OF_27B)
    layers = config["num_hidden_layers"]
    # A file without these keys has the values all published models have, as in llama.cpp.
    config |= {
        "sliding_window": keys.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.positive("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.positive("final_logit_softcapping", 30.0),
        "layer_types": layer_types(keys, layers, period=2),
        **rope_config(keys, config),
    }
    return translation(keys, config, TABLE)


def gemma_config(
    keys: Keys, model_type: str, architecture: str, layers_of_27b: int
) -> dict[str, Any]:
    """What Gemma 2 and 3 share, but for positions."""
    config = decoder_config(keys, model_type, architecture)
    of_27b = config["num_hidden_layers"] == layers_of_27b
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "attention_bias": False,
        "query_pre_attn_scalar": _units_per_head(config) if of_27b else config["head_dim"],
    }


def layer_types(keys: Keys, layers: int, period: int) -> list[str]:
    """Of each layer whether it is local; in each `period` layers the last one is global."""
    pattern = keys.layer_flags("attention.sliding_window_pattern", layers)
    if pattern is None or isinstance(pattern, int):
        every = period if pattern is None else pattern
        pattern = [(layer + 1) % every != 0 for layer in range(layers)]
    return ["sliding_attention" if local else "full_attention" for local in pattern]


def _units_per_head(config: Mapping[str, Any]) -> int:
    return int(config["hidden_size"]) // int(config["num_attention_heads"])

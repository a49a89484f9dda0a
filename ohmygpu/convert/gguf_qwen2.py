"""GGUF models of architecture `qwen2`: Qwen 2 and 2.5; q, k and v have biases, the output none."""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_keys import Keys, decoder_config
from .gguf_names import ATTENTION, GATED_MLP, NORMS, QKV_BIASES, TOP, Translation, translation
from .gguf_rope import rope_config

_TABLE = {**TOP, **NORMS, **ATTENTION, **QKV_BIASES, **GATED_MLP}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "qwen2")
    config = decoder_config(keys, "qwen2", "Qwen2ForCausalLM")
    config |= {
        "hidden_act": "silu",
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "use_sliding_window": False,
    }
    return translation(keys, config | rope_config(keys, config), _TABLE)

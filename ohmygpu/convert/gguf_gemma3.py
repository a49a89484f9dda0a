"""GGUF models of architecture `gemma3` (the text model): gemma2 without caps, with normalised
queries and keys, and local layers with positions of their own.

Files of models with pictures hold the text model alone. Rows of the embedding that no token has
are cut off in files, so their vocabulary can be smaller than config.json's.
"""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_gemma2 import ADDED_ONE, TABLE, gemma_config, layer_types
from .gguf_keys import Keys
from .gguf_names import Translation, entry, translation
from .gguf_rope import rope_config

_LAYERS_OF_27B = 62
_TABLE = {
    **TABLE,
    "blk.N.attn_q_norm.weight": entry(
        "model.layers.N.self_attn.q_norm.weight", "D", shift=ADDED_ONE
    ),
    "blk.N.attn_k_norm.weight": entry(
        "model.layers.N.self_attn.k_norm.weight", "D", shift=ADDED_ONE
    ),
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "gemma3")
    config = gemma_config(keys, "gemma3_text", "Gemma3ForCausalLM", _LAYERS_OF_27B)
    layers = config["num_hidden_layers"]
    window = keys.integer("attention.sliding_window", 0, least=0)
    config |= {
        "sliding_window": window or None,
        "layer_types": layer_types(keys, layers, period=6 if window else 1),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        **rope_config(keys, config),
        "rope_local_base_freq": keys.positive("rope.freq_base_swa", 10000.0),
    }
    return translation(keys, config, _TABLE)

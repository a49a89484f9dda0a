"""GGUF models of architecture `smollm3`: llama, where every fourth layer has no positions."""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_keys import Keys
from .gguf_llama import BODY, dense_config
from .gguf_names import GATED_MLP, MLP_BIASES, Translation, translation

_WITHOUT_POSITIONS = 4  # one layer in so many; not in the files, as in llama.cpp


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "smollm3")
    config = dense_config(keys, "smollm3", "SmolLM3ForCausalLM")
    layers = range(1, config["num_hidden_layers"] + 1)
    config |= {
        "no_rope_layer_interval": _WITHOUT_POSITIONS,
        "no_rope_layers": [int(layer % _WITHOUT_POSITIONS != 0) for layer in layers],
        "use_sliding_window": False,
    }
    return translation(keys, config, {**BODY, **GATED_MLP, **MLP_BIASES})

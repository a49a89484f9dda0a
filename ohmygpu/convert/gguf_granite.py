"""GGUF models of architecture `granite`: llama with a factor at the embedding, the attention, the
residuals and the logits.
"""

from __future__ import annotations

from ohmygpu.core.errors import UnsupportedModel

from .gguf import GgufModel
from .gguf_keys import Keys
from .gguf_llama import BODY, dense_config
from .gguf_names import GATED_MLP, MLP_BIASES, Translation, translation


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "granite")
    if not keys.flag("rope.scaling.finetuned", True):  # how these files say that nothing turns
        raise UnsupportedModel(
            f"{model.name} is a granite model without positions, which cannot be compiled"
        )
    config = dense_config(keys, "granite", "GraniteForCausalLM")
    # 0 means unset, which is 1 (1 / sqrt(head_dim) for the attention).
    config |= {
        "embedding_multiplier": keys.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": keys.number("residual_scale", 0.0) or 1.0,
        "attention_multiplier": keys.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
        "logits_scaling": keys.positive("logit_scale"),
    }
    return translation(keys, config, {**BODY, **GATED_MLP, **MLP_BIASES})

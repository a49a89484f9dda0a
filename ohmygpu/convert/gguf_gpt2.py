"""GGUF models of architecture `gpt2`: learned positions, layer norms, biases everywhere.

Hugging Face stores GPT-2's linear layers as `Conv1D`, (in, out); GGUF stores them (out, in), as
every other linear. Turning quantised blocks round would break them, so a GGUF source shows these
matrices under their Hugging Face names as (out, in), and its config says so: `conv1d` is false
where `config.json` has no such key (true). converters/gpt2.py reads either and builds from
(out, in). Names begin with `transformer.`, as transformers itself saves them.
"""

from __future__ import annotations

from ohmygpu.core.errors import CorruptFile

from .gguf import GgufModel
from .gguf_keys import Keys, vocabulary
from .gguf_names import Translation, entry, maybe, translation

_LAYER = "transformer.h.N"
_TABLE = {
    "token_embd.weight": entry("transformer.wte.weight", "VE"),
    "position_embd.weight": entry("transformer.wpe.weight", "PE"),
    "output_norm.weight": entry("transformer.ln_f.weight", "E"),
    "output_norm.bias": entry("transformer.ln_f.bias", "E"),
    "output.weight": maybe("lm_head.weight", "VE"),
    "blk.N.attn_norm.weight": entry(f"{_LAYER}.ln_1.weight", "E"),
    "blk.N.attn_norm.bias": entry(f"{_LAYER}.ln_1.bias", "E"),
    "blk.N.attn_qkv.weight": entry(f"{_LAYER}.attn.c_attn.weight", "AE"),
    "blk.N.attn_qkv.bias": entry(f"{_LAYER}.attn.c_attn.bias", "A"),
    "blk.N.attn_output.weight": entry(f"{_LAYER}.attn.c_proj.weight", "EE"),
    "blk.N.attn_output.bias": entry(f"{_LAYER}.attn.c_proj.bias", "E"),
    "blk.N.ffn_norm.weight": entry(f"{_LAYER}.ln_2.weight", "E"),
    "blk.N.ffn_norm.bias": entry(f"{_LAYER}.ln_2.bias", "E"),
    "blk.N.ffn_up.weight": entry(f"{_LAYER}.mlp.c_fc.weight", "FE"),
    "blk.N.ffn_up.bias": entry(f"{_LAYER}.mlp.c_fc.bias", "F"),
    "blk.N.ffn_down.weight": entry(f"{_LAYER}.mlp.c_proj.weight", "EF"),
    "blk.N.ffn_down.bias": entry(f"{_LAYER}.mlp.c_proj.bias", "E"),
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "gpt2")
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if hidden % heads:
        raise CorruptFile(
            f"{model.name} has {hidden} hidden units for {heads} heads, which do not divide; "
            "pull the model again"
        )
    layers = keys.integer("block_count")
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_head": heads,
        "n_layer": layers,
        "n_inner": keys.integer("feed_forward_length", 4 * hidden),
        "n_positions": keys.integer("context_length"),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": keys.positive("attention.layer_norm_epsilon"),
        "conv1d": False,
        **vocabulary(model),
    }
    sizes = {"L": layers, "E": hidden, "A": 3 * hidden, "F": config["n_inner"]}
    sizes |= {"P": config["n_positions"], "V": config.get("vocab_size", 0)}
    return translation(keys, config, _TABLE, sizes)

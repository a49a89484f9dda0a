"""GGUF models of architecture `llama` (Llama 1-3, Mistral 7B, SmolLM, TinyLlama, …).

llama.cpp rotates neighbouring pairs of a head's dimensions (RoPE as in the original paper) where
transformers rotates the first half against the second, so its converter reordered the rows of the
query and key weights; `_half_rotation_rows` puts them back. Keys: docs/gguf.md of ggml.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .gguf import GgufModel
from .gguf_source import Placement, Translation

_MAX_COUNT = 1 << 24  # of layers, heads, hidden units…: far above any model, far below overflow

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_REQUIRED_TOP = ("token_embd.weight", "output_norm.weight")
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_ATTENTION_BIASES = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.bias": "self_attn.o_proj.bias",
}
_MLP_BIASES = {
    "ffn_gate.bias": "mlp.gate_proj.bias",
    "ffn_up.bias": "mlp.up_proj.bias",
    "ffn_down.bias": "mlp.down_proj.bias",
}
_ROPE_FACTORS = "rope_freqs.weight"
_IGNORED_SUFFIX = "attn_rot_embd"  # inverse frequencies that very old converters stored

# Settings of other architectures that would change the result; no llama model sets them.
_UNKNOWN_TO_LLAMA = (
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "embedding_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
)


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    reader = _Keys(model)
    reader.refuse_variants()
    config = _config(reader)
    config |= _rope_config(reader, config)
    tensors = set(model.tensors) - {_ROPE_FACTORS}
    tensors = {name for name in tensors if not name.endswith(_IGNORED_SUFFIX)}
    names = _names(model, config, tensors)
    placements = {
        hf_name: Placement(gguf_name, _rows(hf_name, config))
        for gguf_name, hf_name in names.items()
    }
    _check_shapes(model, config, names)
    return Translation(config, placements)


class _Keys:
    """Typed access to `llama.*` metadata."""

    def __init__(self, model: GgufModel) -> None:
        self.model = model

    def refuse_variants(self) -> None:
        experts = self.integer("expert_count", 0, least=0)
        if experts or any("_exps." in name for name in self.model.tensors):
            raise UnsupportedModel(
                f"{self.model.name} is a mixture of experts ({experts} experts) of the llama "
                "architecture; only dense llama models can be compiled from GGUF"
            )
        for key in _UNKNOWN_TO_LLAMA:
            if self.number(key, 0.0):
                raise UnsupportedModel(
                    f"{self.model.name} sets llama.{key}, which is not part of the llama "
                    "architecture as compiled here; its answers would be wrong"
                )

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._scalar(key)
        if value is None:
            if default is None:
                raise self._corrupt(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._corrupt(key, f"is {str(value)[:40]!r}, not a whole number")
        if not least <= value <= _MAX_COUNT:
            raise self._corrupt(key, f"is {value}, not between {least} and {_MAX_COUNT}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._scalar(key)
        if value is None:
            if default is None:
                raise self._corrupt(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._corrupt(key, f"is {str(value)[:40]!r}, not a number")
        if not np.isfinite(value):
            raise self._corrupt(key, "is not a finite number")
        return _shortest(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise self._corrupt(key, f"is {value}, not above 0")
        return value

    def text(self, key: str) -> str | None:
        value = self.model.metadata.get(f"llama.{key}")
        if value is not None and not isinstance(value, str):
            raise self._corrupt(key, "is not text")
        return value

    def _scalar(self, key: str) -> Any:
        """The value; a list with one entry per layer counts as one value when all are equal."""
        value = self.model.metadata.get(f"llama.{key}")
        if isinstance(value, np.ndarray):
            if value.size == 0:
                raise self._corrupt(key, "is an empty list")
            if (value != value[0]).any():
                raise UnsupportedModel(
                    f"{self.model.name} has a different llama.{key} in each layer; "
                    "such models cannot be compiled yet"
                )
            return value[0].item()
        return value

    def _corrupt(self, key: str, what: str) -> CorruptFile:
        return CorruptFile(f"llama.{key} in {self.model.name} {what}; pull the model again")


def _config(reader: _Keys) -> dict[str, Any]:
    model = reader.model
    heads = reader.integer("attention.head_count")
    hidden = reader.integer("embedding_length")
    if hidden % heads and "llama.attention.key_length" not in model.metadata:
        raise CorruptFile(
            f"{model.name} has {hidden} hidden units for {heads} heads, which do not divide; "
            "pull the model again"
        )
    kv_heads = reader.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise CorruptFile(
            f"{model.name} has {heads} heads and {kv_heads} key-value heads, which do not divide; "
            "pull the model again"
        )
    head_dim = reader.integer("attention.key_length", hidden // heads)
    if head_dim % 2:
        raise CorruptFile(f"{model.name} has heads of {head_dim} dimensions, an odd number")
    for key, value in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        found = reader.integer(key, value)
        if found != value:
            raise UnsupportedModel(
                f"llama.{key} in {model.name} is {found} where heads have {value} dimensions; "
                "such models cannot be compiled"
            )
    tensors = model.tensors
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": reader.integer("feed_forward_length"),
        "num_hidden_layers": reader.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": reader.positive("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": reader.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": any(name in tensors for name in _first_layer(_ATTENTION_BIASES)),
        "mlp_bias": any(name in tensors for name in _first_layer(_MLP_BIASES)),
    }
    if "token_embd.weight" in tensors:
        config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    return config | _special_tokens(model)


def _first_layer(names: dict[str, str]) -> list[str]:
    return [f"blk.0.{name}" for name in names]


def _special_tokens(model: GgufModel) -> dict[str, Any]:
    found: dict[str, int] = {}
    for key in ("bos", "eos", "eot", "eom", "padding"):
        value = model.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(value, int) and 0 <= value < _MAX_COUNT:
            found[key] = value
    ends = sorted({found[key] for key in ("eos", "eot", "eom") if key in found})
    return {
        "bos_token_id": found.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": found.get("padding"),
    }


def _rope_config(reader: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": reader.positive("rope.freq_base", 10000.0)}
    scaling = _rope_scaling(reader, config)
    if scaling is not None:
        rope["rope_scaling"] = scaling
    factors = _rope_factors(reader.model, config)
    if factors is not None:
        rope["rope_freq_factors"] = factors
    return rope


def _rope_scaling(reader: _Keys, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = reader.text("rope.scaling.type") or "linear"
    # A factor of 0 means none; scale_linear is the key before rope.scaling.* existed.
    factor = reader.number("rope.scaling.factor", 0.0) or reader.number("rope.scale_linear", 0.0)
    factor = factor or 1.0
    if factor < 0:
        raise CorruptFile(f"{reader.model.name} has a negative RoPE scaling factor")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedModel(
            f"{reader.model.name} scales RoPE by {kind[:40]!r}; linear and yarn are known"
        )
    for key, usual in (("yarn_log_multiplier", 0.0), ("yarn_ext_factor", 1.0)):
        value = reader.number(f"rope.scaling.{key}", usual)
        if value != usual:
            raise UnsupportedModel(
                f"{reader.model.name} sets llama.rope.scaling.{key} to {value}; "
                f"only {usual} is known"
            )
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": reader.integer(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
        "beta_fast": reader.positive("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": reader.positive("rope.scaling.yarn_beta_slow", 1.0),
    }
    # llama.cpp multiplies its own 1 + 0.1 ln(factor) by these; transformers takes the product.
    multiplier = reader.positive("rope.scaling.attn_factor", 1.0)
    multiplier *= reader.positive("rope.scaling.yarn_attn_factor", 1.0)
    if multiplier != 1.0:
        scaling["attention_factor"] = multiplier * (1.0 + 0.1 * float(np.log(factor)))
    return scaling


def _rope_factors(model: GgufModel, config: dict[str, Any]) -> list[float] | None:
    """Divisors of the RoPE frequencies, one per pair of dimensions (how Llama 3.1 scales)."""
    tensor = model.tensors.get(_ROPE_FACTORS)
    if tensor is None:
        return None
    expected = config["head_dim"] // 2
    if tensor.type_name != "F32" or tensor.shape != (expected,):
        raise CorruptFile(
            f"{_ROPE_FACTORS} in {model.name} is {tensor.type_name} {tensor.shape}, "
            f"not F32 ({expected},); pull the model again"
        )
    factors = model.read_rows(_ROPE_FACTORS, 0, expected).view("<f4")[:, 0]
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise CorruptFile(f"{_ROPE_FACTORS} in {model.name} holds a factor that is not above 0")
    return [float(factor) for factor in factors]


def _names(model: GgufModel, config: dict[str, Any], present: set[str]) -> dict[str, str]:
    """GGUF name → Hugging Face name of every tensor; all must be known and none missing."""
    layer_names = dict(_LAYER)
    required = list(_REQUIRED_TOP)
    for flag, biases in (("attention_bias", _ATTENTION_BIASES), ("mlp_bias", _MLP_BIASES)):
        if config[flag]:
            layer_names |= biases
    known = dict(_TOP)
    for layer in range(min(config["num_hidden_layers"], len(present))):
        for name, hf_name in layer_names.items():
            known[f"blk.{layer}.{name}"] = f"model.layers.{layer}.{hf_name}"
    required += [name for name in known if name not in _TOP and name not in _optional_biases(known)]
    missing = [name for name in required if name not in present]
    if config["num_hidden_layers"] > len(present):
        missing.append(f"blk.{len(present)}.attn_norm.weight")
    if missing:
        raise CorruptFile(
            f"{model.name} lacks the tensor {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; pull the model again"
        )
    unknown = sorted(present - set(known))
    if unknown:
        raise UnsupportedModel(
            f"{model.name} has the tensor {unknown[0][:80]!r}"
            + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            + " that the llama architecture does not know; its answers would be wrong without them"
        )
    return {name: hf_name for name, hf_name in known.items() if name in present}


def _optional_biases(known: dict[str, str]) -> set[str]:
    """Biases need not be complete: q, k and v may have one where the output has none."""
    return {name for name in known if name.endswith(".bias")}


def _rows(hf_name: str, config: dict[str, Any]) -> NDArray[np.int64] | None:
    if ".q_proj." in hf_name:
        return _half_rotation_rows(config["num_attention_heads"], config["head_dim"])
    if ".k_proj." in hf_name:
        return _half_rotation_rows(config["num_key_value_heads"], config["head_dim"])
    return None


def _half_rotation_rows(heads: int, head_dim: int) -> NDArray[np.int64]:
    """For each transformers row, the GGUF row: (heads, 2, D/2) ← (heads, D/2, 2)."""
    rows = np.arange(heads * head_dim, dtype=np.int64)
    return rows.reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _check_shapes(model: GgufModel, config: dict[str, Any], names: dict[str, str]) -> None:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    expected: dict[str, tuple[int, ...]] = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
    }
    for gguf_name, hf_name in names.items():
        part, kind = hf_name.rsplit(".", 2)[-2:]
        shape = expected.get(part, (hidden,))
        if kind == "bias":
            shape = shape[:1]
        found = model.tensors[gguf_name].shape
        if found != shape:
            raise CorruptFile(
                f"tensor {gguf_name} of {model.name} has the shape {found}, not {shape}; "
                "pull the model again"
            )


def _shortest(value: float) -> float:
    """A float32 of the file as the number it was written as (1e-05, not 9.99999974e-06)."""
    if float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return float(value)

"""Tiny Llamas with weights from numpy, and what transformers computes for them.

    python tests/golden/llama.py      writes llama.npz beside this file; needs torch, transformers

`llama.npz` holds, for each case, transformers' float32 logits of PROMPT tokens in one run followed
by those of STEPS single tokens over its KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

PROMPT, STEPS = 22, 6
FILE = Path(__file__).with_name("llama.npz")

_BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 1000.0,
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head_tied": {"num_key_value_heads": None, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "silu"},
    "wide_heads": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
    | {"head_dim": 32},
    "odd_heads": {"hidden_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "dynamic": {
        "max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
            "original_max_position_embeddings": 24,
        }
    },
}
STRETCHED = ("dynamic", "longrope")  # frequencies depend on a row's length


def config(case: str) -> dict[str, Any]:
    """`config.json` of a case."""
    return _BASE | CASES[case]


def token_ids(case: str) -> list[int]:
    """The PROMPT + STEPS tokens of a case."""
    rng = np.random.default_rng([7, *case.encode()])
    return [int(token) for token in rng.integers(0, _BASE["vocab_size"], PROMPT + STEPS)]


def arrays(case: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Float32]:
    """The weights of a case: norms about 1, everything else about 1.5 / sqrt(columns)."""
    rng = np.random.default_rng([11, *case.encode()])
    found = {}
    for name in sorted(shapes):
        shape = shapes[name]
        values = rng.standard_normal(shape) * 1.5 / np.sqrt(shape[-1])
        found[name] = (values + ("norm" in name)).astype(np.float32)
    return found


def compute(case: str, weights: Mapping[str, Float32]) -> Float32:
    """transformers' logits, (PROMPT + STEPS, V)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {key: value for key, value in config(case).items() if key != "architectures"}
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    if fields["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    ids = torch.tensor([token_ids(case)])
    with torch.no_grad():
        out = model(ids[:, :PROMPT], use_cache=True)
        logits = [out.logits[0]]
        for step in range(PROMPT, PROMPT + STEPS):
            past = out.past_key_values
            out = model(ids[:, step : step + 1], past_key_values=past, use_cache=True)
            logits.append(out.logits[0])
    return np.concatenate([part.numpy() for part in logits])


def golden() -> dict[str, Float32]:
    """The committed logits of all cases."""
    with np.load(FILE) as file:
        return {case: file[case] for case in CASES}


def main() -> None:
    """Recompute and write the golden file."""
    from ohmygpu.convert.family import family

    llama = family("llama")
    found = {}
    for case in CASES:
        shapes = llama.weights(llama.Config.read(config(case)))
        found[case] = compute(case, arrays(case, shapes))
    np.savez_compressed(FILE, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

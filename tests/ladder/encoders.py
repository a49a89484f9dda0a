"""Tiny embedding models with random weights, and transformers' hidden states of them.

    python -m tests.ladder.encoders      writes tests/golden/encoders.npz; needs torch, transformers

The golden file holds, for each case, the last hidden states of each row of ROWS, computed alone.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.convert import recipes
from ohmygpu.convert.embedding import write_embedding_graph
from ohmygpu.convert.family import Family, check_supported, family
from ohmygpu.convert.sentence import Embedder
from tests.memory_source import MemorySource

Float32 = NDArray[np.float32]

ROWS = (29, 1, 13, 7)  # tokens of each row
GOLDEN = Path(__file__).parent.parent / "golden" / "encoders.npz"

_BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
_ROBERTA = _BERT | {
    "model_type": "roberta",
    "architectures": ["RobertaModel"],
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
_MODERN: dict[str, Any] = {
    "model_type": "modernbert",
    "architectures": ["ModernBertModel"],
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "norm_eps": 1e-5,
    "global_attn_every_n_layers": 3,
    "local_attention": 8,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
_QWEN2 = {key: value for key, value in _QWEN3.items() if key != "head_dim"} | {
    "model_type": "qwen2",
    "architectures": ["Qwen2Model"],
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "bert_tanh_gelu": _BERT | {"hidden_act": "gelu_new", "num_hidden_layers": 1},
    "roberta": _ROBERTA,
    "xlm_roberta": _ROBERTA
    | {"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "hidden_size": 60},
    "distilbert": {
        "model_type": "distilbert",
        "architectures": ["DistilBertModel"],
        "vocab_size": 64,
        "dim": 48,
        "hidden_dim": 80,
        "n_layers": 2,
        "n_heads": 3,
        "max_position_embeddings": 40,
        "activation": "gelu",
        "pad_token_id": 0,
    },
    "mpnet": _ROBERTA
    | {"model_type": "mpnet", "architectures": ["MPNetModel"], "relative_attention_num_buckets": 32}
    | {"max_position_embeddings": 42},
    "modernbert": _MODERN,
    "modernbert_biases": _MODERN
    | {"attention_bias": True, "mlp_bias": True, "norm_bias": True}
    | {"local_attention": 10, "num_hidden_layers": 3},
    "modernbert_ropes": {
        key: value for key, value in _MODERN.items() if "theta" not in key and "every" not in key
    }
    | {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "qwen3": _QWEN3,
    "qwen2": _QWEN2,
}


@dataclass(frozen=True)
class EncoderCase:
    """One tiny model."""

    name: str

    @property
    def config(self) -> dict[str, Any]:
        """As config.json."""
        return CASES[self.name]

    @cached_property
    def family(self) -> str:
        """The converter's name."""
        return check_supported(self.config, ["modules.json"])

    @cached_property
    def module(self) -> Family:
        """The converter."""
        return family(self.family)

    @property
    def rows(self) -> list[list[int]]:
        """Token ids of the rows."""
        rng = np.random.default_rng([7, *self.name.encode()])
        return [[int(token) for token in rng.integers(3, 64, count)] for count in ROWS]

    @cached_property
    def arrays(self) -> dict[str, Float32]:
        """The weights, named as such files have them: without "model." and without a head."""
        shapes = self.module.weights(self.module.Config.read(self.config))
        rng = np.random.default_rng([11, *self.name.encode()])
        found = {}
        for name in sorted(name for name in shapes if name != "lm_head.weight"):
            shape = shapes[name]
            values = rng.standard_normal(shape) * 1.5 / np.sqrt(shape[-1])
            is_norm = len(shape) == 1 and name.endswith("weight")
            found[name.removeprefix("model.")] = (values + is_norm).astype(np.float32)
        return found

    def compile(
        self,
        folder: Path,
        embedder: Embedder,
        recipe: str = "f32",
        target: str = "cpu",
        source: MemorySource | None = None,
    ) -> Path:
        """The folder of a graph."""
        folder.mkdir(parents=True, exist_ok=True)
        write_embedding_graph(
            source or MemorySource(self.config, dict(self.arrays)),
            folder,
            recipes.recipe(recipe),
            recipes.target(target),
            lambda done, total: None,
            self.family,
            embedder,
        )
        return folder

    def reference(self) -> dict[str, Float32]:
        """transformers' last hidden states of each row, (S, hidden)."""
        import torch
        from safetensors.numpy import save_file
        from transformers import AutoModel

        with TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
            save_file(self.arrays, folder / "model.safetensors", metadata={"format": "pt"})
            model, info = AutoModel.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
        assert not {key for key in info["missing_keys"] if "pooler" not in key}, info
        assert not info["unexpected_keys"], info
        found = {}
        for index, row in enumerate(self.rows):
            with torch.no_grad():
                hidden = model.eval()(torch.tensor([row])).last_hidden_state[0]
            found[f"{self.name}.{index}"] = hidden.numpy()
        return found


@cache
def golden() -> dict[str, Float32]:
    """The committed hidden states, `<case>.<row>`."""
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def section() -> str:
    """The part of docs/families.md on embedding models, made by running every case."""
    lines = [
        "## Embedding models",
        "",
        "Largest errors of the mean-pooled vectors, relative to their largest number, against",
        "transformers' hidden states of each row computed alone; and the smallest cosine at `q8`.",
        "",
        "| family | case | names | ragged batch | row alone | `q8` cosine |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in CASES:
        case = EncoderCase(name)
        reference = case.reference()
        same = all(np.abs(golden()[key] - found).max() < 1e-4 for key, found in reference.items())
        wanted = np.stack([reference[f"{name}.{row}"].mean(0) for row in range(len(ROWS))])
        together, alone, rounded = _vectors(case)
        size = np.abs(wanted).max()
        errors = [np.abs(found - wanted).max() / size for found in (together, alone)]
        lengths = np.linalg.norm(rounded, axis=1) * np.linalg.norm(wanted, axis=1)
        cosine = ((rounded * wanted).sum(1) / lengths).min()
        cells = [f"`{case.family}`", f"`{name}`", "yes" if same else "NO"]
        cells += [f"{error:.0e}" if error < 1e-3 else f"FAILS {error:.0e}" for error in errors]
        lines.append("| " + " | ".join([*cells, f"{cosine:.4f}"]) + " |")
    return "\n".join(lines) + "\n"


def _vectors(case: EncoderCase) -> tuple[Float32, Float32, Float32]:
    """Mean-pooled vectors of all rows together, of each alone, and of all together at q8."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.log_severity_level = 3
    with TemporaryDirectory() as name:
        f32, q8 = (
            InferenceSession(
                case.compile(Path(name) / recipe, Embedder("mean"), recipe) / "model.onnx", options
            )
            for recipe in ("f32", "q8")
        )
        ids = np.zeros((len(ROWS), max(ROWS)), np.int64)
        for index, row in enumerate(case.rows):
            ids[index, : len(row)] = row
        batch = {"input_ids": ids, "lengths": np.array(ROWS, np.int32)}
        alone = [
            f32.run(None, {"input_ids": np.array([row]), "lengths": np.array([len(row)], np.int32)})
            for row in case.rows
        ]
        together, rounded = f32.run(None, batch)[0], q8.run(None, batch)[0]
    return together, np.concatenate([found[0] for found in alone]), rounded


def main() -> None:
    """Recompute and write the golden file."""
    found: Mapping[str, Any] = {
        name: values for case in CASES for name, values in EncoderCase(case).reference().items()
    }
    np.savez_compressed(GOLDEN, **found)


if __name__ == "__main__":
    main()

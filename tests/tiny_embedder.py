"""A tiny embedding model as a repository has it: BERT, WordPiece, sentence-transformers' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ohmygpu.convert.compile import compile_model
from ohmygpu.core.records import CompiledModel
from tests.ladder.encoders import EncoderCase

MAX_TOKENS = 24
LENGTH = 48
PREFIX = "sentence_transformers.models"
MODULES: list[dict[str, Any]] = [
    {"idx": 0, "name": "0", "path": "", "type": f"{PREFIX}.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{PREFIX}.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{PREFIX}.Normalize"},
]
_WORDS = "abcdefghijklmnopqrstuvwxyz"


def write_repository(folder: Path, case: str = "bert") -> Path:
    """Fill `folder`; returns it."""
    tiny = EncoderCase(case)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tiny.arrays, folder / "model.safetensors", metadata={"format": "pt"})
    files: dict[str, Any] = {
        "config.json": tiny.config,
        "modules.json": MODULES,
        "1_Pooling/config.json": {
            "word_embedding_dimension": LENGTH,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
        "sentence_bert_config.json": {"max_seq_length": MAX_TOKENS, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "q ", "document": ""}},
        "tokenizer_config.json": {"cls_token": "[CLS]", "sep_token": "[SEP]"},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer().to_str(), encoding="utf-8")
    return folder


def tokenizer() -> Tokenizer:
    """A token for each letter: "ab c" is [CLS] a ##b c [SEP]."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS, *(f"##{word}" for word in _WORDS)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    found = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return found


def repository_files(folder: Path) -> dict[str, Path]:
    """Name in the repository → path."""
    return {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }


def compile_tiny(repository: Path, output: Path, recipe: str = "f32") -> CompiledModel:
    """Compile what `write_repository` wrote."""
    return compile_model(repository_files(repository), output, recipe, "cpu")

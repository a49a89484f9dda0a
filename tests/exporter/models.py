"""Tiny models of architectures that no family builds, with a real tokenizer, as repositories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "num_hidden_layers": 3,
        "ffn_dim": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
    },
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4},
    "gptj": {"n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_positions": 96},
}


def write_model(folder: Path, model_type: str, tokenizer: Path, vocab_size: int) -> Any:
    """Write a model with random weights into `folder`, beside the tokenizer's files; the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = AutoConfig.for_model(
        model_type, **CONFIGS[model_type], **ids, vocab_size=vocab_size, tie_word_embeddings=True
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the likeliest token is clearly the likeliest
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in tokenizer.iterdir():
        shutil.copy(path, folder / path.name)
    return model


def write_tokenizer(folder: Path, gguf: Path) -> int:
    """Write the tokenizer of a GGUF file and its settings into `folder`; its vocabulary's size."""
    from ohmygpu.convert.source import open_source
    from ohmygpu.convert.tokenizer import prepare_tokenizer

    folder.mkdir(parents=True)
    source = open_source({gguf.name: gguf})
    try:
        facts = prepare_tokenizer(source, folder)
        vocab_size = int(source.config["vocab_size"])
    finally:
        source.close()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": facts.bos_token or None,
        "eos_token": facts.eos_token or None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return vocab_size

"""Small real tokenizers for tests, trained here: byte-level BPE, SentencePiece-like, WordPiece."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ohmygpu.core.records import TEMPLATE_FILE, TOKENIZER_FILE, CompiledModel

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "The capital of France is Paris. What is the capital of Italy? Rome, of course!",
    "def add(a, b):\n    return a + b\n",
    "It was the best of times, it was the worst of times.",
    "Größe, naïve, 東京, emoji 🙂🙂👩‍👩‍👧 and ½.",
]


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: every byte has a token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """Llama 2's kind: `▁` for spaces, `<0x..>` for bytes without a token, BOS in front."""
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.train_from_iterator(TEXT[:3], trainer)
    trained.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    # the trainer marks the bytes as special too; Llama 2 does not
    state = trained.to_str()
    for byte in range(256):
        state = state.replace(
            f'"content":"<0x{byte:02X}>","single_word":false,"lstrip":false,"rstrip":false,'
            '"normalized":false,"special":true',
            f'"content":"<0x{byte:02X}>","single_word":false,"lstrip":false,"rstrip":false,'
            '"normalized":false,"special":false',
        )
    return tokenizers.Tokenizer.from_str(state)


def word_piece() -> tokenizers.Tokenizer:
    """BERT's kind, whose decoder looks at neighbours to place spaces."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[CLS]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT[:3], trainer)
    return tokenizer


def compiled(tokenizer: tokenizers.Tokenizer, eos: str, bos: str = "") -> CompiledModel:
    """A compile.json around a tokenizer."""
    eos_token_id = tokenizer.token_to_id(eos)
    assert eos_token_id is not None
    return CompiledModel(
        family="llama",
        converter_version=1,
        recipe="q8",
        target="cpu",
        context_length=2048,
        vocab_size=tokenizer.get_vocab_size(),
        layers=2,
        kv_heads=1,
        head_dim=8,
        kv_dtype="float32",
        parameters=1000,
        weights_bytes=1000,
        source_format="safetensors",
        quantization="q8",
        hidden_size=16,
        heads=2,
        feed_forward_length=32,
        rope_theta=10000.0,
        norm_epsilon=1e-5,
        bos_token_id=tokenizer.token_to_id(bos) if bos else None,
        eos_token_ids=(eos_token_id,),
        bos_token=bos,
        eos_token=eos,
    )


def save(folder: Path, tokenizer: tokenizers.Tokenizer, template: str = CHATML) -> Path:
    """Write the files that `Tokenizer` reads into `folder`."""
    tokenizer.save(str(folder / TOKENIZER_FILE))
    if template:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return folder

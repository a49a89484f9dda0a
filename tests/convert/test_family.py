from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ohmygpu.convert.family import (
    ALIASES,
    check_supported,
    compile_key,
    family,
    supported_model_types,
)
from ohmygpu.core.errors import UnsupportedModel

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


OWN_CODE = {"AutoModelForCausalLM": "modeling_mine.MyLlamaForCausalLM"}


def test_the_files_of_the_package_are_the_support_matrix() -> None:
    folder = Path(__file__).parents[2] / "converters"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert set(supported_model_types()) == files | set(ALIASES)
    assert supported_model_types() == sorted(supported_model_types())


@pytest.mark.parametrize("name", [n for n in supported_model_types() if n not in ALIASES])
def test_every_family_keeps_the_contract(name: str) -> None:
    module = family(name)
    assert callable(module.Config.read)
    assert callable(module.weights)
    assert callable(module.ignored)
    assert callable(module.build)
    assert module.__doc__


def test_a_supported_config_gives_its_family() -> None:
    assert check_supported(LLAMA) == "llama"
    assert check_supported({"model_type": "llama"}) == "llama"
    assert check_supported({"model_type": "code_llama"}) == "llama"


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llama", "LlamaForCausalLM"),
        ("code_llama", "LlamaForCausalLM"),
        ("phi3", "Phi3ForCausalLM"),
        ("gpt_neox", "GPTNeoXForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
    ],
)
def test_code_beside_a_model_that_is_known_by_itself_is_not_needed(
    model_type: str, architecture: str
) -> None:
    config = {"model_type": model_type, "architectures": [architecture], "auto_map": OWN_CODE}
    assert check_supported(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]}, r"rwkv \(RwkvForCausalLM\)"),
        ({"model_type": "mamba"}, "architecture mamba has no converter; supported: .*llama"),
        ({}, "architecture unknown has no converter"),
        ({"model_type": ["llama"]}, "has no converter"),
        ({"model_type": "__init__"}, "architecture __init__ has no converter"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "neither generates text"),
        ({"model_type": "brumby", "auto_map": OWN_CODE}, "AutoModelForCausalLM.*never run"),
        (LLAMA | {"architectures": ["MyLlamaForCausalLM"], "auto_map": OWN_CODE}, "never run"),
        (LLAMA | {"quantization_config": {"quant_method": "hqq"}}, r"not read \(hqq;.*GGUF"),
    ],
)
def test_what_has_no_converter_is_refused_and_what_has_one_is_listed(
    config: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        check_supported(config)


def test_a_key_is_stable_and_sees_every_ingredient() -> None:
    digests = ["a" * 64, "b" * 64]
    key = compile_key(digests, "llama", "q8", "cpu")
    assert len(key) == 64
    assert key == compile_key(reversed(digests), "llama", "q8", "cpu")
    others = {
        compile_key(digests[:1], "llama", "q8", "cpu"),
        compile_key(digests, "phi", "q8", "cpu"),
        compile_key(digests, "llama", "q4", "cpu"),
        compile_key(digests, "llama", "q8", "cuda"),
    }
    assert len(others | {key}) == 5


def test_a_new_converter_version_is_a_new_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compile_key(["a"], "llama", "q8", "cpu")
    monkeypatch.setattr("ohmygpu.convert.family.CONVERTER_VERSION", 10**6)
    assert compile_key(["a"], "llama", "q8", "cpu") != before


def test_asking_what_is_supported_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ohmygpu.convert import family, recipes; family.supported_model_types();"
        "family.compile_key(['a'], 'llama', 'q8', 'cpu'); "
        "recipes.default_recipe(True, recipes.target('cpu'), 1);"
        "heavy = {'numpy', 'onnx', 'transformers', 'onnxruntime', 'torch', 'converters'};"
        "print(*heavy & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert found.stdout.strip() == b""

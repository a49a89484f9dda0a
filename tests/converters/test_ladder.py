"""Every family against transformers, on tiny models with random weights: `tests/ladder`."""

from __future__ import annotations

import re

import pytest

from ohmygpu.convert.family import ALIASES, supported_model_types
from tests.ladder import encoders
from tests.ladder.checks import CHECKS, Bench, distance
from tests.ladder.models import Case, all_cases, cases, families, golden
from tests.ladder.table import PAGE

CASES = all_cases()
BENCHES: dict[str, Bench] = {}


@pytest.fixture
def bench(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The case's graphs, shared by its checks."""
    if str(case) not in BENCHES:
        BENCHES[str(case)] = Bench(case, tmp_path_factory.mktemp(str(case)))
    return BENCHES[str(case)]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_transformers_computes(case: Case, check: str, bench: Bench) -> None:
    error = CHECKS[check].measure(bench)
    assert error is None or error <= CHECKS[check].tolerance


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES, ids=str)
def test_transformers_loads_the_same_files_and_gives_the_golden_logits(case: Case) -> None:
    assert distance(golden(case.family)[case.name], case.reference()) <= 1e-5


def test_a_changed_weight_shows(tmp_path_factory: pytest.TempPathFactory) -> None:
    case = Case("llama", "grouped", cases("llama")["grouped"].config)
    changed = next(name for name in case.arrays if name.endswith("layers.1.mlp.up_proj.weight"))
    case.arrays[changed] *= 1.05
    error = CHECKS["prefill"].measure(Bench(case, tmp_path_factory.mktemp("changed")))
    assert error is not None
    assert error > 10 * CHECKS["prefill"].tolerance


def test_every_decoder_family_has_cases() -> None:
    assert set(families()) <= set(supported_model_types())


def test_the_page_lists_every_family_and_every_check_and_none_fails() -> None:
    page = PAGE.read_text(encoding="utf-8")
    decoders, _, embedders = page.partition("## Embedding models")
    assert re.findall(r"^\| `(\w+)`", decoders, re.MULTILINE) == families()
    assert re.findall(r"^\| `\w+` \| `(\w+)`", embedders, re.MULTILINE) == list(encoders.CASES)
    header = next(line for line in page.splitlines() if line.startswith("| family"))
    columns = ["family", "cases", "names", *CHECKS, "GGUF", "chat template"]
    assert header.strip("| ").split(" | ") == columns
    assert set(re.findall(r"`([\w-]+)` is built as", decoders)) == set(ALIASES)
    assert "FAILS" not in page
    assert "NO |" not in page

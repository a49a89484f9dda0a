"""docs/families.md: families by checks, each cell the largest error over the family's cases."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from ohmygpu.convert.family import ALIASES

from . import encoders, gguf, templates
from .checks import CHECKS, Bench, distance
from .models import Case, all_cases, families, golden

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

_HEAD = """# Architectures

One file in `converters/` for each. Every architecture is checked against transformers, number by
number, on tiny models with random weights; `python -m tests.ladder table` writes this page, and
`tests/run` repeats the checks.

**names**: transformers loads the same files with nothing left over or missing. A number is the
largest error of any logit of any case, relative to the largest logit; a dash means that the check
does not apply. **GGUF**: the same, between a model's GGUF file and its SafeTensors files; Mistral's
say that they are `llama`. **chat template**: how templates of the family's models are built that
know tools, rendered as transformers renders them, with tools, calls and results; a template comes
from the model's own files, whatever its architecture.

"""
_NONE = "\N{EN DASH}"


def page() -> str:
    """The page, made by running every check of every case, transformers included."""
    worst: dict[str, dict[str, float]] = {name: {} for name in families()}
    names: dict[str, str] = dict.fromkeys(worst, "yes")
    count = dict.fromkeys(worst, 0)
    for case in all_cases():
        count[case.family] += 1
        if distance(golden(case.family)[case.name], case.reference()) > 1e-5:
            names[case.family] = "NO"
        for check, error in _errors(case).items():
            worst[case.family][check] = max(error, worst[case.family].get(check, 0.0))
    columns = ["family", "cases", "names", *CHECKS, "GGUF", "chat template"]
    lines = [_row(columns), _row(["---"] * len(columns))]
    for name in families():
        cells = [_cell(worst[name].get(check), CHECKS[check].tolerance) for check in CHECKS]
        cells.append(_cell(gguf.error_of_family(name), gguf.TOLERANCE))
        cells.append(templates.cell(name) or _NONE)
        lines.append(_row([f"`{name}`", str(count[name]), names[name], *cells]))
    return _HEAD + "\n".join(lines) + "\n\n" + _aliases() + encoders.section()


def _aliases() -> str:
    names = (f"`{name}` is built as `{family}`" for name, family in sorted(ALIASES.items()))
    return f"The same network under another `model_type`: {', '.join(names)}.\n\n"


def _errors(case: Case) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        bench = Bench(case, Path(folder))
        found = {name: check.measure(bench) for name, check in CHECKS.items()}
    return {name: error for name, error in found.items() if error is not None}


def _cell(error: float | None, tolerance: float) -> str:
    if error is None:
        return _NONE
    return f"{error:.0e}" if error <= tolerance else f"FAILS {error:.0e}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"

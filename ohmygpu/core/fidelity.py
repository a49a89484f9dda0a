"""How close a compiled graph is to its own weights in float32: Fidelity, and fidelity.json.

`fidelity.json` lies beside compile.json. It is the only file of a compiled model that may change
after the compile: nothing that serves reads it, and it names no bytes of the model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .files import write_whole
from .records import GRAPH_FILE, CompiledModel

FIDELITY_FILE = "fidelity.json"
TEXT_VERSION = 1
"""The text of `runtime_onnx/fidelity_text`; numbers of different versions do not compare."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """One graph beside its weights in float32, over `tokens` positions of the shipped text.

    Divergences are KL(float32 ‖ graph) of the next-token distribution, in nats; `top1_agreement` is
    the share of positions where both find the same token likeliest; perplexities are exp(mean
    negative log-likelihood of the text's own next token).
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float  # 0 to 1
    perplexity: float
    reference_perplexity: float  # of the same weights in float32
    tokens: int  # positions compared
    text_version: int
    execution_provider: str  # what the graph ran on; float32 always runs on the CPU
    measured_at: str  # RFC 3339, UTC

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Fidelity:
        """Inverse of `asdict`; ignores fields of later versions. Raises KeyError, TypeError."""
        return Fidelity(**{name: data[name] for name in Fidelity.__dataclass_fields__})


def graph_files(compiled: CompiledModel) -> list[str]:
    """Names of the graphs of a compiled model, the one that decodes first."""
    others = (name for name in compiled.files if name.endswith(".onnx") and name != GRAPH_FILE)
    return [GRAPH_FILE, *sorted(others)]


def save_fidelity(folder: Path, found: Mapping[str, Fidelity]) -> None:
    """Write fidelity.json (graph's file name → Fidelity) at once; durable on return."""
    data = {name: asdict(fidelity) for name, fidelity in found.items()}
    text = json.dumps({"graphs": data}, indent=1, sort_keys=True) + "\n"
    write_whole(folder / FIDELITY_FILE, text.encode("utf-8"))


def load_fidelity(folder: Path) -> dict[str, Fidelity]:
    """What was measured of the compiled model in `folder`, by graph; {} when nothing was.

    A damaged file counts as nothing, with a warning in the log: measuring again replaces it.
    """
    path = folder / FIDELITY_FILE
    try:
        graphs = json.loads(path.read_text(encoding="utf-8"))["graphs"]
        return {name: Fidelity.from_dict(entry) for name, entry in graphs.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s in %s is damaged (%s)", FIDELITY_FILE, folder.name, error)
        return {}

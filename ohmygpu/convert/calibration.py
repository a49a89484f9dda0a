"""Second moments of layer inputs: the graphs that show these inputs, and what became of them.

`write_parts` puts graphs beside a float32 compile, each a part of model.onnx that ends with the
inputs of some linear layers; `runtime_onnx.calibrate` runs them over text and leaves the moments
in a folder; `Calibration` reads that folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx

from ohmygpu.core.records import CALIBRATION_INDEX, CALIBRATION_PARTS, GRAPH_FILE

from .error_feedback import Feedback

_BUDGET_BYTES = 768 << 20  # of moments that one part's inputs have
LinearInputs = Mapping[str, tuple[str, int]]  # weight -> (the value it multiplies, columns)


class Calibration:
    """What is known of the inputs of the weights: by weight name, made ready one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, str] = json.loads(
            (folder / CALIBRATION_INDEX).read_text(encoding="utf-8")
        )
        self._ready: tuple[str, Feedback] | None = None

    def feedback(self, weight: str) -> Feedback | None:
        """The inputs that the matrix `weight` multiplies; None where nothing is known of them."""
        file = self._files.get(weight)
        if file is None:
            return None
        if self._ready is None or self._ready[0] != file:
            self._ready = None  # free the last one first
            with np.load(self._folder / file) as arrays:
                self._ready = file, Feedback(arrays["moments"], arrays["squares"])
        return self._ready[1]


def write_parts(folder: Path, inputs: LinearInputs) -> None:
    """Write the graphs that show the inputs of the linear layers of `folder`'s model.onnx.

    And their list: [{"graph": file, "values": {value: {"columns": K, "weights": [names]}}}]. The
    moments of all inputs together can be many times what fits in memory; those of a part do.
    """
    model = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    listed = []
    for number, values in enumerate(_groups(inputs)):
        name = f"calibrate-{number}.onnx"
        (folder / name).write_bytes(_part(model, list(values)).SerializeToString())
        listed.append({"graph": name, "values": values})
    (folder / CALIBRATION_PARTS).write_text(json.dumps(listed), encoding="utf-8")


def _groups(inputs: LinearInputs) -> Iterator[dict[str, dict[str, object]]]:
    """The inputs in the graph's order, in groups whose moments fit in memory."""
    weights: dict[str, list[str]] = {}
    columns: dict[str, int] = {}
    for weight, (value, width) in inputs.items():
        weights.setdefault(value, []).append(weight)
        columns[value] = width
    group: dict[str, dict[str, object]] = {}
    used = 0
    for value, names in weights.items():
        size = 4 * columns[value] ** 2
        if group and used + size > _BUDGET_BYTES:
            yield group
            group, used = {}, 0
        group[value] = {"columns": columns[value], "weights": names}
        used += size
    if group:
        yield group


def _part(model: onnx.ModelProto, values: list[str]) -> onnx.ModelProto:
    """A graph that computes `values` and nothing that they do not need."""
    needed, nodes = set(values), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(name for name in node.input if name)
    part = onnx.ModelProto()
    part.CopyFrom(model)
    del part.graph.node[:]
    part.graph.node.extend(reversed(nodes))
    for entries in (part.graph.initializer, part.graph.input):
        kept = [entry for entry in entries if entry.name in needed]
        del entries[:]
        entries.extend(kept)
    del part.graph.output[:]
    for value in values:
        part.graph.output.append(
            onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None)
        )
    return part

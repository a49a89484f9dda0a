from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from ohmygpu.convert.graph import DATA_FILE, Graph
from ohmygpu.core.records import GRAPH_FILE


def build(folder: Path) -> None:
    """y = x @ big.T + small, the small constant through an optional input of its own."""
    folder.mkdir(exist_ok=True)
    with Graph(folder) as graph:
        x = graph.input("x", np.float32, ["B", 512])
        graph.output("y", np.float32, ["B", 4])
        rows = [np.full((1, 512), value, np.float32) for value in (1, 2, 3, 4)]
        big = graph.weight("big", np.float32, (4, 512), rows)
        small = graph.default_input("small", np.ones(4, np.float32))
        inputs = [x, big]
        y = graph.node("/product/FusedMatMul", inputs, domain="com.microsoft", transB=1)
        graph.node("/sum/Add", [y, small], ["y"])
        graph.save("1")


def session(folder: Path) -> ort.InferenceSession:
    return ort.InferenceSession(folder / GRAPH_FILE, providers=["CPUExecutionProvider"])


def test_a_graph_computes_what_was_written(tmp_path: Path) -> None:
    build(tmp_path)
    (y,) = session(tmp_path).run(None, {"x": np.ones((2, 512), np.float32)})
    np.testing.assert_array_equal(y, np.array([[513, 1025, 1537, 2049]] * 2, np.float32))


def test_an_optional_input_replaces_its_default(tmp_path: Path) -> None:
    build(tmp_path)
    feeds = {"x": np.zeros((1, 512), np.float32), "small": np.arange(4, dtype=np.float32)}
    np.testing.assert_array_equal(session(tmp_path).run(None, feeds)[0], feeds["small"][None])


def test_the_same_calls_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(tmp_path / name)
    for file in (GRAPH_FILE, DATA_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_weights_lie_in_one_aligned_file_beside_a_small_graph(tmp_path: Path) -> None:
    with Graph(tmp_path) as graph:
        sizes = (2000, 300, 4096, 1025, 1 << 20)
        for index, size in enumerate(sizes):
            graph.constant(f"w{index}", np.full(size, index, np.uint8))
        graph.save("1")
    model = onnx.load(tmp_path / GRAPH_FILE, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert not stored["w1"].external_data  # small: inside
    data = (tmp_path / DATA_FILE).read_bytes()
    for name, size in (("w0", 2000), ("w2", 4096), ("w3", 1025), ("w4", 1 << 20)):
        place = {entry.key: entry.value for entry in stored[name].external_data}
        offset = int(place["offset"])
        assert place["location"] == DATA_FILE
        assert offset % (4096 if size >= 4096 else 64) == 0
        assert data[offset : offset + size] == bytes([int(name[1:])]) * size
    assert (tmp_path / GRAPH_FILE).stat().st_size < 2000


def test_an_alias_shows_the_same_bytes_in_another_shape(tmp_path: Path) -> None:
    values = np.arange(4096, dtype=np.uint8).reshape(64, 2, 32)
    with Graph(tmp_path) as graph:
        graph.constant("blocks", values)
        graph.output("y", np.uint8, [64, 64])
        rows = graph.alias("rows", "blocks", np.uint8, (64, 64))
        graph.node("/Identity", [rows], ["y"])
        size = graph.weights_bytes
        graph.save("1")
    assert size == values.nbytes
    np.testing.assert_array_equal(session(tmp_path).run(None, {})[0], values.reshape(64, 64))


def test_parts_that_do_not_fill_the_shape_are_refused(tmp_path: Path) -> None:
    with Graph(tmp_path) as graph, pytest.raises(ValueError, match="w: 8 bytes written, 12"):
        graph.weight("w", np.float32, (3,), [np.zeros(2, np.float32)])


def test_a_name_taken_twice_is_refused(tmp_path: Path) -> None:
    with Graph(tmp_path) as graph:
        graph.constant("w", np.zeros(1, np.float32))
        with pytest.raises(ValueError, match="w is used twice"):
            graph.constant("w", np.zeros(1, np.float32))

"""An ONNX graph written as it is built: nodes in memory, weights straight to one file on disk.

The protobuf (`model.onnx`) holds the nodes and the smallest constants only; every weight goes to
`model.onnx.data` as soon as it is known, so the memory needed is that of one tensor. The same
calls give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ohmygpu.core import files
from ohmygpu.core.records import GRAPH_FILE

DATA_FILE = GRAPH_FILE + ".data"
"""The data file of `model.onnx`; other graphs' are named likewise."""

_OPSETS = {"": 23, "com.microsoft": 1}
_IR_VERSION = 11
_INLINE_BYTES = 1024  # larger constants go to the data file
_PAGE_BYTES = 4096  # alignment of tensors worth mapping
_SMALL_BYTES = 64  # alignment of the others: a cache line

Shape = Sequence[int | str]


class Graph:
    """Writes a graph and its `.data` into `folder`. Use as a context manager.

    Values are named by strings. A node is named by its path in the model, such as
    `/model/layers.0/attn/o_proj/MatMulNBits`; its outputs are `<path>/output_<i>`.
    """

    def __init__(self, folder: Path, name: str = GRAPH_FILE) -> None:
        self.folder = folder
        self.name = name
        self._data_file = f"{name}.data"
        self._data = (folder / self._data_file).open("wb")
        self._offset = 0
        self._shared: dict[Path, str] = {}  # files of the source → their names in the folder
        self._shared_bytes = 0
        self._nodes: list[onnx.NodeProto] = []
        self._names: set[str] = set()
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    @property
    def weights_bytes(self) -> int:
        """Bytes written to the data file, and used of the files shared with the source, so far."""
        return self._offset + self._shared_bytes

    def input(self, name: str, dtype: np.dtype[Any] | type, shape: Shape) -> str:
        """Declare a graph input; returns its name."""
        self._inputs.append(helper.make_tensor_value_info(name, _onnx_type(dtype), list(shape)))
        return name

    def output(self, name: str, dtype: np.dtype[Any] | type, shape: Shape) -> str:
        """Declare a graph output, to be produced by a node with this output name."""
        self._outputs.append(helper.make_tensor_value_info(name, _onnx_type(dtype), list(shape)))
        return name

    def node(
        self,
        path: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node; returns its first output.

        The last part of `path` is the operator. An empty input or output name leaves an optional
        one out.
        """
        self._take_name(path)
        names = list(outputs) if outputs is not None else [f"{path}/output_0"]
        operator = path.rsplit("/", 1)[-1].split(".", 1)[0]
        self._nodes.append(
            helper.make_node(operator, list(inputs), names, path, domain=domain, **attributes)
        )
        return names[0]

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """A constant held in memory: inline when small, else in the data file."""
        array = np.ascontiguousarray(array)
        if array.nbytes > _INLINE_BYTES:
            return self.weight(name, array.dtype, array.shape, [array])
        self._take_name(name)
        self._initializers.append(numpy_helper.from_array(array, name))
        return name

    def weight(
        self, name: str, dtype: np.dtype[Any] | type, shape: Sequence[int], parts: Iterable[Any]
    ) -> str:
        """A constant streamed to the data file: `parts` are arrays that follow each other.

        Raises ValueError when the parts do not add up to the shape.
        """
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        self._align(_PAGE_BYTES if nbytes >= _PAGE_BYTES else _SMALL_BYTES)
        start = self._offset
        for part in parts:
            array = np.ascontiguousarray(part, dtype=dtype)
            self._data.write(array.reshape(-1).view(np.uint8).data if array.size else b"")
            self._offset += array.nbytes
        if self._offset - start != nbytes:
            raise ValueError(f"{name}: {self._offset - start} bytes written, {nbytes} expected")
        return self._external(name, dtype, shape, self._data_file, start, nbytes)

    def share(self, path: Path) -> str | None:
        """The name that a file of the source has in the folder from now on, its bytes not copied.

        None where the file system cannot do that. ONNX Runtime reads weights from other files, but
        only of the graph's own folder, and follows no symbolic links out of it.
        """
        if path not in self._shared:
            name = f"source-{len(self._shared) + 1}.safetensors"
            if files.share(path, self.folder / name) is None:
                return None
            self._shared[path] = name
        return self._shared[path]

    def shared_weight(
        self, name: str, dtype: np.dtype[Any] | type, shape: Sequence[int], file: str, offset: int
    ) -> str:
        """A constant whose bytes lie in `file`, which `share` named."""
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        self._shared_bytes += nbytes
        return self._external(name, dtype, shape, file, offset, nbytes)

    def alias(self, name: str, of: str, dtype: np.dtype[Any] | type, shape: Sequence[int]) -> str:
        """The bytes of the weight `of` once more, as another constant with another shape."""
        original = next(item for item in self._initializers if item.name == of)
        place = {entry.key: entry.value for entry in original.external_data}
        offset, nbytes = int(place["offset"]), int(place["length"])
        return self._external(name, dtype, shape, place["location"], offset, nbytes)

    def reshape(self, name: str, shape: Sequence[int]) -> None:
        """Give the constant `name` another shape of as many elements."""
        tensor = next(item for item in reversed(self._initializers) if item.name == name)
        if prod(tensor.dims) != prod(shape):
            raise ValueError(f"{name} has {list(tensor.dims)} elements, not {list(shape)}")
        tensor.dims[:] = [int(size) for size in shape]

    def default_input(self, name: str, array: NDArray[Any]) -> str:
        """An input that may be left out: `array` is then its value."""
        self.input(name, array.dtype, [f"{name}_dim" for _ in array.shape])
        return self.constant(name, array)

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        """The nodes so far, in order."""
        return self._nodes

    @property
    def constants(self) -> Mapping[str, onnx.TensorProto]:
        """The constants so far, by name."""
        return {tensor.name: tensor for tensor in self._initializers}

    @property
    def inputs(self) -> Sequence[onnx.ValueInfoProto]:
        """The inputs so far."""
        return self._inputs

    @property
    def outputs(self) -> Sequence[onnx.ValueInfoProto]:
        """The outputs so far."""
        return self._outputs

    @property
    def used_bytes(self) -> int:
        """Bytes of the constants in data files, whichever graph wrote them."""
        places = {
            tuple(sorted((entry.key, entry.value) for entry in tensor.external_data))
            for tensor in self._initializers
        }
        return sum(int(dict(place).get("length", 0)) for place in places)

    def take_signature(self, other: Graph) -> None:
        """Give this graph the inputs and outputs of `other`, a graph in the same folder."""
        self._inputs.extend(other.inputs)
        self._outputs.extend(other.outputs)

    def take_constant(self, tensor: onnx.TensorProto) -> None:
        """Use a constant of another graph in the same folder; its bytes stay where they are."""
        self._take_name(tensor.name)
        self._initializers.append(tensor)

    def take_node(self, node: onnx.NodeProto) -> None:
        """Add a node as it is."""
        self._take_name(node.name)
        self._nodes.append(node)

    def save(self, producer_version: str) -> None:
        """Write the graph; both files are complete then (making them durable is the store's)."""
        graph = helper.make_graph(
            self._nodes, "model", self._inputs, self._outputs, self._initializers
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=_IR_VERSION,
            producer_name="ohmygpu",
            producer_version=producer_version,
        )
        self._data.flush()
        (self.folder / self.name).write_bytes(model.SerializeToString(deterministic=True))

    def _external(
        self,
        name: str,
        dtype: np.dtype[Any] | type,
        shape: Sequence[int],
        file: str,
        start: int,
        nbytes: int,
    ) -> str:
        self._take_name(name)
        tensor = TensorProto(
            name=name,
            data_type=_onnx_type(dtype),
            dims=[int(size) for size in shape],
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", file), ("offset", start), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers.append(tensor)
        return name

    def _align(self, alignment: int) -> None:
        padding = -self._offset % alignment
        self._data.write(b"\0" * padding)
        self._offset += padding

    def _take_name(self, name: str) -> None:
        if name in self._names:
            raise ValueError(f"{name} is used twice in the graph")
        self._names.add(name)


def _onnx_type(dtype: np.dtype[Any] | type) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

"""A quantised SafeTensors checkpoint as a `Source`: layers under the names of their weights.

Where the files hold `q_proj.qweight`, `q_proj.scales`, … a family sees `q_proj.weight` with its
logical shape, and nothing of how it is stored. Tensors that are not quantised (norms, embeddings,
modules left out by the quantiser) pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .checkpoint import Checkpoint, read_checkpoint
from .checkpoint_compressed import compressed_matrices
from .checkpoint_float8 import ACTIVATION_SUFFIXES, float8_matrices
from .checkpoint_gptq import awq_matrices, gptq_matrices
from .checkpoint_integers import StoredMatrix
from .checkpoint_mxfp4 import mxfp4_matrices
from .safetensors import SafetensorsSource
from .source import (
    BlockLayout,
    Float32,
    QuantizedBlocks,
    Source,
    SourceFormat,
    TensorInfo,
    read_whole,
)

_READERS: Mapping[str, Callable[[SafetensorsSource, Checkpoint], Sequence[StoredMatrix]]] = {
    "gptq": gptq_matrices,
    "awq": awq_matrices,
    "fp8": float8_matrices,
    "compressed-tensors": compressed_matrices,
    "mxfp4": mxfp4_matrices,
}
_QUANTISED_SUFFIXES = (".qweight", ".weight_packed", ".weight_scale_inv")


def open_checkpoint(stored: SafetensorsSource) -> Source:
    """`stored` itself, or a view of it that dequantises where its config says it is quantised.

    Raises UnsupportedModel for a method that is not read, CorruptFile for layers whose parts do
    not fit each other; `stored` is closed then.
    """
    try:
        checkpoint = read_checkpoint(stored.config)
        if checkpoint is not None:
            return CheckpointSource(stored, checkpoint)
        _check_plain(stored)
    except BaseException:
        stored.close()
        raise
    return stored


def _check_plain(stored: SafetensorsSource) -> None:
    for name in stored.tensors:
        if name.endswith(_QUANTISED_SUFFIXES):
            raise UnsupportedModel(
                f"the weights are quantised ({name[:80]}) but config.json does not say how (it has "
                "no quantization_config); pull the original weights or a GGUF file instead",
                tensor=name,
            )


class CheckpointSource:
    """Source over a quantised checkpoint; see `source.Source` for its methods."""

    format: SourceFormat = "safetensors"

    def __init__(self, stored: SafetensorsSource, checkpoint: Checkpoint) -> None:
        self._stored = stored
        self.config: dict[str, Any] = stored.config
        self.files = stored.files
        self.total_bytes = stored.total_bytes
        self.quantization = checkpoint.label
        found = _READERS[checkpoint.method](stored, checkpoint)
        self._matrices = {matrix.name: matrix for matrix in found}
        if not self._matrices:
            raise CorruptFile(
                f"the config says that the weights are quantised ({checkpoint.label}), and no "
                "tensor of them is; the files do not belong to this config"
            )
        hidden = {part for matrix in found for part in matrix.parts}
        self.tensors: dict[str, TensorInfo] = {
            name: info
            for name, info in stored.tensors.items()
            if name not in hidden and not name.endswith(ACTIVATION_SUFFIXES)
        }
        for name, matrix in self._matrices.items():
            if name in self.tensors:
                raise CorruptFile(
                    f"{name[:200]} is in the files twice, quantised and not; pull the model again",
                    tensor=name,
                )
            self.tensors[name] = TensorInfo(name, matrix.shape, matrix.dtype)
        self._current: StoredMatrix | None = None

    def read(self, name: str) -> Float32:
        """A whole tensor as float32."""
        return self._stored.read(name) if name not in self._matrices else read_whole(self, name)

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        """Rows start:stop as float32."""
        matrix = self._matrix(name)
        if matrix is None:
            return self._stored.read_rows(name, start, stop)
        return matrix.read_rows(start, stop)

    def block_layout(self, name: str) -> BlockLayout | None:
        """The layout of a layer stored as integers, None for others."""
        matrix = self._matrix(name)
        return None if matrix is None else matrix.layout()

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedBlocks | None:
        """Codes, scales and zero points as stored, None for a tensor that has none."""
        matrix = self._matrix(name)
        if matrix is None:
            return None
        return matrix.blocks(start, matrix.shape[0] if stop is None else stop)

    def close(self) -> None:
        """Close the files; idempotent."""
        self._stored.close()

    def _matrix(self, name: str) -> StoredMatrix | None:
        """The layer of this name; the one before it lets go of its memory."""
        matrix = self._matrices.get(name)
        if matrix is not None and matrix is not self._current:
            if self._current is not None:
                self._current.release()
            self._current = matrix
        return matrix

"""What `quantization_config` says of a SafeTensors checkpoint. Standard library only.

Quantisers store a linear layer as several tensors beside each other (codes, scales, zero points)
and describe them in `config.json`. Those described here are read by `checkpoint_source`; all
others are refused by name, before their weights are fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

READABLE = "fp8, mxfp4, gptq (4 and 8 bits), awq (gemm) and compressed-tensors (fp8, int4, int8)"

_INTEGER_BITS = (4, 8)
_COMPRESSED_FORMATS = (
    "dense",
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "naive-quantized",
    "pack-quantized",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How the linear layers of a quantised checkpoint are stored.

    `group` is how many weights of a row share a scale (0 = the whole row) where the tensors do not
    tell; `zero_point_shift` is what the stored zero points lack (GPTQ's first format: 1).
    """

    method: str  # gptq | awq | fp8 | compressed-tensors | mxfp4
    bits: int  # of most weights
    group: int = 0
    zero_point_shift: int = 0
    block_shape: tuple[int, int] | None = None  # of fp8 scales, (rows, columns)
    has_integers: bool = False  # codes with scales, which can be kept as they are

    @property
    def label(self) -> str:
        """As shown to users: "gptq-int4", "fp8"."""
        if self.method in ("fp8", "mxfp4"):
            return self.method
        return f"{self.method}-{'int' if self.has_integers else 'fp'}{self.bits}"


def read_checkpoint(config: Mapping[str, Any]) -> Checkpoint | None:
    """How the checkpoint with this `config.json` is quantised; None when it is not.

    Raises UnsupportedModel naming a method or format that is not read, CorruptFile for a
    `quantization_config` that contradicts itself.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise CorruptFile("the model's config has a quantization_config that is not an object")
    method = str(settings.get("quant_method") or "unknown method")
    read = _METHODS.get(method.lower())
    if read is None:
        if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
            method = "bitsandbytes"
        raise _refused(method, f"these can be read: {READABLE}")
    return read(settings)


def keeps_blocks(config: Mapping[str, Any]) -> bool:
    """Whether the weights are stored as integers with scales, so that `exact` can keep them."""
    checkpoint = read_checkpoint(config)
    return checkpoint is not None and checkpoint.has_integers


def stored_bits(config: Mapping[str, Any]) -> int | None:
    """Bits of most weights of a quantised checkpoint; None when it is not quantised."""
    checkpoint = read_checkpoint(config)
    return None if checkpoint is None else checkpoint.bits


def _gptq(settings: Mapping[str, Any]) -> Checkpoint:
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        raise _refused(f"gptq, {layout} layout", "the layouts gptq and gptq_v2 can be read")
    bits = _bits(settings, "gptq")
    return Checkpoint(
        "gptq",
        bits,
        group=_group(settings),
        zero_point_shift=1 if layout == "gptq" else 0,
        has_integers=True,
    )


def _awq(settings: Mapping[str, Any]) -> Checkpoint:
    layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if settings.get("backend") == "llm-awq":
        layout = "llm-awq"
    if layout != "gemm":
        raise _refused(f"awq, {layout} layout", "the layout gemm can be read")
    bits = _bits(settings, "awq")
    if bits != 4:  # the only width for which the interleaving is defined
        raise _refused(f"awq, {bits} bits", "4 bits can be read")
    return Checkpoint("awq", bits, group=_group(settings), has_integers=True)


def _fp8(settings: Mapping[str, Any]) -> Checkpoint:
    if settings.get("expert_dtype") not in (None, "fp8"):
        raise _refused(f"fp8 with {settings['expert_dtype']} experts", "fp8 experts can be read")
    shape = settings.get("weight_block_size")
    if shape is None:
        return Checkpoint("fp8", 8)
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_positive, shape)):
        raise CorruptFile(
            f"the model's config has weight_block_size = {str(shape)[:40]}; two positive integers "
            "are needed"
        )
    return Checkpoint("fp8", 8, block_shape=(shape[0], shape[1]))


def _mxfp4(settings: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint("mxfp4", 4, has_integers=True)  # codes: twice its floats are integers


def _modelopt(settings: Mapping[str, Any]) -> Checkpoint:
    algorithm = str(settings.get("quant_algo"))
    if algorithm != "FP8":
        raise _refused(f"modelopt, {algorithm}", "FP8 can be read")
    return Checkpoint("fp8", 8)


def _compressed(settings: Mapping[str, Any]) -> Checkpoint:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CorruptFile("the model's quantization_config has no config_groups")
    if settings.get("transform_config"):
        raise _refused("compressed-tensors with transform_config", "without transforms it can be")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise _refused(f"compressed-tensors, {sparsity['format']}", "dense weights can be read")
    widths: set[tuple[int, bool]] = set()
    shape, group_size = None, 0
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        layout = group.get("format") if isinstance(group, Mapping) else None
        layout = layout or settings.get("format")
        if not isinstance(weights, Mapping):
            raise CorruptFile("the model's quantization_config has a group without weights")
        bits, kind = weights.get("num_bits"), weights.get("type")
        if layout not in _COMPRESSED_FORMATS:
            known = ", ".join(_COMPRESSED_FORMATS)
            raise _refused(f"compressed-tensors, {layout} format", f"these can be read: {known}")
        if bits not in _INTEGER_BITS or (kind, bits) == ("float", 4):
            raise _refused(f"compressed-tensors, {bits}-bit {kind}", "fp8, int4, int8 can be read")
        widths.add((bits, kind == "int"))
        if weights.get("strategy") == "block":
            shape = weights.get("block_structure")
        group_size = group_size or _group(weights)
    bits, is_integer = min(widths)
    block_shape = (shape[0], shape[1]) if isinstance(shape, list) and len(shape) == 2 else None
    return Checkpoint(
        "compressed-tensors",
        bits,
        group=group_size,
        block_shape=block_shape,
        has_integers=is_integer,
    )


_METHODS = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
}


def _bits(settings: Mapping[str, Any], method: str) -> int:
    bits = settings.get("bits", settings.get("w_bit"))
    if bits not in _INTEGER_BITS or isinstance(bits, bool):
        raise _refused(f"{method}, {str(bits)[:20]} bits", "4 and 8 bits can be read")
    return int(bits)


def _group(settings: Mapping[str, Any]) -> int:
    """Weights that share a scale; 0 for whole rows (written -1)."""
    group = settings.get("group_size", settings.get("q_group_size"))
    if group in (None, -1, 0):
        return 0
    if not _is_positive(group):
        raise CorruptFile(
            f"the model's config has group_size = {str(group)[:40]}; a positive integer is needed"
        )
    return int(group)


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refused(what: str, readable: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the checkpoint is quantised in a way that is not read ({what[:80]}; {readable}); pull "
        "the original weights or a GGUF file of this model instead"
    )

"""Which files of a repository make a LoRA adapter, as PEFT saves one."""

from __future__ import annotations

from collections.abc import Collection

from .errors import UnsupportedModel
from .model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MAX_CONFIG_BYTES,
    Read,
    Selection,
    parse_json_object,
)


def select_adapter(
    names: Collection[str], variant: str | None, read: Read, where: str
) -> Selection:
    """The adapter in a folder with `names`; its `config` is the adapter's own.

    Raises UnsupportedModel when there is none, or none in SafeTensors.
    """
    if ADAPTER_CONFIG not in names:
        raise UnsupportedModel(
            f"{where} is not a LoRA adapter (it has no {ADAPTER_CONFIG}); give the repository or "
            "folder that PEFT saved"
        )
    if variant is not None:
        raise UnsupportedModel(
            f"an adapter has no variants; leave out {variant!r}, and choose the recipe with "
            "--recipe or after the model's name"
        )
    if ADAPTER_WEIGHTS not in names:
        pickled = next((name for name in sorted(names) if name == "adapter_model.bin"), None)
        what = f"only as {pickled!r}, a format that can run code" if pickled else "nowhere"
        raise UnsupportedModel(
            f"{where} has the adapter's weights {what}; {ADAPTER_WEIGHTS} is needed: save the "
            "adapter again with save_pretrained(..., safe_serialization=True)"
        )
    config = parse_json_object(read(ADAPTER_CONFIG, MAX_CONFIG_BYTES), ADAPTER_CONFIG, where)
    return Selection(
        filenames=(ADAPTER_CONFIG, ADAPTER_WEIGHTS),
        source_format="safetensors",
        variant=None,
        default_variant=None,
        config=config,
    )

"""Which files of an embedding model say how to make one vector of a text.

The layout is sentence-transformers': `modules.json` names the steps after the transformer, each
with a folder of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from .errors import CorruptFile, UnsupportedModel

MODULES_FILE = "modules.json"
LENGTH_FILE = "sentence_bert_config.json"
PROMPTS_FILE = "config_sentence_transformers.json"
DENSE_WEIGHTS = "model.safetensors"
MAX_MODULES_BYTES = 1 << 20


def read_modules(data: bytes, where: str) -> list[tuple[str, str]]:
    """(class, folder) of each step in `modules.json`; the folder of the transformer is "".

    Raises CorruptFile when it is not a list of steps.
    """
    try:
        entries = json.loads(data)
        return [(entry["type"].rpartition(".")[2], entry.get("path") or "") for entry in entries]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise CorruptFile(f"{MODULES_FILE} of {where} is damaged; pull the model again") from error


def sentence_files(
    names: Collection[str], read: Callable[[str, int], bytes], where: str
) -> list[str]:
    """The files among `names` that describe an embedding model; empty when it is none.

    Raises UnsupportedModel when a step has its weights only in a format that can run code.
    """
    if MODULES_FILE not in names:
        return []
    found = [name for name in (MODULES_FILE, LENGTH_FILE, PROMPTS_FILE) if name in names]
    for kind, folder in read_modules(read(MODULES_FILE, MAX_MODULES_BYTES), where):
        if not folder:
            continue
        weights = f"{folder}/{DENSE_WEIGHTS}"
        if kind == "Dense" and weights not in names:
            raise UnsupportedModel(
                f"{where} has no {weights}: the weights of this step are missing, or in a format "
                "that can run code; look for a repository that has them as SafeTensors"
            )
        found += [name for name in (f"{folder}/config.json",) if name in names]
        if kind == "Dense":
            found.append(weights)
    return list(dict.fromkeys(found))

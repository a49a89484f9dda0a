"""Models that are damaged, lie or would run code: refused in one sentence, and nothing is left."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from ohmygpu.core.errors import OhMyGPUError
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import load_settings
from ohmygpu.install import collect_garbage, pull, remove
from tests.convert.gguf_files import write_gguf
from tests.convert.quantised_layers import gptq_layer
from tests.hub_server import HubServer
from tests.ladder.models import cases

NAME = "org/model"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
OWN_CODE = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def repo(hub: HubServer, monkeypatch: pytest.MonkeyPatch, request: Any) -> Path:
    """The folder of a repository with a sound tiny model, of a name of its own."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    folder: Path = hub.root / "org" / f"model-{abs(hash(request.node.nodeid)):x}"
    folder.mkdir(parents=True)
    cases("llama")["grouped"].save(folder)
    words = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *"abcdefgh"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    return folder


def reference(folder: Path) -> str:
    return f"org/{folder.name}"


def arrays() -> dict[str, Any]:
    return {name: array.copy() for name, array in cases("llama")["grouped"].arrays.items()}


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_header(folder: Path, change: Any) -> None:
    """The weights with `change(header)` in place of their header."""
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def offsets(start: int, end: int) -> Any:
    """A change that gives the last norm these offsets."""
    return lambda header: header | {NORM: header[NORM] | {"data_offsets": [start, end]}}


def shard(folder: Path, **weight_map: Any) -> None:
    """Two shards and their index; `weight_map` changes what that says."""
    tensors = arrays()
    names = sorted(tensors)
    files = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for name, part in files.items():
        save_file({tensor: tensors[tensor] for tensor in part}, folder / name)
    placed = {tensor: name for name, part in files.items() for tensor in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": placed | weight_map}))
    (folder / WEIGHTS).unlink()


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def with_nan(folder: Path) -> None:
    tensors = arrays()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, folder / WEIGHTS)


def gguf(folder: Path, damage: Any) -> None:
    """A GGUF file in place of the SafeTensors, its bytes changed by `damage`."""
    path = write_gguf(folder / "model.gguf")
    for other in folder.iterdir():
        if other != path:
            other.unlink()
    path.write_bytes(damage(path.read_bytes()))


def at(place: int, form: str, value: int) -> Any:
    """A change of a few bytes."""
    packed = struct.pack(form, value)
    return lambda data: data[:place] + packed + data[place + len(packed) :]


def unknown_block(data: bytes) -> bytes:
    """The first tensor with a block type that does not exist."""
    name = b"token_embd.weight"
    place = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    (dimensions,) = struct.unpack_from("<I", data, place)
    changed: bytes = at(place + 4 + 8 * dimensions, "<I", 250)(data)
    return changed


def shard_missing(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


# name → (how the repository is damaged, what the error says)
BEFORE_THE_DOWNLOAD: dict[str, tuple[Any, str]] = {
    "a missing shard": (shard_missing, r"names 'model-00002-of-00002.safetensors', which does not"),
    "an index that names a file outside": (
        lambda folder: shard(folder, **{NORM: "../x.safetensors"}),
        "unsafe name '../x.safetensors'",
    ),
    "an index that names an absolute path": (
        lambda folder: shard(folder, **{NORM: "/etc/x.safetensors"}),
        "unsafe name '/etc/x.safetensors'",
    ),
    "an index that names a pickle": (
        lambda folder: shard(folder, **{NORM: "pytorch_model.bin"}),
        "not a SafeTensors file",
    ),
    "pickles alone": (pickle_only, r"only as 'pytorch_model.bin', a format that can run code"),
    "code of its own": (
        lambda folder: configure(folder, model_type="own", auto_map=OWN_CODE),
        "code in the model's own repository",
    ),
    "an architecture nobody knows": (
        lambda folder: configure(folder, model_type="own", architectures=["OwnForCausalLM"]),
        r"architecture own \(OwnForCausalLM\) has no converter",
    ),
    "a quantisation nobody reads": (
        lambda folder: configure(folder, quantization_config={"quant_method": "aqlm"}),
        r"not read \(aqlm",
    ),
    "a GGUF architecture nobody knows": (
        lambda folder: gguf(
            folder, lambda data: data.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0clama")
        ),
        "clama",
    ),
}
AFTER_IT: dict[str, tuple[Any, str]] = {
    "offsets past the end": (
        lambda folder: rewrite_header(folder, offsets(2**40, 2**40 + 256)),
        "model.norm.weight",
    ),
    "offsets that overlap": (lambda folder: rewrite_header(folder, offsets(0, 256)), "starts at"),
    "a huge header": (
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "header claims 4611686018427387904 bytes",
    ),
    "a header of lists": (
        lambda folder: (folder / WEIGHTS).write_bytes(
            struct.pack("<Q", 3_000_008) + b'{"a":[' + b"[]," * 999_999 + b"[]]}" + b" "
        ),
        "not a JSON object with an entry for each tensor",
    ),
    "weights that are no numbers": (with_nan, "up_proj.weight holds NaN or infinity"),
    "shapes of another config": (
        lambda folder: configure(folder, intermediate_size=128),
        r"has shape \[96, 64\] where the config says \[128, 64\]",
    ),
    "more layers than tensors": (
        lambda folder: configure(folder, num_hidden_layers=10**9),
        "num_hidden_layers = 1000000000",
    ),
    "an index that promises other tensors": (
        lambda folder: shard(folder, **{"model.extra": "model-00001-of-00002.safetensors"}),
        "lacks the tensor 'model.extra'",
    ),
    "absurd counts in a GGUF": (
        lambda folder: gguf(folder, at(8, "<Q", 2**60)),
        "model.gguf",
    ),
    "an unknown block type in a GGUF": (lambda folder: gguf(folder, unknown_block), "250"),
    "half a GGUF": (
        lambda folder: gguf(folder, lambda data: data[: len(data) * 2 // 3]),
        "model.gguf",
    ),
}


def refused(folder: Path, message: str, **how: Any) -> None:
    """Pulling it fails with one sentence that matches, and leaves nothing installed."""
    store = Repository(load_settings().home)
    with pytest.raises(OhMyGPUError, match=message) as caught:
        pull(reference(folder), load_settings(), **how)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 900
    assert store.records() == []
    assert list(store.compiled_dir.glob("*")) == []
    collect_garbage(load_settings())
    assert list(store.blobs_dir.glob("*")) == []


@pytest.mark.parametrize("name", BEFORE_THE_DOWNLOAD)
def test_what_is_known_to_fail_is_refused_before_its_weights_move(
    name: str, repo: Path, hub: HubServer
) -> None:
    damage, message = BEFORE_THE_DOWNLOAD[name]
    damage(repo)
    refused(repo, message)
    fetched = [entry["path"] for entry in hub.requests.of(repo.name)]
    assert not [path for path in fetched if path.endswith((".safetensors", ".bin"))]


@pytest.mark.parametrize("name", AFTER_IT)
def test_files_that_lie_are_refused_when_they_are_read(name: str, repo: Path) -> None:
    damage, message = AFTER_IT[name]
    damage(repo)
    refused(repo, message)


def test_shards_install_as_one_model(repo: Path) -> None:
    shard(repo)
    record = pull(reference(repo), load_settings())
    assert sum(artifact.format == "safetensors" for artifact in record.artifacts) == 2


def test_a_gptq_checkpoint_keeps_its_integers(repo: Path) -> None:
    stored: dict[str, Any] = {}
    for name, array in arrays().items():
        if not name.endswith("_proj.weight"):
            stored[name] = array
            continue
        layer, _ = gptq_layer(array, 4, 32, act_order=True)
        prefix = name.removesuffix("weight")
        stored |= {f"{prefix}{part}": np.ascontiguousarray(data) for part, data in layer.items()}
    save_file(stored, repo / WEIGHTS)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    configure(repo, quantization_config=settings)
    record = pull(reference(repo), load_settings(), recipe="exact")
    folder = Repository(load_settings().home).compiled_path(record.compiled_key)
    assert json.loads((folder / "compile.json").read_text())["quantization"] == "gptq-int4"


def adapter(repo: Path, **changes: Any) -> Path:
    """A repository with a LoRA adapter for the model."""
    folder = repo.with_name(f"{repo.name}-lora")
    folder.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    rng = np.random.default_rng(0)
    tensors = {
        f"{module}.lora_{part}.weight": rng.normal(size=size).astype(np.float32)
        for part, size in (("A", (4, 64)), ("B", (64, 4)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "acme/zebra"}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def test_an_adapter_makes_a_model_of_its_own_that_is_removed_whole(repo: Path) -> None:
    settings = load_settings()
    store = Repository(settings.home)
    base = pull(reference(repo), settings)
    events: list[str] = []
    lora = reference(adapter(repo))
    merged = pull(
        reference(repo), settings, adapter=lora, sink=lambda event: events.append(event.message)
    )
    assert (merged.name, merged.source_ref) == (lora, reference(repo))
    assert merged.adapter is not None
    assert merged.adapter.source_ref == lora
    assert merged.compiled_key != base.compiled_key
    assert any("was trained on acme/zebra" in message for message in events)
    assert pull(reference(repo), settings, adapter=lora) == merged  # nothing to do
    blobs = {path.name for path in store.blobs_dir.iterdir()}
    own = {f"sha256-{file.sha256}" for file in merged.artifacts} - {
        f"sha256-{file.sha256}" for file in base.artifacts
    }
    assert len(own) == 2
    assert collect_garbage(settings).blobs == 0
    remove(lora, settings)
    assert {path.name for path in store.blobs_dir.iterdir()} == blobs - own
    assert store.records() == [base]


def test_an_adapter_that_cannot_be_merged_is_refused_before_weights_move(
    repo: Path, hub: HubServer
) -> None:
    folder = adapter(repo, layer_replication=[[0, 1]])
    refused(repo, "layer_replication", adapter=reference(folder))
    refused(repo, "exact cannot keep", adapter=reference(adapter_of(repo)), recipe="exact")
    fetched = [entry["path"] for entry in hub.requests.of(repo.name)]
    assert not [path for path in fetched if path.endswith(".safetensors")]
    command = f"omg model pull acme/zebra --adapter org/{folder.name}"
    refused(folder, f"pull it with the model.*{command}")


def adapter_of(repo: Path) -> Path:
    """The adapter made before, with nothing that cannot be merged."""
    folder = repo.with_name(f"{repo.name}-lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["layer_replication"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

"""The hub: what is chosen, what is refused, what is found, and who gets to see the token."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ohmygpu.core.errors import (
    AccessDenied,
    CorruptFile,
    InvalidRequest,
    ModelNotFound,
    NetworkError,
    OhMyGPUError,
    RateLimited,
    RevisionNotFound,
    UnsupportedModel,
)
from ohmygpu.core.gguf_header import HEAD_BYTES
from ohmygpu.core.http import check_hop, retry_after_s
from ohmygpu.core.hub import Hub, HubProvider
from ohmygpu.core.provider import Resolved
from ohmygpu.core.providers import provider_for
from ohmygpu.core.refs import ModelRef
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import HubSettings, Settings, load_settings
from ohmygpu.core.transfer import Patience
from tests.hub_server import READER, STRANGER, HubServer, make_repo

CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()
SAFETENSORS = {
    "config.json": CONFIG,
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "model.safetensors": b"weights",
}
UNNEEDED = {
    "README.md": b"# hello",
    "LICENSE": b"free",
    "pytorch_model.bin": b"pickle",
    "tokenizer.model": b"spm",
    "vocab.json": b"{}",
    "merges.txt": b"",
    "onnx/model.onnx": b"onnx",
    "original/consolidated.safetensors": b"twice",
    ".gitattributes": b"",
    "training_args.bin": b"pickle",
}
QUICK = Patience(attempts=2, first_wait_s=0.01)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    root = tmp_path / "hub"
    root.mkdir()
    with HubServer(root) as server:
        yield server


def gguf_head(architecture: str) -> bytes:
    key, value = b"general.architecture", architecture.encode()
    entry = struct.pack(f"<Q{len(key)}sIQ", len(key), key, 8, len(value)) + value
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + entry


def settings_for(hub: HubServer, token: str | None = None) -> Settings:
    settings = load_settings()
    return dataclasses.replace(settings, hub=HubSettings(endpoint=hub.url, token=token))


def resolve(hub: HubServer, text: str, token: str | None = None) -> Resolved:
    ref = ModelRef.parse(text)
    return provider_for(ref, settings_for(hub, token)).resolve(ref)


def names(resolved: Resolved) -> set[str]:
    return {file.filename for file in resolved.files}


def index_of(*shards: str) -> bytes:
    return json.dumps(
        {"weight_map": {f"tensor.{n}": name for n, name in enumerate(shards)}}
    ).encode()


# ------------------------------------------------------------------ choosing files


def test_only_weights_config_and_tokenizer_are_chosen(hub: HubServer) -> None:
    make_repo(hub.root, "Org/Model", SAFETENSORS | UNNEEDED, tags=["license:apache-2.0"])
    resolved = resolve(hub, "org/model")
    assert names(resolved) == set(SAFETENSORS)
    assert resolved.display_name == "Org/Model"
    assert resolved.source_format == "safetensors"
    assert (resolved.variant, resolved.default_variant) == (None, None)
    assert resolved.config == json.loads(CONFIG)
    assert resolved.license == "apache-2.0"
    assert resolved.revision is not None
    assert resolved.revision.branch == "main"
    assert len(resolved.revision.resolved_commit) == 40
    assert resolved.total_bytes == sum(map(len, SAFETENSORS.values()))
    weights = next(file for file in resolved.files if file.format == "safetensors")
    assert weights.sha256 == hashlib.sha256(b"weights").hexdigest()
    formats = {file.filename: file.format for file in resolved.files}
    assert formats["config.json"] == "config"
    assert formats["tokenizer_config.json"] == "tokenizer"


def test_without_a_fast_tokenizer_the_slow_ones_files_are_chosen(hub: HubServer) -> None:
    files = {name: data for name, data in SAFETENSORS.items() if name != "tokenizer.json"}
    make_repo(hub.root, "org/model", files | UNNEEDED)
    assert {"tokenizer.model", "vocab.json", "merges.txt"} <= names(resolve(hub, "org/model"))


def test_the_shards_that_the_index_names_are_chosen(hub: HubServer) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = {"config.json": CONFIG, "model.safetensors.index.json": index_of(*shards)}
    make_repo(hub.root, "org/model", files | dict.fromkeys([*shards, "other.safetensors"], b"w"))
    resolved = resolve(hub, "org/model:q4")
    assert names(resolved) == {*files, *shards}
    assert resolved.variant == "q4"


@pytest.mark.parametrize(
    ("shard", "error"),
    [
        ("../../../etc/passwd", CorruptFile),
        ("/etc/passwd", CorruptFile),
        ("a\\..\\b.safetensors", CorruptFile),
        ("missing.safetensors", CorruptFile),
        ("pytorch_model.bin", UnsupportedModel),
    ],
)
def test_an_index_that_names_what_it_must_not_is_refused(
    hub: HubServer, shard: str, error: type[OhMyGPUError]
) -> None:
    files = SAFETENSORS | UNNEEDED | {"model.safetensors.index.json": index_of(shard)}
    make_repo(hub.root, "org/model", files)
    with pytest.raises(error, match=r"unsafe name|does not exist|not a SafeTensors"):
        resolve(hub, "org/model")


@pytest.mark.parametrize("index", [b"[]", b"{}", b"nonsense", b'{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused_by_name(hub: HubServer, index: bytes) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS | {"model.safetensors.index.json": index})
    with pytest.raises(CorruptFile, match=r"model\.safetensors\.index\.json"):
        resolve(hub, "org/model")


@pytest.mark.parametrize("name", ["../evil.json", "/etc/passwd", "C:\\evil", "a/../../b"])
def test_a_repository_with_names_that_lead_out_of_it_is_refused(hub: HubServer, name: str) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS, extra_files=[name])
    with pytest.raises(CorruptFile, match="unsafe name"):
        resolve(hub, "org/model")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": CONFIG, "pytorch_model.bin": b"x"}, "can run code"),
        ({"config.json": CONFIG, "model.pt": b"x", "README.md": b""}, "can run code"),
        ({"README.md": b""}, "nothing to convert"),
        ({"model.safetensors": b"x"}, r"no config\.json"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "adapter"),
        ({"model_index.json": b"{}", "unet/model.safetensors": b"x"}, "image or video"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(
    hub: HubServer, files: dict[str, bytes], says: str
) -> None:
    make_repo(hub.root, "org/model", files)
    with pytest.raises(UnsupportedModel, match=says):
        resolve(hub, "org/model")


GGUFS = [
    "m-Q8_0.gguf",
    "m-q4_k_m.gguf",
    "m-F16.gguf",
    "mmproj-m-F16.gguf",
    "m.imatrix.gguf",
    "Q6_K/m-Q6_K-00001-of-00002.gguf",
    "Q6_K/m-Q6_K-00002-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("text", "chosen", "variant"),
    [
        ("org/model", {"m-q4_k_m.gguf"}, "q4_k_m"),
        ("org/model:Q4_K_M", {"m-q4_k_m.gguf"}, "q4_k_m"),
        ("org/model:q8_0", {"m-Q8_0.gguf"}, "q8_0"),
        ("org/model:m-F16", {"m-F16.gguf"}, "f16"),
        ("org/model:Q6_K", {GGUFS[5], GGUFS[6]}, "q6_k"),
        ("hf.co/org/model:F16", {"m-F16.gguf"}, "f16"),
    ],
)
def test_the_variant_chooses_among_the_gguf_files(
    hub: HubServer, text: str, chosen: set[str], variant: str
) -> None:
    make_repo(hub.root, "org/model", {**dict.fromkeys(GGUFS, b"GGUF"), "config.json": CONFIG})
    resolved = resolve(hub, text)
    assert names(resolved) == chosen
    assert (resolved.source_format, resolved.variant) == ("gguf", variant)
    assert resolved.default_variant == "q4_k_m"
    assert resolved.config is None


def test_a_variant_that_does_not_exist_is_answered_with_those_that_do(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", dict.fromkeys(GGUFS, b"GGUF"))
    with pytest.raises(ModelNotFound, match=r"Q8_0.*q4_k_m") as caught:
        resolve(hub, "org/model:Q2_K")
    assert "Q8_0" in caught.value.details["suggestions"]


def test_a_missing_part_of_a_split_gguf_is_named(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", dict.fromkeys(GGUFS[:-1], b"GGUF"))
    with pytest.raises(CorruptFile, match="lacks part 2"):
        resolve(hub, "org/model:Q6_K")


def test_different_models_in_one_repository_must_be_chosen_by_name(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", dict.fromkeys(["a-Q4_0.gguf", "b-Q4_0.gguf"], b"GGUF"))
    for text in ("org/model", "org/model:Q4_0"):
        with pytest.raises(InvalidRequest, match="choose one"):
            resolve(hub, text)
    resolved = resolve(hub, "org/model:b-Q4_0")
    assert (names(resolved), resolved.variant) == ({"b-Q4_0.gguf"}, "b-q4_0")


def test_a_gguf_file_tells_its_architecture_before_the_download(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", {"m-Q4_0.gguf": gguf_head("qwen2") + bytes(1 << 20)})
    assert resolve(hub, "org/model").gguf_architecture == "qwen2"
    (peek,) = [entry for entry in hub.requests.entries if entry.get("file")]
    assert peek["bytes"] <= HEAD_BYTES


@pytest.mark.parametrize("kind", ["drop", "ignore_range", "gzip", "status"])
def test_a_hub_that_does_not_show_the_first_bytes_does_not_stop_a_pull(
    hub: HubServer, kind: str
) -> None:
    make_repo(hub.root, "org/model", {"m-Q4_0.gguf": gguf_head("qwen2") + bytes(1 << 20)})
    hub.faults.add(kind, match="GET /cdn", after=0, status=500)
    found = resolve(hub, "org/model").gguf_architecture
    assert found == ("qwen2" if kind == "ignore_range" else None)


def test_safetensors_win_over_gguf_unless_the_variant_names_one(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS | {"m-Q4_0.gguf": b"GGUF"})
    assert resolve(hub, "org/model").source_format == "safetensors"
    assert resolve(hub, "org/model:q8").source_format == "safetensors"
    assert names(resolve(hub, "org/model:q4_0")) == {"m-Q4_0.gguf"}


def test_where_the_list_has_no_digests_the_files_own_headers_are_asked(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS, no_digests=True)
    resolved = resolve(hub, "org/model")
    assert all(file.digest and file.size > 0 for file in resolved.files)
    repository = Repository(load_settings().home)
    provider = HubProvider(settings_for(hub))
    assert len(provider.fetch(resolved, repository, lambda _: None, threading.Event())) == 6


# ------------------------------------------------------------------ revisions


def test_branches_tags_and_commits_are_resolved_to_the_commit(hub: HubServer) -> None:
    folder = make_repo(hub.root, "org/model", SAFETENSORS)
    old = {f".revisions/v1.0/{name}": data for name, data in SAFETENSORS.items()}
    for name, data in (old | {".revisions/v1.0/model.safetensors": b"older"}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    tagged, main = resolve(hub, "org/model@v1.0"), resolve(hub, "org/model")
    assert tagged.revision is not None
    assert main.revision is not None
    assert tagged.revision.branch == "v1.0"
    assert tagged.revision.resolved_commit != main.revision.resolved_commit
    by_commit = resolve(hub, f"org/model@{tagged.revision.resolved_commit}")
    assert by_commit.files == tagged.files
    assert all(tagged.revision.resolved_commit in file.url for file in tagged.files)


def test_an_unknown_revision_is_named(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS)
    with pytest.raises(RevisionNotFound, match="'v9'"):
        resolve(hub, "org/model@v9")


# ------------------------------------------------------------------ who may


def test_a_missing_model_is_answered_with_near_names(hub: HubServer) -> None:
    make_repo(hub.root, "HuggingFaceTB/SmolLM2", SAFETENSORS)
    with pytest.raises(ModelNotFound, match="HuggingFaceTB/SmolLM2") as caught:
        resolve(hub, "huggingface/smollm2")
    assert caught.value.details["suggestions"] == ["HuggingFaceTB/SmolLM2"]


@pytest.mark.parametrize(("token", "says"), [(None, "set HF_TOKEN"), (STRANGER, "cannot read it")])
def test_a_private_model_looks_missing_and_the_token_is_mentioned(
    hub: HubServer, token: str | None, says: str
) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS, private=True)
    with pytest.raises(ModelNotFound, match=says):
        resolve(hub, "org/model", token)
    assert names(resolve(hub, "org/model", READER)) == set(SAFETENSORS)


@pytest.mark.parametrize(
    ("token", "says"), [(None, "and set HF_TOKEN"), (STRANGER, "the account of the token")]
)
@pytest.mark.parametrize("files", [SAFETENSORS, {"m-Q4_0.gguf": b"GGUF"}])
def test_a_gated_model_says_where_to_accept_its_licence(
    hub: HubServer, files: dict[str, bytes], token: str | None, says: str
) -> None:
    make_repo(hub.root, "org/model", files, gated="manual")
    provider = HubProvider(settings_for(hub, token))
    repository = Repository(load_settings().home)
    with pytest.raises(AccessDenied, match=f"{hub.url}/org/model.*{says}"):
        provider.fetch(
            provider.resolve(ModelRef.parse("org/model")),
            repository,
            lambda _: None,
            threading.Event(),
        )
    assert names(resolve(hub, "org/model", READER)) == set(files)


def test_a_bad_token_is_said_to_be_bad(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS)
    with pytest.raises(AccessDenied, match="does not accept the token in HF_TOKEN") as caught:
        resolve(hub, "org/model", "hf_wrong")
    assert "hf_wrong" not in caught.value.message


def test_a_disabled_model_is_said_to_be_disabled(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS, disabled=True)
    with pytest.raises(AccessDenied, match="disabled access"):
        resolve(hub, "org/model", READER)


def test_the_token_is_in_no_message_and_no_repr(hub: HubServer) -> None:
    settings = settings_for(hub, READER)
    assert READER not in repr(settings)
    assert READER not in repr(HubProvider(settings).hub)


def test_the_token_never_leaves_the_hub_even_when_a_page_of_results_does(hub: HubServer) -> None:
    with HubServer(hub.root) as stranger:
        make_repo(hub.root, "org/one", SAFETENSORS)
        make_repo(hub.root, "org/two", SAFETENSORS)
        link = {"Location": f"{stranger.url}/api/models?search=o"}
        hub.faults.add("status", "/api/models", status=302, headers=link)
        assert len(Hub(hub.url, READER).search("o")) == 2
        assert [entry["authorization"] for entry in hub.requests.entries] == [True]
        assert [entry["authorization"] for entry in stranger.requests.entries] == [False]


def test_a_token_saved_by_another_tool_is_not_sent(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS)
    (tmp_path / "token").write_text(READER)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    code = (
        "import sys\nfrom ohmygpu.core.hub import Hub\n"
        f"Hub({hub.url!r}).resolve('org/model')\nHub({hub.url!r}).search('m')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert hub.requests.entries
    assert not any(entry["authorization"] for entry in hub.requests.entries)
    assert not hub.requests.of("agent-harnesses"), "nothing but what was asked for is requested"


# ------------------------------------------------------------------ when the hub misbehaves


def test_a_busy_hub_is_asked_again_when_it_says_so_and_soon(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS)
    hub.faults.add("status", "/api/", status=429, headers={"Retry-After": "0"}, times=1)
    assert names(resolve(hub, "org/model")) == set(SAFETENSORS)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [({"Retry-After": "77"}, 77), ({"RateLimit": '"api";r=0;t=78'}, 78), ({}, None)],
)
def test_a_hub_that_limits_its_rate_says_for_how_long(
    hub: HubServer, headers: dict[str, str], wait_s: float | None
) -> None:
    hub.faults.add("status", "/api/", status=429, headers=headers)
    with pytest.raises(RateLimited, match=f"{wait_s} seconds" if wait_s else "a few minutes") as e:
        resolve(hub, "org/model")
    assert e.value.retry_after_s == wait_s
    assert len(hub.requests.entries) == 1


def test_a_failing_hub_is_tried_again_and_then_given_up(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS)
    hub.faults.add("status", "/api/", status=503, times=1)
    assert names(resolve(hub, "org/model")) == set(SAFETENSORS)
    hub.faults.add("status", "/api/", status=503)
    with pytest.raises(NetworkError, match="error 503"):
        resolve(hub, "org/model")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"kind": "gzip", "bomb_bytes": 1 << 26}, "compressed"),
        ({"kind": "endless"}, "more than"),
        ({"kind": "redirect", "location": ""}, "loop"),
        ({"kind": "redirect", "location": "file:///etc/passwd"}, "file:"),
        ({"kind": "redirect", "location": "http://169.254.169.254/"}, "local network"),
        ({"kind": "redirect", "location": "ftp://127.0.0.1/"}, "ftp:"),
        ({"kind": "status", "status": 200}, "as a hub does"),
        ({"kind": "status", "status": 418}, "error 418"),
    ],
    ids=lambda value: "_".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_an_answer_that_is_none_ends_in_a_clear_error(
    hub: HubServer, fault: dict[str, object], says: str
) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS)
    hub.faults.add(match="", **fault)  # type: ignore[arg-type]
    with pytest.raises(NetworkError, match=says):
        resolve(hub, "org/model")


def test_a_hub_that_is_not_there_is_named(hub: HubServer) -> None:
    hub.stop()
    with pytest.raises(NetworkError, match=f"cannot reach {hub.url}"):
        Hub(hub.url).resolve("org/model")
    hub.__init__(hub.root)  # type: ignore[misc]
    hub.start()


def test_offline_mode_is_respected(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        resolve(hub, "org/model")
    assert hub.requests.entries == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("https://hub.example", "http://hub.example/x"),
        ("https://1.1.1.1", "https://127.0.0.1/x"),
        ("https://1.1.1.1", "https://10.0.0.1/x"),
        ("https://1.1.1.1", "https://[::1]/x"),
        ("https://1.1.1.1", "https://[::ffff:127.0.0.1]/x"),
        ("https://1.1.1.1", "https://localhost/x"),
        ("http://10.0.0.1", "http://127.0.0.1/x"),
        ("http://127.0.0.1", "http://169.254.169.254/x"),
        ("https://1.1.1.1", "javascript:alert(1)"),
        ("https://1.1.1.1", "//"),
        ("https://1.1.1.1", "https://host:99999/"),
    ],
)
def test_a_hop_that_leads_somewhere_unsafe_is_refused(source: str, target: str) -> None:
    with pytest.raises(NetworkError):
        check_hop(source, target)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("https://1.1.1.1", "https://8.8.8.8/x"),
        ("http://1.1.1.1", "https://8.8.8.8/x"),
        ("http://127.0.0.1:1", "http://localhost:2/x"),
        ("http://10.0.0.1", "https://1.1.1.1/x"),
    ],
)
def test_a_hop_to_an_equal_is_fine(source: str, target: str) -> None:
    check_hop(source, target)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"ratelimit": '"resolvers";r=0;t=42'}, 42),
        ({"ratelimit": '"resolvers";r=17;t=42'}, None),
    ],
)
def test_the_wait_a_server_asks_for_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers) == seconds


# ------------------------------------------------------------------ search


def test_search_finds_by_name_and_tells_what_is_known(hub: HubServer) -> None:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(30)
    make_repo(
        hub.root, "org/llama-st", SAFETENSORS | {"model.safetensors": weights}, downloads=7, likes=3
    )
    info = {"gguf": {"architecture": "llama", "total": 12}}
    make_repo(hub.root, "org/Llama-GGUF", {"m-Q4_0.gguf": b"GGUF"}, downloads=9, info=info)
    make_repo(hub.root, "org/other", SAFETENSORS)
    first, second = Hub(hub.url).search("llama")
    assert (first.id, first.downloads, first.has_gguf) == ("org/Llama-GGUF", 9, True)
    assert (first.model_type, first.size_bytes, first.gated) == ("llama", 4, False)
    assert (second.id, second.likes, second.has_safetensors) == ("org/llama-st", 3, True)
    assert (second.model_type, second.size_bytes) == ("llama", 30)
    assert second.to_dict()["tags"] == ["safetensors"]


def test_search_follows_pages_and_stops_at_the_limit(hub: HubServer) -> None:
    for number in range(7):
        make_repo(hub.root, f"org/model-{number}", {"README.md": b""}, downloads=number)
    hub.page_size = 3
    hits = Hub(hub.url).search("model", limit=5)
    assert [hit.downloads for hit in hits] == [6, 5, 4, 3, 2]
    assert len(hub.requests.entries) == 2


def test_a_hub_that_does_not_know_every_field_is_asked_plainly(hub: HubServer) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS)
    hub.faults.add("status", "/api/models", status=400, times=1)
    assert [hit.id for hit in Hub(hub.url).search("model")] == ["org/model"]
    assert "expand" not in hub.requests.entries[-1]["query"]


def test_search_that_finds_nothing_is_empty(hub: HubServer) -> None:
    assert Hub(hub.url).search("nothing") == []


# ------------------------------------------------------------------ fetching


def test_what_was_resolved_is_fetched_into_the_store(hub: HubServer, home: Path) -> None:
    make_repo(hub.root, "org/model", SAFETENSORS | UNNEEDED)
    provider = HubProvider(settings_for(hub), QUICK)
    repository = Repository(home)
    resolved = provider.resolve(ModelRef.parse("org/model"))
    artifacts = provider.fetch(resolved, repository, lambda _: None, threading.Event())
    stored = {a.filename: repository.blob_path(a.sha256).read_bytes() for a in artifacts}
    assert stored == SAFETENSORS
    assert not list(repository.partial_dir.iterdir())


def test_a_file_that_vanishes_between_asking_and_fetching_is_an_error(
    hub: HubServer, home: Path
) -> None:
    folder = make_repo(hub.root, "org/model", SAFETENSORS)
    provider = HubProvider(settings_for(hub), QUICK)
    resolved = provider.resolve(ModelRef.parse("org/model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OhMyGPUError, match="org/model"):
        provider.fetch(resolved, Repository(home), lambda _: None, threading.Event())

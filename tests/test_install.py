from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.convert import process, recipes
from ohmygpu.core import files, hardware, providers
from ohmygpu.core.errors import (
    Cancelled,
    ConfigError,
    Conflict,
    DiskFull,
    InvalidName,
    InvalidRequest,
    ModelNotFound,
    NetworkError,
    OhMyGPUError,
    OutOfMemory,
    UnsupportedModel,
)
from ohmygpu.core.events import Event
from ohmygpu.core.records import InstallRecord
from ohmygpu.core.refs import ModelRef
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import load_settings
from ohmygpu.install import collect_garbage, pull, remove
from ohmygpu.plan import compiled_estimate_bytes, make_plan
from tests.fake_pull import COMPILER, GGUF, SAFETENSORS, FakeProvider, sha256

ROOT = Path(__file__).parent.parent
PROGRAM = Path(__file__).with_name("fake_pull.py")


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeProvider:
    """The provider of every pull: a GGUF model, until a test gives it other content."""
    chosen = FakeProvider(GGUF)
    monkeypatch.setattr(providers, "provider_for", lambda *_: chosen)
    monkeypatch.setattr(process, "COMPILER", (sys.executable, "-c", COMPILER))
    monkeypatch.setattr(hardware, "target", lambda *_: "cpu")
    monkeypatch.setattr(hardware, "multiplies_integers", lambda: False)
    monkeypatch.setattr(recipes, "SMALL_FLOAT_BYTES", 0)  # as if the model were a large one
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return chosen


@pytest.fixture
def store(home: Path) -> Repository:
    return Repository(home)


class Watch:
    """A sink that keeps all events and can act on them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.cancel = threading.Event()
        self.cancel_at: str | None = None

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self.cancel_at == event.phase:
            self.cancel.set()

    @property
    def phases(self) -> list[str]:
        """The phases in order, repetitions left out."""
        names = [event.phase for event in self.events]
        return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def do_pull(reference: str = "Org/Tiny-GGUF", **named: Any) -> InstallRecord:
    return pull(reference, load_settings(), **named)


def compiles(tmp_path: Path) -> int:
    path = tmp_path / "log"
    return path.read_text().count("compile") if path.exists() else 0


def tree(store: Repository) -> dict[str, bytes]:
    """The store's files; the time of install, which differs each time, left out."""
    found: dict[str, bytes] = {}
    for path in sorted(store.models_dir.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".json" and store.manifests_dir in path.parents:
                data = json.dumps(json.loads(data) | {"installed_at": ""}).encode()
            found[str(path.relative_to(store.models_dir))] = data
    return found


# ---------------------------------------------------------------------- the whole way


def test_a_pull_installs_a_model_and_reports_every_phase(store: Repository) -> None:
    watch = Watch()
    record = do_pull(sink=watch)
    assert store.records() == [record]
    assert store.find("org/tiny-gguf") == record
    assert (record.name, record.variant, record.recipe) == ("Org/Tiny-GGUF", "q4_1", "exact")
    assert record.is_default
    assert record.family == "llama"
    assert record.revision is not None
    assert record.revision.resolved_commit == "c" * 40
    assert record.source_ref == "Org/Tiny-GGUF"
    folder = store.compiled_path(record.compiled_key)
    assert record.compiled_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert watch.phases == ["resolve", "download", "verify", "compile", "done"]
    assert watch.events[-1].name == "Org/Tiny-GGUF"
    last = [event for event in watch.events if event.phase == "compile"][-1]
    assert last.done_bytes == last.total_bytes == len(GGUF["tiny.Q4_1.gguf"])
    assert list(store.partial_dir.iterdir()) == []


def test_pulling_again_does_nothing(store: Repository, fake: FakeProvider, tmp_path: Path) -> None:
    first = do_pull()
    before = tree(store)
    watch = Watch()
    assert do_pull(sink=watch) == first
    assert watch.phases == ["resolve", "done"]
    assert (fake.fetches, compiles(tmp_path)) == (1, 1)
    assert tree(store) == before


def test_a_new_revision_with_the_same_bytes_is_not_compiled_again(
    store: Repository, fake: FakeProvider, tmp_path: Path
) -> None:
    do_pull()
    fake.commit = "d" * 40
    record = do_pull()
    assert record.revision is not None
    assert record.revision.resolved_commit == "d" * 40
    assert compiles(tmp_path) == 1
    assert len(store.records()) == 1


def test_a_new_revision_replaces_the_old_one(store: Repository, fake: FakeProvider) -> None:
    old = do_pull()
    fake.content, fake.commit = {"tiny.Q4_1.gguf": b"GGUFnew"}, "d" * 40
    new = do_pull()
    assert new.compiled_key != old.compiled_key
    assert store.records() == [new]
    report = collect_garbage(load_settings())
    assert (report.blobs, report.compiled) == (1, 1)
    assert store.has_compiled(new.compiled_key)


def test_the_same_bytes_from_two_repositories_are_stored_and_compiled_once(
    store: Repository, tmp_path: Path
) -> None:
    one, two = do_pull("org/one"), do_pull("org/two")
    assert one.compiled_key == two.compiled_key
    assert compiles(tmp_path) == 1
    assert len(list(store.blobs_dir.iterdir())) == 1
    assert remove("org/one", load_settings()).freed_bytes == 0
    assert store.has_compiled(store.find("org/two").compiled_key)
    assert remove("org/two", load_settings()).freed_bytes > 0
    with pytest.raises(ModelNotFound):
        remove("org/two", load_settings())


def test_a_damaged_compiled_model_is_repaired_by_pulling_again(
    store: Repository, tmp_path: Path
) -> None:
    record = do_pull()
    before = tree(store)
    (store.compiled_path(record.compiled_key) / "model.onnx").write_bytes(b"cut")
    assert do_pull() == record
    assert compiles(tmp_path) == 2
    assert tree(store) == before


def test_a_damaged_source_is_fetched_again_before_it_is_compiled(
    store: Repository, fake: FakeProvider
) -> None:
    record = do_pull()
    before = tree(store)
    blob = store.blob_path(record.artifacts[0].sha256)
    blob.write_bytes(b"X" + blob.read_bytes()[1:])
    (store.compiled_path(record.compiled_key) / "model.onnx").unlink()
    do_pull()
    assert fake.fetches == 3
    assert tree(store) == before


# ---------------------------------------------------------------------- names, variants, recipes


def test_a_small_model_is_left_unquantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "SMALL_FLOAT_BYTES", 1 << 30)
    assert pull("org/small", load_settings()).recipe == "f32"


def test_safetensors_variants_are_recipes(store: Repository, fake: FakeProvider) -> None:
    fake.content, fake.config = SAFETENSORS, {"model_type": "llama"}
    assert do_pull("org/safe").full_name == "org/safe:q8"
    assert do_pull("org/safe:Q4").full_name == "org/safe:q4"
    assert do_pull("org/safe", recipe="f32").full_name == "org/safe:f32"
    assert store.find("org/safe").variant == "f32", "the last one asked for by the bare name"
    do_pull("org/safe:q8")
    assert store.find("org/safe").variant == "f32"
    do_pull("org/safe", recipe="q4")
    assert store.find("org/safe").variant == "q4"
    assert len({record.compiled_key for record in store.records()}) == 3
    assert len(list(store.blobs_dir.iterdir())) == 3


def test_gguf_variants_are_files_and_say_when_they_are_recoded(fake: FakeProvider) -> None:
    assert do_pull("org/g").variant == "q4_1"
    assert do_pull("org/g", recipe="q8").variant == "q4_1-q8"
    fake.content = {"plain.gguf": b"GGUF"}
    assert do_pull("org/plain").variant == "exact"
    assert do_pull("org/plain", recipe="q4").variant == "q4"


@pytest.mark.parametrize(
    ("filename", "architecture", "experts", "recipe"),
    [
        ("moe-Q4_K_M.gguf", "qwen3moe", 128, "q8"),  # minimums, which experts cannot have
        ("moe-Q8_0.gguf", "qwen3moe", 128, "exact"),
        ("moe-Q4_K_M.gguf", "gpt-oss", 32, "exact"),  # its experts are MXFP4
        ("dense-Q4_K_M.gguf", "llama", 0, "exact"),
    ],
)
def test_quantised_experts_are_kept_where_they_can_be(
    fake: FakeProvider, filename: str, architecture: str, experts: int, recipe: str
) -> None:
    fake.content = {filename: b"GGUF"}
    fake.gguf_architecture, fake.gguf_experts = architecture, experts
    assert do_pull("org/moe").recipe == recipe


@pytest.mark.parametrize(("method", "recipe"), [("mxfp4", "exact"), ("awq", "q8")])
def test_experts_of_quantised_checkpoints_are_kept_where_they_can_be(
    fake: FakeProvider, method: str, recipe: str
) -> None:
    fake.content = SAFETENSORS
    fake.config = {
        "model_type": "gpt_oss",
        "num_local_experts": 32,
        "quantization_config": {"quant_method": method, "bits": 4, "version": "gemm"},
    }
    assert do_pull("org/moe").recipe == recipe


def test_the_configured_recipe_is_the_default(
    fake: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OHMYGPU_MODELS_RECIPE", "q4")
    fake.content, fake.config = SAFETENSORS, {"model_type": "llama"}
    assert do_pull("org/safe").recipe == "q4"
    assert do_pull("org/safe:q8").recipe == "q8"
    assert do_pull("org/safe", recipe="f32").recipe == "f32"


def test_the_record_says_why_the_recipe_was_chosen_and_on_what_machine(
    fake: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "describe", lambda: "riscv64, 3 cores")
    fake.content, fake.config = SAFETENSORS, {"model_type": "llama"}
    machine = " (compiled for cpu on riscv64, 3 cores)"
    default = do_pull("org/safe").recipe_reason
    assert default == f"the default: {recipes.explain('q8', 0)}{machine}"
    assert do_pull("org/safe:q4").recipe_reason == f"asked for, as org/safe:q4{machine}"
    asked = do_pull("org/safe", recipe="f32").recipe_reason
    assert asked == f"asked for, with --recipe{machine}"
    monkeypatch.setenv("OHMYGPU_MODELS_RECIPE", "q4")
    assert do_pull("org/other").recipe_reason == f"the setting models.recipe{machine}"


def test_a_fast_processor_with_room_for_both_gets_a_graph_for_prompts(
    fake: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, memory = do_pull(), 1 << 40
    assert "in the same graph" in one.prompt_reason
    assert "VNNI" in one.prompt_reason
    monkeypatch.setattr(hardware, "multiplies_integers", lambda: True)
    monkeypatch.setattr(hardware, "memory_total_bytes", lambda: memory)
    two = do_pull()
    assert "fast at 8-bit integers" in two.prompt_reason
    assert two.compiled_key != one.compiled_key
    memory = 1 << 20
    small = do_pull()
    assert "of memory" in small.prompt_reason
    assert small.compiled_key == one.compiled_key
    assert do_pull(recipe="f32").prompt_reason == ""


def test_the_setting_decides_on_a_graph_for_prompts(
    fake: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for setting, fast in (("off", True), ("on", True), ("on", False)):
        monkeypatch.setenv("OHMYGPU_ENGINE_PROMPT_GRAPH", setting)
        monkeypatch.setattr(hardware, "multiplies_integers", lambda fast=fast: fast)
        record = do_pull()
        keys.append(record.compiled_key)
        assert f"engine.prompt_graph is {setting}" in record.prompt_reason
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("reference", "recipe", "message"),
    [
        ("org/safe", "q5", "q5"),
        ("org/safe:q5", None, "q5"),
        ("org/safe:q4", "q8", "give one of the two"),
        ("org/safe", "exact", "GGUF"),
        ("org/safe:bf16", None, "bf16 runs on a GPU only.*choose f32"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_the_download(
    fake: FakeProvider, reference: str, recipe: str | None, message: str
) -> None:
    fake.content, fake.config = SAFETENSORS, {"model_type": "llama"}
    with pytest.raises(InvalidRequest, match=message):
        do_pull(reference, recipe=recipe)
    assert fake.fetches == 0


@pytest.mark.parametrize(
    ("recipe", "dtype", "share"),
    [
        ("bf16", "bfloat16", 0.2),  # the weights stay where they are
        ("f16", "float16", 0.2),
        ("f16", "bfloat16", 1.05),
    ],
)
def test_weights_used_in_place_need_no_space_of_their_own(
    fake: FakeProvider, monkeypatch: pytest.MonkeyPatch, recipe: str, dtype: str, share: float
) -> None:
    monkeypatch.setattr(hardware, "target", lambda execution_provider: "cuda")
    fake.content = SAFETENSORS
    fake.config = {"model_type": "llama", "torch_dtype": dtype}
    resolved = fake.resolve(ModelRef.parse("org/safe"))
    sizes = [file.size for file in resolved.files if file.format == "safetensors"]
    plan = make_plan(resolved, load_settings(), None, recipe)
    assert (plan.recipe, plan.target) == (recipe, "cuda")
    assert compiled_estimate_bytes(plan) == int(sum(sizes) * share)


def test_a_model_can_have_another_name(store: Repository) -> None:
    record = do_pull(name="smollm2:latest")
    assert record.name == "smollm2"
    assert store.find("SmolLM2") == record
    with pytest.raises(Conflict, match="--name"):
        do_pull("org/other", name="smollm2")


@pytest.mark.parametrize("name", ["", "../x", "a/b/c", "a:q4", "a b", "x" * 200])
def test_a_bad_name_is_refused_before_anything_happens(fake: FakeProvider, name: str) -> None:
    with pytest.raises(InvalidName):
        do_pull(name=name)
    assert fake.fetches == 0


def test_a_taken_name_is_noticed_before_the_download(fake: FakeProvider) -> None:
    do_pull("org/one", name="mine")
    with pytest.raises(Conflict):
        do_pull("org/two", name="mine")
    assert fake.fetches == 1


def test_a_local_file_is_pulled_once_even_without_a_revision(
    store: Repository, tmp_path: Path
) -> None:
    first = do_pull(str(tmp_path / "Tiny.gguf"))
    assert (first.name, first.provider, first.revision) == ("Tiny", "file", None)
    assert do_pull(str(tmp_path / "Tiny.gguf")) == first
    assert compiles(tmp_path) == 1
    moved = do_pull(str(tmp_path / "elsewhere" / "Tiny.gguf"))
    assert moved == replace(
        first, source_ref=str(tmp_path / "elsewhere" / "Tiny.gguf"), installed_at=moved.installed_at
    )
    assert store.records() == [moved]


def test_an_unsupported_architecture_is_refused_before_the_download(fake: FakeProvider) -> None:
    fake.content = SAFETENSORS
    fake.config = {"model_type": "quantum", "architectures": ["QuantumForCausalLM"]}
    with pytest.raises(UnsupportedModel, match=r"quantum.*llama"):
        do_pull("org/safe")
    assert fake.fetches == 0


def test_weights_without_a_tokenizer_are_refused_before_the_download(fake: FakeProvider) -> None:
    fake.content = {name: SAFETENSORS[name] for name in ("config.json", "model.safetensors")}
    with pytest.raises(UnsupportedModel, match=r"has no tokenizer\.json"):
        do_pull("org/safe")
    assert fake.fetches == 0


def test_a_gguf_of_another_architecture_is_refused_before_the_download(fake: FakeProvider) -> None:
    fake.gguf_architecture = "quantum"
    with pytest.raises(UnsupportedModel, match=r"tiny.Q4_1.gguf.*quantum.*llama"):
        do_pull()
    assert fake.fetches == 0


def test_a_gguf_of_unread_block_types_is_refused_before_the_download(fake: FakeProvider) -> None:
    fake.content = {"tiny-UD-IQ2_XXS.gguf": b"GGUF"}
    with pytest.raises(UnsupportedModel, match=r"tiny-UD-IQ2_XXS.gguf is quantised as IQ2_XXS"):
        do_pull()
    assert fake.fetches == 0


def test_sources_are_freed_when_they_are_not_to_be_kept(
    store: Repository, fake: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OHMYGPU_MODELS_KEEP_SOURCE", "false")
    record = do_pull()
    assert list(store.blobs_dir.iterdir()) == []
    assert record.artifacts[0].sha256 == sha256(GGUF["tiny.Q4_1.gguf"])
    assert do_pull() == record
    assert fake.fetches == 1


def test_freed_sources_are_not_fetched_again(store: Repository, fake: FakeProvider) -> None:
    record = do_pull()
    report = collect_garbage(load_settings(), sources=True)
    assert (report.sources, report.source_bytes) == (1, record.artifacts[0].size)
    assert do_pull() == record
    assert fake.fetches == 1


# ---------------------------------------------------------------------- what goes wrong


def test_an_error_is_the_last_event_and_the_only_one_of_its_kind(fake: FakeProvider) -> None:
    fake.failure = ModelNotFound("no such model")
    watch = Watch()
    with pytest.raises(ModelNotFound):
        do_pull(sink=watch)
    assert watch.phases == ["resolve", "error"]
    assert watch.events[-1].error is fake.failure
    watch = Watch()
    with pytest.raises(InvalidName):
        do_pull("../..:\x00", sink=watch)
    assert watch.phases == ["error"]


def test_an_unreachable_provider_takes_nothing_away(store: Repository, fake: FakeProvider) -> None:
    fake.failure = NetworkError("cannot reach the hub", retry_after_s=3)
    with pytest.raises(NetworkError) as caught:
        do_pull()
    assert caught.value.message == "cannot reach the hub"
    fake.failure = None
    record = do_pull()
    before = tree(store)
    fake.failure = NetworkError("cannot reach the hub", retry_after_s=3)
    with pytest.raises(NetworkError, match=r"Org/Tiny-GGUF:q4_1 is installed and stays") as caught:
        do_pull()
    assert caught.value.retry_after_s == 3
    assert store.find("org/tiny-gguf") == record
    assert tree(store) == before


def test_a_full_disk_is_refused_before_the_download(
    store: Repository, fake: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "f_bavail f_frsize")
    size = len(GGUF["tiny.Q4_1.gguf"])
    monkeypatch.setattr(os, "statvfs", lambda _: usage(2 * size, 1))
    with pytest.raises(DiskFull, match="pulling and compiling Org/Tiny-GGUF") as caught:
        do_pull()
    assert caught.value.details["free_bytes"] == 2 * size
    assert caught.value.details["needed_bytes"] > 2 * size
    assert fake.fetches == 0
    monkeypatch.setattr(os, "statvfs", lambda _: usage(3 * size, 1))
    do_pull()
    assert store.gc().freed_bytes == 0


def test_a_disk_that_fills_up_while_storing_is_said(
    store: Repository, fake: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync_tree", full)
    watch = Watch()
    with pytest.raises(DiskFull):
        do_pull(sink=watch)
    assert watch.phases[-1] == "error"
    assert store.records() == []
    assert list(store.compiled_dir.iterdir()) == []


def test_a_read_only_store_says_so_and_still_answers_for_what_is_there(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = do_pull()
    real_open = os.open

    def read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(store.home) in str(path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", read_only)
    assert do_pull() == record
    with pytest.raises(ConfigError, match="Read-only file system"):
        do_pull("org/other")
    assert store.records() == [record]


def test_the_compilers_own_error_is_passed_on(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_COMPILER", "refuse")
    with pytest.raises(UnsupportedModel, match="no such block") as caught:
        do_pull()
    assert caught.value.details == {"a": 1}
    assert list(store.compiled_dir.iterdir()) == []
    monkeypatch.delenv("FAKE_COMPILER")
    do_pull()


def test_a_compiler_that_breaks_is_reported_in_one_line(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_COMPILER", "die")
    with pytest.raises(OhMyGPUError, match=r"exit status 3\): ValueError: boom") as caught:
        do_pull()
    assert caught.value.message.isprintable()
    assert "secret" not in caught.value.message
    assert list(store.compiled_dir.iterdir()) == []


def test_a_compiler_killed_by_the_system_speaks_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_COMPILER", "killed")
    with pytest.raises(OutOfMemory, match="memory"):
        do_pull()


def test_a_compiler_that_ends_without_reading_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "COMPILER", (sys.executable, "-c", "raise SystemExit(4)"))
    with pytest.raises(OhMyGPUError, match="exit status 4"):
        do_pull()


def test_a_compiler_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "COMPILER", ("/nonexistent/python",))
    watch = Watch()
    with pytest.raises(OhMyGPUError, match="No such file"):
        do_pull(sink=watch)
    assert watch.phases[-1] == "error"


def test_the_compiler_does_not_get_the_token(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    record = do_pull()
    assert (store.compiled_path(record.compiled_key) / "token").read_text() == "none"


def test_an_unexpected_failure_still_ends_with_an_error_event(
    fake: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(fake, "fetch", broken)
    watch = Watch()
    with pytest.raises(OhMyGPUError, match="unexpectedly"):
        do_pull(sink=watch)
    assert watch.phases == ["resolve", "error"]


@pytest.mark.parametrize("phase", ["resolve", "download", "verify", "compile"])
def test_a_cancel_ends_a_pull_at_any_phase_and_the_next_one_goes_on(
    store: Repository, fake: FakeProvider, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    if phase == "compile":
        monkeypatch.setenv("FAKE_COMPILER", "hang")
    watch = Watch()
    watch.cancel_at = phase
    with pytest.raises(Cancelled):
        do_pull(sink=watch, cancel=watch.cancel)
    assert watch.phases[-2:] == [phase, "error"]
    assert store.records() == []
    assert not list(store.compiled_dir.glob("*"))
    assert not list(store.partial_dir.glob("*.lease"))
    monkeypatch.delenv("FAKE_COMPILER", raising=False)
    assert do_pull() == store.find("org/tiny-gguf")


def test_a_cancelled_compile_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_COMPILER", "hang")
    watch = Watch()

    def sink(event: Event) -> None:
        if event.phase == "compile" and event.done_bytes:
            watch.cancel.set()

    with pytest.raises(Cancelled):
        do_pull(sink=sink, cancel=watch.cancel)
    assert not is_alive(compiler_pid(tmp_path))


# ---------------------------------------------------------------------- other processes


def compiler_pid(tmp_path: Path) -> int:
    lines = (tmp_path / "log").read_text().splitlines()
    return int(next(line for line in reversed(lines) if "compile" in line).split()[1])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


@contextlib.contextmanager
def puller(*arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """`fake_pull.py` in this test's home, killed at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def wait_for(child: subprocess.Popen[str], text: str) -> list[str]:
    """The lines up to the first one with `text`; fails when the process ends without it."""
    assert child.stdout is not None
    lines: list[str] = []
    for line in child.stdout:
        lines.append(line)
        if text in line:
            return lines
    pytest.fail(f"no {text!r} in {lines}")


def release(child: subprocess.Popen[str]) -> list[str]:
    """Let a process go on from its gate; its remaining lines."""
    output, _ = child.communicate("\n", timeout=60)
    assert child.returncode == 0
    return output.splitlines()


POINTS = [
    *("resolve", "half a file", "before add_blob", "after add_blob", "compile starts"),
    *("before new_compiled", "after new_compiled", "compiling", "before commit_compiled"),
    *("before sync_tree", "after sync_tree", "after commit_compiled", "before discard"),
    *("before write_record", "before write_whole", "after write_whole", "after write_record"),
]


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_leaves_a_store_that_the_next_pull_completes_bit_for_bit(
    store: Repository, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Repository(tmp_path / "reference")
    monkeypatch.setenv("OHMYGPU_HOME", str(reference.home))
    do_pull()
    monkeypatch.setenv("OHMYGPU_HOME", str(store.home))
    with puller("Org/Tiny-GGUF", FAKE_KILL=point) as child:
        child.communicate(timeout=60)
        assert child.returncode == -9
    for record in store.records():  # installed means whole
        assert store.has_compiled(record.compiled_key)
    assert store.scan().damaged == ()
    do_pull()
    assert not list(store.compiled_dir.glob(".tmp-*"))
    collect_garbage(load_settings())
    assert tree(store) == tree(reference)


def test_a_compiler_does_not_outlive_its_killed_parent(tmp_path: Path) -> None:
    with puller("Org/Tiny-GGUF", FAKE_GATE="compiling", FAKE_COMPILER="hang") as child:
        wait_for(child, "gate")
        pid = compiler_pid(tmp_path)
        assert is_alive(pid)
        child.kill()
        child.wait()
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(pid)


def test_two_processes_pull_one_model_once(store: Repository, tmp_path: Path) -> None:
    with puller("Org/Tiny-GGUF", FAKE_GATE="half a file") as first:
        wait_for(first, "gate")
        with puller("org/tiny-gguf") as second:
            wait_for(second, "another process is pulling")
            assert '"done"' in release(first)[-1]
            output, _ = second.communicate(timeout=60)
            assert second.returncode == 0
            assert output.count('"done"') == 1
    assert (tmp_path / "log").read_text().count("fetch") == 1
    assert compiles(tmp_path) == 1
    assert len(store.records()) == 1
    assert list(store.partial_dir.iterdir()) == []


def test_two_names_for_the_same_bytes_compile_once(store: Repository, tmp_path: Path) -> None:
    with puller("org/one", FAKE_GATE="compiling") as first:
        wait_for(first, "gate")
        with puller("org/two") as second:
            wait_for(second, "another process is compiling")
            release(first)
            second.communicate(timeout=60)
            assert second.returncode == 0
    assert compiles(tmp_path) == 1
    assert len(store.records()) == 2


@pytest.mark.parametrize("point", ["half a file", "after add_blob", "compiling", "after sync_tree"])
def test_gc_beside_a_running_pull_takes_nothing_from_it(store: Repository, point: str) -> None:
    with puller("Org/Tiny-GGUF", FAKE_GATE=point) as child:
        wait_for(child, "gate")
        report = collect_garbage(load_settings(), sources=True)
        assert report.freed_bytes == 0
        with pytest.raises(ModelNotFound):
            remove("org/tiny-gguf", load_settings())
        release(child)
    record = store.find("org/tiny-gguf")
    assert store.has_compiled(record.compiled_key)
    assert store.has_blob(record.artifacts[0].sha256, record.artifacts[0].size)
    assert collect_garbage(load_settings()).freed_bytes == 0


def test_importing_install_is_cheap() -> None:
    code = (
        "import sys, ohmygpu.install\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'transformers', 'tokenizers', 'httpx2',"
        " 'huggingface_hub', 'tomlkit'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert result.returncode == 0, result.stderr

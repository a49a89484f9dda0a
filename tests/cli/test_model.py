from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ohmygpu import install
from ohmygpu.client import ModelInfo
from ohmygpu.core.errors import (
    AccessDenied,
    Cancelled,
    ConsentNeeded,
    CorruptFile,
    DiskFull,
    UnsupportedModel,
)
from ohmygpu.core.events import Event, EventSink
from ohmygpu.core.fidelity import Fidelity, save_fidelity
from ohmygpu.core.records import Adapter, Revision
from ohmygpu.core.repository import Repository
from tests.cli.conftest import Result
from tests.cli.fake_daemon import FakeDaemon
from tests.cli.fake_models import install_fake
from tests.core.test_fidelity import FIDELITY

Omg = Callable[..., Result]
FIELDS = {
    "name", "variant", "is_default", "id", "provider", "source", "revision", "recipe", "family",
    "quantization", "parameters", "context_tokens", "target", "has_chat_template", "license",
    "compiled_bytes", "source_bytes", "artifacts", "installed_at", "location", "problem",
    "prompt_graph", "prompt_reason",
    "recipe_reason", "fidelity", "adapter", "kind", "embedding_length",
}  # fmt: skip


def test_list_shows_name_id_size_and_age_with_the_default_variant_bare(
    home: Path, omg: Omg
) -> None:
    first = install_fake(home, "org/Tiny")
    install_fake(home, "org/Tiny", variant="q4", is_default=False, recipe="q4")
    result = omg("list")
    assert result.code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0][:3] == ["NAME", "ID", "SIZE"]
    assert [row[0] for row in rows[1:]] == ["org/Tiny:q4", "org/Tiny"]
    assert rows[2][1] == first.record.digest[:12]
    assert rows[2][2:4] == ["138", "MB"]


def test_list_as_json_has_a_stable_form(home: Path, omg: Omg) -> None:
    model = install_fake(home)
    result = omg("model", "list", "--json")
    (entry,) = json.loads(result.stdout)["models"]
    assert entry["name"] == "org/tiny"
    assert entry["id"] == model.record.digest
    assert entry["revision"] == {"branch": "main", "resolved_commit": "a" * 40}
    assert entry["parameters"] == 134_515_008
    assert entry["context_tokens"] == 2048
    assert entry["problem"] is None
    assert set(entry) == FIELDS


def test_an_empty_list_is_no_data_but_a_hint(omg: Omg) -> None:
    result = omg("ls")
    assert (result.code, result.stdout) == (0, "")
    assert "omg pull" in result.stderr
    assert json.loads(omg("list", "--json").stdout) == {"models": []}


def test_a_damaged_model_is_listed_with_what_is_wrong_and_can_be_removed(
    home: Path, omg: Omg
) -> None:
    model = install_fake(home)
    install_fake(home, "org/whole")
    (Path(str(model.location)) / "compile.json").write_text("{", encoding="utf-8")
    result = omg("list")
    assert result.code == 0
    assert "org/whole" in result.stdout
    assert "damaged" in result.stdout
    assert "pull the model again" in result.stderr
    assert omg("rm", "org/tiny").code == 0
    assert [record.name for record in Repository(home).records()] == ["org/whole"]


def test_info_explains_source_variant_and_location(home: Path, omg: Omg) -> None:
    model = install_fake(home)
    for command in (["model", "info"], ["show"]):
        result = omg(*command, "ORG/Tiny:latest")
        assert result.code == 0
        for text in ("a" * 40, "135M", "2048 tokens", "the default", str(model.location), "269 MB"):
            assert text in result.stdout
    assert json.loads(omg("show", "org/tiny", "--json").stdout)["location"] == model.location


def test_info_says_that_a_text_model_inside_a_larger_one_takes_no_images(
    home: Path, omg: Omg
) -> None:
    install_fake(home, "org/seeing", family="gemma3")
    assert "gemma3 (its text model: images are not taken)" in omg("show", "org/seeing").stdout
    install_fake(home, "org/text", family="gemma3_text")
    assert "images" not in omg("show", "org/text").stdout


def measure(home: Path, model: ModelInfo) -> None:
    save_fidelity(Path(str(model.location)), {"model.onnx": FIDELITY})


def test_info_says_why_the_recipe_was_chosen_and_how_close_it_is(home: Path, omg: Omg) -> None:
    model = install_fake(home, recipe_reason="the default: close to lossless (for cpu on x86_64)")
    shown = omg("show", "org/tiny").stdout
    assert "the default: close to lossless (for cpu on x86_64)" in shown
    assert "not measured; `omg model verify org/tiny` does that" in shown
    measure(home, model)
    shown = omg("show", "org/tiny").stdout
    assert "not measured" not in shown
    for text in ("KL 0.005", "0.003", "0.03", "96.0 %", "12.80", "12.70", "5112 tokens", "text 1"):
        assert text in shown
    data = json.loads(omg("show", "org/tiny", "--json").stdout)
    assert data["fidelity"] == {"model.onnx": asdict(FIDELITY)}
    assert data["recipe_reason"].startswith("the default")


def test_verify_measures_without_a_daemon(
    home: Path, omg: Omg, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = install_fake(home)

    def fake_verify(name: str, *_: Any, sink: EventSink, **__: Any) -> dict[str, Fidelity]:
        sink(Event("measure", "measuring", done_bytes=5, total_bytes=10))
        measure(home, model)
        return {"model.onnx": FIDELITY}

    monkeypatch.setattr("ohmygpu.verify.verify", fake_verify)
    result = omg("model", "verify", "org/tiny")
    assert result.code == 0
    assert "KL 0.005" in result.stdout
    assert "measuring 50%" in result.stderr
    data = json.loads(omg("model", "verify", "org/tiny", "--json").stdout)
    assert data["fidelity"]["model.onnx"]["tokens"] == 5112


def test_verify_and_pull_verify_go_through_a_running_daemon(
    home: Path, fake_daemon: FakeDaemon, omg: Omg
) -> None:
    measure(home, install_fake(home))
    done = {"phase": "done", "message": "", "name": "org/tiny"}
    progress = {"phase": "measure", "message": "", "done_bytes": 5, "total_bytes": 10}
    fake_daemon.pulls.append([progress, done])
    assert "KL 0.005" in omg("model", "verify", "org/tiny").stdout
    assert fake_daemon.requests[-1] == ("POST", "/v1/models/verify", {"model": "org/tiny"})
    fake_daemon.pulls.append([done])
    assert "KL 0.005" in omg("pull", "org/tiny", "--verify").stdout
    assert fake_daemon.requests[-1][2] == {"model": "org/tiny", "verify": True}


def test_verify_of_a_model_that_is_not_there_is_one_sentence(home: Path, omg: Omg) -> None:
    install_fake(home)
    result = omg("model", "verify", "org/tinny")
    assert result.code == 3
    assert "org/tiny" in result.stderr


def test_a_misspelt_name_suggests_the_near_one_with_exit_code_3(home: Path, omg: Omg) -> None:
    install_fake(home)
    for command in (["show", "org/tinny"], ["rm", "org/tinny"]):
        result = omg(*command)
        assert result.code == 3
        assert "org/tiny" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_removing_frees_bytes_and_says_how_many(home: Path, omg: Omg) -> None:
    install_fake(home)
    install_fake(home, "org/other")
    result = omg("rm", "org/tiny", "org/other", "org/tiny")
    assert result.code == 0
    assert [line.split(",")[0] for line in result.stdout.splitlines()] == [
        "removed org/tiny",
        "removed org/other",
    ]
    assert Repository(home).records() == []


def test_nothing_is_removed_when_one_of_the_names_is_wrong(home: Path, omg: Omg) -> None:
    install_fake(home)
    assert omg("rm", "org/tiny", "org/absent").code == 3
    assert len(Repository(home).records()) == 1


def test_removing_goes_through_a_running_daemon(
    home: Path, fake_daemon: FakeDaemon, omg: Omg
) -> None:
    fake_daemon.models.append(install_fake(home))
    result = omg("rm", "org/tiny", "--json")
    assert json.loads(result.stdout) == {
        "removed": [{"name": "org/tiny", "freed_bytes": 138_000_000}]
    }
    assert fake_daemon.paths() == ["DELETE /v1/models/org/tiny"]


def test_gc_reports_what_it_removed_with_and_without_a_daemon(
    home: Path, fake_daemon: FakeDaemon, omg: Omg, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert omg("model", "gc").stdout == "freed 5 MB (2 files that no model uses)\n"
    assert fake_daemon.requests[-1][2] == {"sources": False}
    monkeypatch.setenv("OHMYGPU_SERVER_PORT", "1")
    install_fake(home)
    report = json.loads(omg("model", "gc", "--sources", "--json").stdout)
    assert report["freed_bytes"] == 0
    assert report["damaged"] == []


def test_another_program_on_the_port_does_not_stop_model_commands(
    home: Path, fake_daemon: FakeDaemon, omg: Omg
) -> None:
    install_fake(home)
    fake_daemon.health_text = '{"hello": "world"}'
    result = omg("rm", "org/tiny")
    assert result.code == 0
    assert "another program" in result.stderr


def test_what_needs_the_daemon_exits_with_4_when_another_program_has_its_port(
    fake_daemon: FakeDaemon, omg: Omg
) -> None:
    fake_daemon.health_text = '{"hello": "world"}'
    for arguments in (["serve", "status"], ["ps"], ["chat", "org/tiny", "Hello"]):
        result = omg(*arguments)
        assert result.code == 4, arguments
        assert "another program" in result.stderr


def script(*events: Event) -> list[dict[str, Any]]:
    return [event.to_dict() for event in events]


def test_pull_goes_through_the_daemon_and_ends_with_how_to_talk_to_the_model(
    home: Path, fake_daemon: FakeDaemon, omg: Omg
) -> None:
    install_fake(home)
    fake_daemon.pulls.append(
        script(
            Event("resolve", "looking up org/tiny"),
            Event("download", done_bytes=5, total_bytes=10),
            Event("download", done_bytes=10, total_bytes=10),
            Event("done", name="org/tiny"),
        )
    )
    result = omg("pull", "org/tiny", "--recipe", "q8", "--name", "org/tiny")
    assert result.code == 0
    assert result.stdout == "installed org/tiny (q8, 138 MB)\n"
    assert "downloading 100%" in result.stderr
    assert fake_daemon.requests[-1][2] == {"model": "org/tiny", "recipe": "q8", "name": "org/tiny"}


def test_a_relative_path_reaches_the_daemon_as_an_absolute_one(
    home: Path,
    fake_daemon: FakeDaemon,
    omg: Omg,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_fake(home, "m")
    monkeypatch.chdir(tmp_path)
    fake_daemon.pulls.append(script(Event("done", name="m")))
    assert omg("pull", "./m.gguf").code == 0
    assert fake_daemon.requests[-1][2] == {"model": str(tmp_path / "m.gguf")}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AccessDenied("org/tiny is gated"), 6),
        (UnsupportedModel("no converter for t5; supported: llama"), 7),
        (CorruptFile("the file does not match its hash"), 7),
        (DiskFull("2 GB are needed, 1 GB is free", needed_bytes=2, free_bytes=1), 8),
    ],
)
def test_a_failed_pull_is_one_sentence_and_a_fixed_exit_code(
    fake_daemon: FakeDaemon, omg: Omg, error: Any, code: int
) -> None:
    fake_daemon.pulls.append(script(Event("error", error.message, error=error)))
    result = omg("pull", "org/tiny")
    assert (result.code, result.stdout) == (code, "")
    assert result.stderr == f"Error: {error.message}\n"


def test_a_daemon_that_dies_during_a_pull_is_an_error_that_says_so(
    fake_daemon: FakeDaemon, omg: Omg
) -> None:
    fake_daemon.pulls.append([*script(Event("resolve", "looking up")), {"phase": "cut"}])
    result = omg("pull", "org/tiny")
    assert result.code == 1
    assert "went away" in result.stderr


@pytest.fixture
def pulled(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of install.pull, which installs a fake."""
    calls: list[dict[str, Any]] = []

    def pull(reference: str, settings: object, **arguments: Any) -> object:
        calls.append({"reference": reference, **arguments})
        arguments["sink"](Event("compile", done_bytes=1, total_bytes=1))
        return install_fake(home, reference).record

    monkeypatch.setattr(install, "pull", pull)
    return calls


def test_without_a_daemon_pull_installs_by_itself(omg: Omg, pulled: list[dict[str, Any]]) -> None:
    result = omg("pull", "org/new", "--json")
    assert json.loads(result.stdout)["name"] == "org/new"
    assert pulled[0]["reference"] == "org/new"
    assert "compiling 100%" in result.stderr


def test_an_adapter_goes_with_the_pull_and_its_path_is_absolute(
    omg: Omg, pulled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert omg("pull", "org/new", "--adapter", "./lora").code == 0
    assert omg("pull", "org/new", "--adapter", "org/lora").code == 0
    assert [call["adapter"] for call in pulled] == [str(tmp_path / "lora"), "org/lora"]


def test_info_shows_the_adapter_that_was_merged_in(home: Path, omg: Omg) -> None:
    adapter = Adapter("org/lora", Revision("main", "f" * 40))
    install_fake(home, "org/lora", adapter=adapter)
    assert f"org/lora ({'f' * 40}), merged in" in omg("model", "info", "org/lora").stdout
    shown = json.loads(omg("model", "info", "org/lora", "--json").stdout)
    assert shown["adapter"]["source_ref"] == "org/lora"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HF_TOKEN", "hf_x"),
        ("HF_ENDPOINT", "http://127.0.0.1:2"),
        ("OHMYGPU_MODELS_RECIPE", "q4"),
        ("OHMYGPU_ENGINE_EXECUTION_PROVIDER", "CPU"),
    ],
)
def test_settings_in_this_commands_environment_count_even_when_a_daemon_runs(
    fake_daemon: FakeDaemon,
    omg: Omg,
    pulled: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
) -> None:
    monkeypatch.setenv(variable, value)
    assert omg("pull", "org/new").code == 0
    assert len(pulled) == 1
    assert fake_daemon.paths() == []


def test_a_cancelled_pull_says_that_it_can_go_on(omg: Omg, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(*_: object, cancel: threading.Event, **__: object) -> None:
        raise Cancelled("the pull was cancelled")

    monkeypatch.setattr(install, "pull", pull)
    result = omg("pull", "org/new")
    assert result.code == 130
    assert "goes on from here" in result.stderr


def test_a_reference_that_is_none_is_refused_before_anything_happens(omg: Omg) -> None:
    for reference in ("", "a/b/c", "org/../x", "nonsense"):
        result = omg("pull", reference)
        assert (result.code, result.stdout) == (2, "")
        assert result.stderr.startswith("Error: ")


def test_an_unknown_recipe_reaches_the_user_as_the_daemon_words_it(
    fake_daemon: FakeDaemon, omg: Omg
) -> None:
    fake_daemon.pulls.append(
        script(Event("error", error=UnsupportedModel("there is no recipe q5; use q4 or q8")))
    )
    assert "q4 or q8" in omg("pull", "org/tiny", "--recipe", "q5").stderr


class Consent:
    """A pull that needs the exporter, and somebody who is asked."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.agreed: list[bool] = []

    def pull(self, reference: str, settings: object, **arguments: Any) -> object:
        self.agreed.append(arguments["export"])
        if not arguments["export"]:
            raise ConsentNeeded("290 MB to download; agree with --yes", param="export")
        return install_fake(self.home, reference).record


@pytest.fixture
def consent(home: Path, monkeypatch: pytest.MonkeyPatch) -> Consent:
    found = Consent(home)
    monkeypatch.setattr(install, "pull", found.pull)
    return found


def test_without_a_terminal_a_pull_that_needs_the_exporter_says_what_to_add(
    omg: Omg, consent: Consent
) -> None:
    result = omg("pull", "org/new")
    assert result.code == 2
    assert "--yes" in result.stderr
    assert consent.agreed == [False]


def test_yes_agrees_to_the_exporter_beforehand(omg: Omg, consent: Consent) -> None:
    assert omg("pull", "org/new", "--yes").code == 0
    assert consent.agreed == [True]


@pytest.mark.parametrize(
    ("answer", "code", "asked"), [(True, 0, [False, True]), (False, 130, [False])]
)
def test_at_a_terminal_the_user_is_told_the_size_and_asked(
    omg: Omg,
    consent: Consent,
    monkeypatch: pytest.MonkeyPatch,
    answer: bool,
    code: int,
    asked: list[bool],
) -> None:
    monkeypatch.setattr("ohmygpu.cli.model.is_terminal", lambda stream: True)
    monkeypatch.setattr("click.confirm", lambda *_, **__: answer)
    result = omg("pull", "org/new")
    assert result.code == code
    assert "290 MB to download" in result.stderr
    assert consent.agreed == asked

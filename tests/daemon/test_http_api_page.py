"""docs/http-api.md names what the code takes: held against the code's own tables and routes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ohmygpu.core.errors import OhMyGPUError
from ohmygpu.daemon import embeddings, errors, ollama, openai, options, routes_manage, security
from ohmygpu.daemon.app import create_app
from ohmygpu.daemon.listen import ALLOW_REMOTE
from tests.daemon.fakes import Runtimes, make_services, settings_of

PAGE = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE"}


def section(heading: str) -> str:
    """The text below one heading, up to the next of its rank."""
    start = PAGE.index(f"\n{heading}") + 1
    rank = heading.partition(" ")[0]
    end = re.compile(rf"^#{{2,{len(rank)}}} ", re.MULTILINE).search(PAGE, start + len(heading))
    return PAGE[start : end.start() if end else None]


def words(text: str) -> set[str]:
    """What stands in code type, taken apart at spaces and quotes."""
    spans = re.findall(r"`([^`\n]+)`", text)
    return {word for span in spans for word in re.findall(r"[\w.]+", span)}


OPTIONS = (
    set(options.OPTION_NAMES)
    | set(options._LOAD_INTEGERS)
    | options._LOAD_BOOLEANS
    | set(options._NEUTRAL)
    | {"num_ctx"}
)
FIELDS = [
    ("### `POST /v1/chat", openai._HONOURED | openai._NO_EFFECT | set(openai._NEUTRAL)),
    (
        "### `POST /api/chat",
        ollama._HONOURED_BY["chat"]
        | ollama._HONOURED_BY["generate"]
        | ollama._NO_EFFECT
        | set(ollama._NEUTRAL)
        | {"think", "top_logprobs"}
        | OPTIONS,
    ),
    ("### `POST /v1/embeddings", embeddings._OPENAI | embeddings._NO_EFFECT),
    (
        "### `POST /api/embed`",
        embeddings._OLLAMA["embed"] | embeddings._OLLAMA["embeddings"] | embeddings._NO_EFFECT,
    ),
    *(
        (heading, ollama._MANAGE_FIELDS[api] | set(ollama._MANAGE_NEUTRAL[api]))
        for heading, api in (
            ("### `POST /api/show", "show"),
            ("### `POST /api/pull", "pull"),
            ("### `DELETE /api/delete", "delete"),
        )
    ),
    ("### `POST /v1/models/pull", routes_manage._PULL_FIELDS),
    ("### `POST /v1/models/unload", routes_manage._UNLOAD_FIELDS),
    ("### `POST /v1/models/gc", routes_manage._GC_FIELDS),
]


@pytest.mark.parametrize(("heading", "fields"), FIELDS)
def test_the_page_names_every_field_of_a_request(heading: str, fields: set[str]) -> None:
    assert fields - words(section(heading)) == set()


@pytest.mark.parametrize("heading", ["### `POST /v1/chat", "### `POST /api/chat"])
def test_the_page_lists_fields_without_effect_as_such(heading: str) -> None:
    module = openai if "/v1/" in heading else ollama
    (line,) = re.findall(r"\*\*Without effect\*\*: ([^.]*)\.", section(heading))
    assert words(line) == module._NO_EFFECT


def test_the_page_and_the_application_have_the_same_routes(tmp_path: Path) -> None:
    app = create_app(make_services(settings_of(tmp_path), Runtimes()))
    served = {
        (method, re.sub(r"<[^>]+>", "{model}", rule.rule))
        for rule in app.url_map.iter_rules()
        if rule.endpoint != "static"
        for method in (rule.methods or set()) & _METHODS
    }
    headings = "\n".join(re.findall(r"^### .*$", PAGE, re.MULTILINE))
    assert set(re.findall(r"`([A-Z]+) (/[^`]*)`", headings)) == served


def test_the_page_has_every_error_with_its_status() -> None:
    table = section("## Errors")
    rows = {
        int(status): line
        for line in table.splitlines()
        for status in re.findall(r"\d{3}", line.split("|")[1] if line.startswith("|") else "")
    }
    for kind, status in errors._STATUSES:
        assert kind.code in words(rows[status]), kind
    assert OhMyGPUError.code in words(rows[500])
    for status, name in openai._ERROR_TYPES.items():
        assert status not in rows or name in words(rows[status])


def test_the_page_says_who_may_call() -> None:
    text = section("### Who may call")
    assert f"{ALLOW_REMOTE}=1" in text
    for scheme in security._APP_SCHEMES:
        assert f"`{scheme}://`" in text
    for suffix in security._LOCAL_SUFFIXES:
        assert f"`*{suffix}`" in text

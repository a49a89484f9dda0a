from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ohmygpu.core import errors
from ohmygpu.core.errors import OhMyGPUError
from ohmygpu.core.events import Event


def subclasses(cls: type[OhMyGPUError]) -> Iterator[type[OhMyGPUError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from subclasses(child)


ALL = sorted(set(subclasses(OhMyGPUError)), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", ALL)
def test_an_error_survives_the_wire_with_its_class_and_details(cls: type[OhMyGPUError]) -> None:
    error = cls("it broke", needed_bytes=7, name="a")
    back = OhMyGPUError.from_dict(json.loads(json.dumps(error.to_dict())))
    assert type(back) is cls
    assert back.message == str(back) == "it broke"
    assert back.details == {"needed_bytes": 7, "name": "a"}


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in ALL]
    assert len(codes) == len(set(codes))


def test_every_error_stands_in_the_tree_of_the_docstring() -> None:
    for cls in ALL:
        if cls.__module__ == errors.__name__:  # edges may have errors of their own
            assert cls.__name__ in (errors.__doc__ or "")


def test_an_unknown_code_becomes_the_base_class() -> None:
    back = OhMyGPUError.from_dict({"code": "from_the_future", "message": "x"})
    assert type(back) is OhMyGPUError
    assert back.message == "x"


def test_retry_after_is_read_from_the_details() -> None:
    assert errors.Busy("wait", retry_after_s=2).retry_after_s == 2.0
    assert errors.Busy("wait").retry_after_s is None


def test_an_event_survives_the_wire_with_its_error() -> None:
    event = Event(
        "error", "m", done_bytes=1, total_bytes=2, file="f", error=errors.DiskFull("x", a=1)
    )
    back = Event.from_dict(json.loads(json.dumps(event.to_dict())))
    assert isinstance(back.error, errors.DiskFull)
    assert (back.phase, back.message, back.done_bytes, back.total_bytes, back.file) == (
        "error",
        "m",
        1,
        2,
        "f",
    )
    assert Event("resolve").to_dict() == {"phase": "resolve", "message": ""}

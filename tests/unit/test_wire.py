"""What crosses ranks is JSON: it comes out as it went in, and what is received can do nothing."""

import math
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.checkpoint.index import Held
from dsft.checkpoint.manifest import Damage, Written
from dsft.checkpoint.saver import Outcome
from dsft.checkpoint.trials import Settled
from dsft.comm import wire
from dsft.engine.parts import Part

SENT = [
    None, True, 1, 1.5, -math.inf, 2**80, "a\u2028\ud800", b"\x00\xff", Path("a/b"), [1, (2, {3})],
    {"a": frozenset({1})},
    {1: "a", (1, 2): None}, {"data": [1]}, {"dict": []}, Damage("a", "b"), {"a": Written(1, "b")}, {Part.HEAD: 1.5},
    Outcome(step=3, deleted=(1, 2), settled=Settled("condemned", 6, {"a": "b"})), ({"x"}, None, Damage("a", "b")),
]  # fmt: skip


@pytest.mark.parametrize("value", SENT, ids=repr)
def test_data_come_out_as_they_went_in(value: object) -> None:
    found = wire.understood(wire.spelled(value))
    assert found == value
    assert type(found) is type(value)


class Ours(Enum):
    """Of a test, and not of dsft."""

    A = 1


@pytest.mark.parametrize("value", [ValueError("x"), [KeyError("x")], torch.ones(1), {"a": print}, Damage, Ours.A])
def test_what_is_no_data_is_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match="gather sends data between ranks, got "):
        wire.spelled(value)


NAME = ["dsft.checkpoint.manifest", "Damage"]
HOSTILE: list[Any] = [
    b"", b"{", b"\xff", b"[" * 100_000, b"{}", b'{"a": 1}', b'{"data": 3}', b'{"data": [["os", "system"], {}]}',
    b'{"data": [["dsft.checkpoint.manifest", "Damage"], {"file": "a"}]}',
    b'{"member": [["signal", "Signals"], "SIGKILL"]}',
    b'{"data": [["dsft.checkpoint.manifest", "DamagedError"], {}]}', b'{"data": [["dsft.run", "main"], {}]}',
    b'{"data": [["dsft.checkpoint.manifest", "json"], {}]}', b'{"dict": [[{"dict": []}, 1]]}',
    b'{"path": {"bytes": ""}}',
    b'{"bytes": "%"}', b'{"data": [[["dsft"], "x"], {}]}',
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE, ids=lambda content: content[:70].decode("latin-1"))
def test_what_is_no_message_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        wire.understood(content)


def test_no_constructor_is_called() -> None:
    with pytest.raises(ValueError, match="do not cover"):
        Held("float32", (3,), ())
    said = b'{"data": [["dsft.checkpoint.index", "Held"], {"dtype": "float32", "size": {"tuple": [3]}, "pieces": []}]}'
    assert wire.understood(said).size == (3,)

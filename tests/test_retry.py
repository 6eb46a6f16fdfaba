"""Storage that refuses for a while, and for good."""

from __future__ import annotations

import errno
from itertools import count

import pytest

from moe_compress import retry
from moe_compress.errors import CompressionError
from moe_compress.retry import patiently


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    return slept


def refuse(code: int, wrapped: bool) -> None:
    try:
        raise OSError(code, "refused")
    except OSError as error:
        if not wrapped:
            raise
        raise CompressionError("x: cannot be written (refused)") from error


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_refusal_is_waited_for_longer_and_longer(wrapped: bool, pauses: list[float]) -> None:
    tries = count()

    def write() -> str:
        if next(tries) < 3:
            refuse(errno.EIO, wrapped)
        return "written"

    assert patiently(write) == "written"
    assert pauses == [0.5, 1, 2]


def test_what_refuses_for_good_is_given_up_with_its_own_error(pauses: list[float]) -> None:
    with pytest.raises(CompressionError, match="cannot be written"):
        patiently(refuse, errno.EROFS, True)
    assert pauses == list(retry.DELAYS_S)


def test_what_was_waited_for_inside_is_not_waited_for_again(pauses: list[float]) -> None:
    with pytest.raises(CompressionError):
        patiently(lambda: patiently(refuse, errno.EROFS, True))
    assert pauses == list(retry.DELAYS_S)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOENT])
def test_what_does_not_pass_is_not_waited_for(code: int, pauses: list[float]) -> None:
    with pytest.raises(CompressionError):
        patiently(refuse, code, True)
    assert not pauses


def test_an_error_of_another_kind_is_raised_at_once(pauses: list[float]) -> None:
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 // 0)
    assert not pauses

"""Ctrl-C is no success."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from jobs import cli
from moe_compress import recipe


def test_an_interrupted_command_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "load_recipe", interrupt)
    monkeypatch.setattr(sys, "argv", ["moe-compress", "compress", "recipe.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: interrupted; run the same command again to go on\n"

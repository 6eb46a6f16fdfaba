"""The activation store: what is put in comes out, and no more stays in memory than allowed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_compress.calibration.activations import ActivationStore
from moe_compress.errors import CalibrationError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit_bytes", [0, 1000, 2**20])
def test_spilled_or_kept_the_tensors_are_the_same(tmp_path: Path, dtype: torch.dtype, limit_bytes: int) -> None:
    store = ActivationStore(tmp_path / "spill", limit_bytes)
    tensors = {(f"layer.{i}", i): torch.randn(2, 3 + i, 8, dtype=dtype).mT for i in range(8)}
    for key, tensor in tensors.items():
        store.put(key, tensor)
        assert sum(t.nbytes for t in store._memory.values()) <= limit_bytes
    for key, tensor in tensors.items():
        assert torch.equal(store.get(key), tensor)
        assert torch.equal(store.pop(key), tensor)
        assert key not in store
    assert not list(tmp_path.glob("spill/*"))


def test_the_oldest_is_spilled_first(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, limit_bytes=80)
    for i in range(3):
        store.put(i, torch.full((10,), float(i)))
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [40]
    store.pop(2)
    store.put(3, torch.zeros(10))
    assert len(list(tmp_path.iterdir())) == 1, "memory given up is free again"
    store.pop(0)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CalibrationError, match=r"cannot spill 40 bytes.*activation_memory_gb") as raised:
        ActivationStore(tmp_path / "file", 0).put(0, torch.zeros(10))
    assert "\n" not in str(raised.value)


def test_a_disk_that_fails_for_a_while_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore(tmp_path, 0)
    store.put("a", torch.arange(3.0))
    monkeypatch.setattr("moe_compress.retry.time.sleep", lambda seconds: None)
    opened, failures = Path.open, [errno.EIO, errno.ESTALE]

    def unsteady(*args: Any) -> Any:
        if failures:
            raise OSError(failures.pop(), "trouble")
        return opened(*args)

    monkeypatch.setattr(Path, "open", unsteady)
    assert store.pop("a").tolist() == [0, 1, 2]
    assert not failures


def test_a_file_that_lost_its_end_is_not_read(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, 0)
    store.put("a", torch.arange(3.0))
    (file,) = tmp_path.iterdir()
    os.truncate(file, 8)
    with pytest.raises(CalibrationError, match="shorter than they were written"):
        store.get("a")

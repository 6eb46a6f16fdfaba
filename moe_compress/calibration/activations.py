"""Keeps the activations between layers: in memory up to a limit, on disk beyond it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..retry import patiently


class ActivationStore:
    """A dictionary of tensors that spills its oldest entries to files.

    The backward sweep comes back to the layers last first, so the oldest entry is the one needed last.

    Args:
        folder: where spilled tensors go; made when first needed.
        limit_bytes: how much may stay in memory.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._memory: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._disk: dict[Hashable, tuple[Path, torch.dtype, torch.Size, torch.device]] = {}
        self._used_bytes = 0
        self._num_spilled = 0

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Stores a tensor under `key`, which must be free."""
        self._memory[key] = tensor
        self._used_bytes += tensor.nbytes
        while self._used_bytes > self.limit_bytes and self._memory:
            oldest = next(iter(self._memory))
            self._spill(oldest, self._memory[oldest])
            self._used_bytes -= self._memory.pop(oldest).nbytes

    def get(self, key: Hashable) -> Tensor:
        """The tensor under `key`, which stays stored."""
        return self._memory[key] if key in self._memory else self._read(key)

    def pop(self, key: Hashable) -> Tensor:
        """The tensor under `key`, which is given up."""
        tensor = self.get(key)
        self.drop(key)
        return tensor

    def drop(self, key: Hashable) -> None:
        """Gives up the tensor under `key` unread."""
        if key in self._memory:
            self._used_bytes -= self._memory.pop(key).nbytes
        else:
            self._disk.pop(key)[0].unlink()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._memory or key in self._disk

    def _spill(self, key: Hashable, tensor: Tensor) -> None:
        path = self.folder / f"{self._num_spilled}.bin"
        self._num_spilled += 1
        try:
            patiently(self._write, path, tensor)
        except OSError as error:
            raise CalibrationError(
                f"{path}: cannot spill {tensor.nbytes} bytes of activations: {error.strerror or error};"
                " free disk space or raise calibration.activation_memory_gb, then run the job again"
            ) from error
        self._disk[key] = (path, tensor.dtype, tensor.shape, tensor.device)

    def _write(self, path: Path, tensor: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tofile(path)

    def _read(self, key: Hashable) -> Tensor:
        path, dtype, shape, device = self._disk[key]
        raw = torch.empty(shape, dtype=dtype)
        patiently(self._fill, path, raw)
        return raw.to(device)

    def _fill(self, path: Path, raw: Tensor) -> None:
        with path.open("rb") as file:
            if file.readinto(raw.view(torch.uint8).numpy().data) != raw.nbytes:
                raise CalibrationError(
                    f"{path}: spilled activations are shorter than they were written; check the disk and run the job"
                    " again"
                )

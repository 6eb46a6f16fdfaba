"""How fast this machine multiplies and diagonalises, measured in a fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

from ..calibration.worker import pick_device
from ..errors import RecipeError

EIGEN = "eigendecomposition"
_BUDGET_S = 0.1
_EIGEN_SIZE = 256


def measure_speed(dtypes: Iterable[torch.dtype], threads: int, device: str) -> dict[str, float]:
    """FLOP/s of square matrix products in each dtype, and of a symmetric eigendecomposition, 9 n^3 operations.

    Raises:
        RecipeError: this machine has no such device; a recipe for a cluster names that of its nodes.
    """
    place = pick_device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"cluster.device: '{device}' is not to be had here; give --gpus and --gpu, or set it to auto")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    size = 4096 if place.type == "cuda" else 512
    try:
        speed = {}
        for dtype in dict.fromkeys(dtypes):
            square = torch.ones(size, size, dtype=dtype, device=place)
            speed[str(dtype).removeprefix("torch.")] = 2 * size**3 / _best_s(partial(square.mm, square), place)
        symmetric = torch.randn(_EIGEN_SIZE, _EIGEN_SIZE, generator=torch.Generator().manual_seed(0)).to(place)
        symmetric = symmetric @ symmetric.T
        speed[EIGEN] = 9 * _EIGEN_SIZE**3 / _best_s(partial(torch.linalg.eigh, symmetric), place)
        return speed
    finally:
        torch.set_num_threads(before)


def _best_s(function: Callable[[], object], place: torch.device) -> float:
    """Shortest of the calls that fit in the time budget, at least two."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < _BUDGET_S:
        start = time.perf_counter()
        function()
        if place.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)

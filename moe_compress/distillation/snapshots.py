"""The state of a training on disk: what it goes on from when it was killed.

A folder `step-000100` holds the parts that each process wrote, safetensors by the names of parameters (engine.py), and
appears under its name when all of them are on disk. It loads on any number of processes and at any ZeRO stage.
"""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, distributed

from ..checkpoint.writer import atomic_write, write_shard
from ..errors import DistillationError
from .engine import MASTER, MOMENTS, Engine
from .sparsity import ColumnPruner

BEST_NAME = "best.safetensors"
LAYERS_NAME = "layers.json"
"""The layers' specifications that belong to the best weights, where pruning changed them; else null."""

_POINTER = "latest.json"
_CLAIM = "claim"
_EXTRA = "extra.safetensors"
_PART_BYTES = 2**30


@dataclass(slots=True)
class Progress:
    """How far a training is.

    Attributes:
        step: optimizer steps done.
        best: loss on the held-out sequences of the weights that are kept so far, the lowest unless the last are
            wanted; None before the first.
        best_step: when that was.
        seconds: of training, all runs together.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    validation: list[dict[str, float]] = field(default_factory=list)


class Claim:
    """Says that the processes of this run alone write into a training's folder.

    Processes may live on for a while when their driver was killed, or where their node was given up for lost. Others
    begin in the meantime; then they must write nothing more.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._token = folder / _CLAIM, secrets.token_hex(8)
        atomic_write(self._path, self._token)

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            DistillationError: others have begun.
        """
        if self._path.read_text() != self._token:
            raise DistillationError(f"{self._path.parent}: another run goes on with this training; wait for it")


def save_snapshot(folder: Path, engine: Engine, progress: Progress, extra: dict[str, Tensor]) -> None:
    """Writes the state after a step and removes that of earlier ones; all processes must call it.

    Args:
        folder: of the training.
        engine: what holds the state; process i writes every i-th parameter.
        progress: so far.
        extra: further tensors, the same on all processes.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    name = f"step-{progress.step:06d}"
    partial = folder / f"{name}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    held: dict[str, Tensor] = {}
    num_parts = 0

    def write() -> None:
        nonlocal held, num_parts
        write_shard(partial / f"part-{rank:05d}-{num_parts:05d}.safetensors", held)
        held, num_parts = {}, num_parts + 1

    for index, (parameter, state) in enumerate(engine.state()):
        if index % world == rank:
            held |= {f"{kind}.{parameter}": tensor.float().contiguous() for kind, tensor in state.items()}
            if sum(tensor.nbytes for tensor in held.values()) >= _PART_BYTES:
                write()
    if held:
        write()
    distributed.barrier()
    if rank == 0:
        if extra:
            write_shard(partial / _EXTRA, extra)
        target = folder / name
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        atomic_write(folder / _POINTER, json.dumps({"name": name, **asdict(progress)}, indent=2) + "\n")
        for earlier in folder.glob("step-*"):
            if earlier != target:
                shutil.rmtree(earlier, ignore_errors=True)
    distributed.barrier()


def read_progress(folder: Path) -> tuple[Path | None, Progress]:
    """The folder of the latest state, and how far it was; None and nothing for a training that begins."""
    pointer = folder / _POINTER
    if not pointer.exists():
        return None, Progress()
    found = json.loads(pointer.read_text())
    return folder / Path(found.pop("name")).name, Progress(**found)


def load_snapshot(snapshot: Path, engine: Engine, progress: Progress) -> dict[str, Tensor]:
    """Puts a state into an engine, one parameter at a time; all processes must call it.

    Returns:
        the further tensors.
    """
    where: dict[str, Path] = {}
    for part in sorted(snapshot.glob("part-*.safetensors")):
        with safe_open(part, "pt") as file:
            where |= dict.fromkeys(file.keys(), part)

    def read(name: str) -> dict[str, Tensor]:
        state = {}
        for kind in (MASTER, *MOMENTS):
            key = f"{kind}.{name}"
            with safe_open(where[key], "pt") as file:
                state[kind] = file.get_tensor(key)
        return state

    engine.load_state(progress.step, read)
    extra = snapshot / _EXTRA
    return load_file(extra) if extra.exists() else {}


def save_best(folder: Path, engine: Engine, pruner: ColumnPruner | None) -> None:
    """Keeps the weights as they are as the best so far, without what is pruned; all processes must call it."""
    weights = engine.weights()
    if distributed.get_rank() == 0:
        layers = None
        if pruner is not None:
            weights, layers = pruner.compact(weights)
        write_shard(folder / BEST_NAME, weights)
        atomic_write(folder / LAYERS_NAME, json.dumps(layers) + "\n")
    distributed.barrier()


def remove_snapshots(folder: Path) -> None:
    """What a finished training needs no more."""
    for snapshot in folder.glob("step-*"):
        shutil.rmtree(snapshot, ignore_errors=True)
    for name in (_POINTER, _CLAIM):
        (folder / name).unlink(missing_ok=True)


def all_sum(values: list[float], device: torch.device) -> list[float]:
    """Sums over all processes, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return [float(value) for value in total]

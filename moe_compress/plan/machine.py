"""What a cluster of GPUs is taken to be able to do: a table of GPUs, and assumptions about all around them.

Nothing here is measured on the cluster that is planned. A peak is what a data sheet promises, an efficiency is the
fraction of it that the kind of work is taken to reach, and every one of them can be given (`--assume`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any

import torch

from ..errors import RecipeError
from .speed import EIGEN, measure_speed

MEASURED = "measured"
"""Name of the GPU of this machine, whose speeds are measured here."""

TF32 = "tf32"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peaks of one GPU.

    Attributes:
        half, tf32, single: FLOP/s of dense matrix products in bf16 or fp16, in TF32, and in fp32.
        memory_bytes: on the device.
    """

    half: float
    tf32: float
    single: float
    memory_bytes: int


GPUS = {
    "a100": Gpu(312e12, 156e12, 19.5e12, 80_000_000_000),
    "h100": Gpu(989e12, 494e12, 67e12, 80_000_000_000),
    "h200": Gpu(989e12, 494e12, 67e12, 141_000_000_000),
    "b200": Gpu(2250e12, 1125e12, 75e12, 180_000_000_000),
    "l40s": Gpu(362e12, 183e12, 91.6e12, 48_000_000_000),
    "l4": Gpu(121e12, 60e12, 30.3e12, 24_000_000_000),
}
"""NVIDIA's data sheets, without sparsity; the SXM module where there are several, A100 of 80 GB."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """About a cluster. Bytes a second are of one node, all its processes together.

    Attributes:
        node_gpus: GPUs a node.
        storage: bytes/s from and to what all nodes see; 2.5 GB/s is a link of 25 Gbit/s at 80 %.
        network: bytes/s between nodes; 10 GB/s is 100 Gbit/s at 80 %.
        disk: bytes/s of a node's own disk; 3 GB/s is one NVMe drive.
        hashing, checking: bytes/s on a core of SHA-256, and of that and a look for NaN; measured on a server's core.
        node_cores: cores of a node that hash side by side.
        half, single, eigen: fractions of the peak that the layers' products in half precision, those in TF32 and fp32,
            and eigendecompositions (of the peak in fp32) reach. Guesses on the low side: experts see few tokens each.
        allocating: directions/s that the budget is spent on, in the driver; measured likewise.
    """

    node_gpus: int = 8
    storage: float = 2.5e9
    network: float = 10e9
    disk: float = 3e9
    hashing: float = 1e9
    checking: float = 0.67e9
    node_cores: int = 32
    half: float = 0.3
    single: float = 0.5
    eigen: float = 0.02
    allocating: float = 3e6


@dataclass(frozen=True, slots=True)
class Machine:
    """A cluster that is planned for.

    Attributes:
        gpu: name in `GPUS`, or `measured`.
        num_gpus: of the whole cluster.
        memory_bytes: of one GPU; None where it is not known.
        speed: FLOP/s that one GPU is taken to reach by kind of work, as `measure_speed` names them, and `tf32`.
        assumed: all else.
    """

    gpu: str
    num_gpus: int
    memory_bytes: int | None
    speed: dict[str, float]
    assumed: Assumptions

    @property
    def num_nodes(self) -> int:
        """Nodes, the last one perhaps not full."""
        return ceil(self.num_gpus / self.assumed.node_gpus)


def machine_of(gpu: str, num_gpus: int, assume: Sequence[str] = ()) -> Machine:
    """A cluster of one kind of GPU.

    Args:
        gpu: name in `GPUS`; `measured` for that of this machine.
        num_gpus: how many.
        assume: `name=value` for fields of `Assumptions`.

    Raises:
        RecipeError: there is no such GPU or assumption.
    """
    if gpu not in (*GPUS, MEASURED):
        raise RecipeError(f"--gpu '{gpu}': not in the table; known: {', '.join(GPUS)}, {MEASURED}")
    assumed = Assumptions()
    for text in assume:
        assumed = _assume(assumed, text)
    if gpu == MEASURED:
        memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        return Machine(gpu, num_gpus, memory, measure_speed((torch.float32, torch.bfloat16), 1, "auto"), assumed)
    peak = GPUS[gpu]
    speed = {
        "float32": peak.single * assumed.single,
        "bfloat16": peak.half * assumed.half,
        "float16": peak.half * assumed.half,
        TF32: peak.tf32 * assumed.single,
        EIGEN: peak.single * assumed.eigen,
    }
    return Machine(gpu, num_gpus, peak.memory_bytes, speed, assumed)


def _assume(assumed: Assumptions, text: str) -> Assumptions:
    name, separator, value = text.partition("=")
    known = {field.name: field.default for field in fields(Assumptions)}
    if not separator or name not in known:
        raise RecipeError(f"--assume '{text}': not of the form name=value; the names are: {', '.join(known)}")
    kind: Any = type(known[name])
    try:
        number = kind(float(value))
    except (ValueError, OverflowError):
        number = 0
    if not 0 < number < float("inf"):
        raise RecipeError(f"--assume '{text}': '{value}' is no number above 0; give one, such as {known[name]:g}")
    return replace(assumed, **{name: number})

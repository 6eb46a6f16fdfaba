"""What a method asks of the stages: units to run on each layer, one decision for all, shards to write.

A scheme lives in the driver and reads no weights: its units do, wherever the executor runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..executor import Executor, Ref
from ..progress import Reporter


@dataclass(frozen=True, slots=True)
class Work:
    """A unit of work and what to call it with; a unit that writes a shard takes its path besides, as the last."""

    unit: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass(slots=True)
class Decision:
    """What becomes of every layer.

    Attributes:
        layers: experts path -> its entry in `quantization_config`, if the checkpoint is of our own format.
        config: fields of config.json that change, by path ("text_config.num_experts").
        replaced: names in memory of the tensors that the shards write anew.
        shards: the work that writes them.
        provenance: experts path -> what the manifest says of it.
        expert_parameters: routed-expert parameters that are left.
        diagnostics: tables that the shards' work leaves beside them.
        levels: names of the levels that the checkpoint can be loaded at, the largest first, if it has several.
    """

    layers: dict[str, dict[str, Any]]
    config: dict[str, Any]
    replaced: set[str]
    shards: list[Work]
    provenance: dict[str, dict[str, Any]]
    expert_parameters: int
    diagnostics: list[Path] = field(default_factory=list)
    levels: list[str] = field(default_factory=list)


Pending = list[Ref]
"""Analyses of all layers, under way since their statistics were there."""


class Scheme(Protocol):
    """One method applied to one checkpoint."""

    def analyses(self, path: str) -> list[Work]:
        """Units that run as soon as the statistics of the experts at `path` are there; done ones left out."""

    def decide(self, pending: Pending, executor: Executor, reporter: Reporter) -> Decision:
        """Waits for the analyses and decides."""


def run_all(name: str, works: Iterable[Work], executor: Executor, reporter: Reporter) -> None:
    """Runs units side by side under a progress line."""
    wait_for(name, [executor.submit(work.unit, *work.args) for work in works], executor, reporter)


def wait_for(name: str, refs: list[Ref], executor: Executor, reporter: Reporter) -> None:
    """Waits under a progress line for units that are under way."""
    with reporter.stage(name, len(refs)) as stage:
        for _ in executor.results(refs):
            stage.advance()

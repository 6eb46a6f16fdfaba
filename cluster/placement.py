"""Where layer workers and units of work run: what they need, and which node is preferred."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True, slots=True)
class Needs:
    """What a process holds while it lives, as Ray counts it.

    Attributes:
        num_cpus: threads.
        num_gpus: a fraction shares a GPU with others.
        memory: bytes; 0 asks for none.
    """

    num_cpus: int
    num_gpus: float = 0
    memory: int = 0

    def options(self) -> dict[str, Any]:
        """Of a task or an actor."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "memory": self.memory or None}

    def room_on(self, resources: dict[str, float]) -> int:
        """How many such processes fit into a node's resources."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory}
        return min(int(resources.get(kind, 0) / count) for kind, count in wanted.items() if count)

    def __str__(self) -> str:
        parts = [f"{self.num_cpus} CPU"]
        parts += [f"{self.num_gpus:g} GPU"] if self.num_gpus else []
        parts += [f"{self.memory / 2**30:.1f} GiB of memory"] if self.memory else []
        return ", ".join(parts)


def alive_nodes() -> dict[str, dict[str, float]]:
    """Resources of the nodes that are there now, by id."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def room_for(needs: Needs) -> int:
    """How many such processes the cluster as it is now has room for."""
    return sum(needs.room_on(resources) for resources in alive_nodes().values())


def pause_s(num_losses: int) -> float:
    """How long to wait before what was lost so often starts again: what kills it may pass, or be elsewhere."""
    return min(30.0, 0.5 * 2.0 ** (num_losses - 1))


def strategy(placement: Literal["spread", "pack"], needs: Needs, taken: Iterable[str]) -> Any:
    """Which node the next of several equal processes goes to; another, if that has no room after all.

    Args:
        placement: of all of them.
        needs: of each.
        taken: ids of the nodes that the others are on, or go to.
    """
    if placement == "spread":
        return "SPREAD"
    counts = Counter(taken)
    nodes = {node: needs.room_on(resources) for node, resources in alive_nodes().items()}
    free = [node for node, room in nodes.items() if room > counts[node]]
    if not free:
        return "DEFAULT"
    return NodeAffinitySchedulingStrategy(max(free, key=lambda node: (counts[node], nodes[node])), soft=True)

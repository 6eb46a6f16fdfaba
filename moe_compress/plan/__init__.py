"""What a recipe would do, from config.json and index alone: sizes, ranks, memory, disk, network, operations, time.

No tensor is read, and neither shards nor index need be there (layout.py). Every figure is an estimate with its formula
beside it: sizes (sizes.py) are exact but for what calibration decides, costs (costs.py) are for the largest layer and a
whole text, hours on a cluster (timeline.py) are lower bounds under the assumptions of machine.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from ..method_options import D2MoE
from ..methods.limits import highest_ratio
from ..model.discovery import MoELayer
from ..model.skeleton import Skeleton
from ..recipe import Recipe
from ..stages.prepare import open_original
from .costs import Workload
from .layout import open_layout
from .machine import Machine
from .outcome import outcome
from .shape import describe
from .sizes import Part, SlotSize, part_sizes, slot_sizes
from .speed import measure_speed
from .tables import tables
from .timeline import Timeline, timeline
from .training import TrainingCosts, TrainingPlan, student_of


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job would do.

    Attributes:
        model, model_type: the original.
        num_layers, num_moe_layers: decoder layers, and those with routed experts.
        num_experts, top_k: of the largest MoE layer, and experts a token.
        active_parameters: what a token is multiplied with, its embedding left out.
        ratio: fraction of the routed-expert parameters to remove; None keeps every direction.
        highest_ratio: of a factorisation; the ratio must stay below it.
        note: what calibration decides.
        parts: parameters and bytes by part, before and after.
        slots: ranks of each kind of factorised projection.
        num_workers: layer workers of the calibration.
        memory_bytes: process -> what it holds at its peak; their sum is the peak.
        disk_bytes: what the job leaves or spills, by kind.
        network_bytes: hidden states and gradients that go from worker to worker.
        flops: operations of each stage.
        seconds: the same at the speed of this machine, all workers busy.
        speed: FLOP/s measured here, each worker's; of a cluster that is planned for, those assumed of a GPU.
        problems: what a job would refuse, a line each; the plan is then of what it would take.
        cluster: hours, memory and bytes on the cluster that is planned for; None where it is this machine.
        training: of the recipe's `distillation`; None where there is none.
    """

    model: str
    model_type: str
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    active_parameters: int
    ratio: float | None
    highest_ratio: float | None
    note: str
    parts: list[Part]
    slots: list[SlotSize]
    num_workers: int
    memory_bytes: dict[str, dict[str, int]]
    disk_bytes: dict[str, int]
    network_bytes: int
    flops: dict[str, float]
    seconds: dict[str, float]
    speed: dict[str, float]
    problems: list[str]
    cluster: Timeline | None
    training: TrainingPlan | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the totals of the parts."""
        fields = ("parameters", "num_bytes", "parameters_after", "bytes_after")
        return asdict(self) | {"total": {field: sum(getattr(p, field) for p in self.parts) for field in fields}}

    def show(self, console: Console) -> None:
        """Prints tables for a person."""
        for part in tables(self.to_dict()):
            console.print(part, highlight=False, markup=False)


def make_plan(recipe: Recipe, machine: Machine | None = None) -> Plan:
    """Plans a job; of the original only config.json and the index (or the headers) are read, the index if it is there.

    Args:
        recipe: the job.
        machine: the cluster to plan for; None for this machine.

    Raises:
        RecipeError: the ratio cannot be reached.
        CheckpointError: the model is not a MoE checkpoint we know.
    """
    with open_layout(recipe.model) as (reader, problems, num_predicting):
        skeleton, layers = open_original(recipe, reader)
        model = describe(skeleton, layers)
        result = outcome(skeleton.model, layers, recipe.method)
        parts = part_sizes(skeleton, layers, result.kept_parameters, num_predicting * model.largest_layer)
    before, after = (sum(getattr(part, field) for part in parts) for field in ("num_bytes", "bytes_after"))
    work = Workload(recipe, model, result, after, machine)
    training = None
    if recipe.distillation is not None:
        student = student_of(skeleton.model, model, result, recipe.distillation, after)
        training = TrainingCosts(recipe.distillation, student, model, before, machine)
    if machine is None:
        dtypes = [torch.float32, work.dtype, *([] if training is None else [training.dtype])]
        speed = measure_speed(dtypes, recipe.cluster.threads, recipe.cluster.device)
    else:
        speed = machine.speed
        problems += _too_many_workers(recipe, machine)
    flops = work.flops()
    return Plan(
        model=recipe.model,
        model_type=skeleton.model.config.model_type,
        num_layers=len(skeleton.layers),
        num_moe_layers=len(layers),
        num_experts=max(layer.num_experts for layer in layers),
        top_k=model.top_k,
        active_parameters=model.active_parameters,
        ratio=recipe.method.ratio,
        highest_ratio=highest_ratio(layers, recipe.method) if isinstance(recipe.method, D2MoE) else None,
        note=result.note,
        parts=parts,
        slots=slot_sizes(result),
        num_workers=work.num_workers,
        memory_bytes=work.memory_bytes(),
        disk_bytes=work.disk_bytes(),
        network_bytes=work.network_bytes(),
        flops=flops,
        seconds={name: work.seconds(name, count, speed) for name, count in flops.items()},
        speed=speed,
        problems=problems,
        cluster=None if machine is None else timeline(work, machine, before),
        training=None if training is None else training.plan(speed),
    )


def known_flops(recipe: Recipe, skeleton: Skeleton, layers: list[MoELayer]) -> dict[str, float]:
    """Operations of the stages that the plan counts by themselves, by the names they run under."""
    result = outcome(skeleton.model, layers, recipe.method)
    work = Workload(recipe, describe(skeleton, layers), result, bytes_after=0)
    sweep = sum(count for name, count in work.flops().items() if name.startswith("calibrate")) / work.passes
    return {"calibrate": sweep, "calibrate again": sweep}


def _too_many_workers(recipe: Recipe, machine: Machine) -> list[str]:
    asked = recipe.cluster.layer_workers
    if asked is None or asked <= machine.num_gpus:
        return []
    return [f"cluster.layer_workers: {asked} workers need a GPU each and there are {machine.num_gpus}; lower it"]

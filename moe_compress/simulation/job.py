"""A whole job in virtual time, from config.json alone: calibrate, allocate, compress, evaluate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from ..calibration.text import TokenBatch
from ..calibration.worker import Description
from ..errors import RecipeError
from ..job import Job
from ..plan.costs import Workload
from ..plan.layout import open_layout
from ..plan.machine import Machine
from ..plan.outcome import outcome
from ..plan.shape import describe
from ..plan.sizes import part_sizes
from ..progress import Reporter
from ..recipe import Recipe
from ..stages.calibrate import calibrate
from ..stages.compress import compress_layers
from ..stages.evaluate import run_evaluation
from ..stages.prepare import Prepared, open_original
from ..stages.schemes import scheme_of
from .clock import Clock, Faults, Gpus
from .costs import Costs, planned_costs
from .executor import SimulatedExecutor
from .pool import Traffic
from .units import leave_statistics, stubs

METHODS = ("d2moe", "prune")
"""Whose units have stand-ins."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """What came of it.

    Attributes:
        num_layers, num_moe_layers, num_experts: of the model.
        stages: virtual seconds of each.
        seconds: of all of them together.
        busy: fraction of that which each GPU spent computing.
        traffic: of all of it.
        num_steps, num_units: done, those included that were done again.
        num_deaths: of GPUs' processes, used or not; num_again: steps and units that were done again.
        driver_s: real seconds that the driver itself took, by stage.
        experts_kept: parameters of routed experts that the decision leaves.
    """

    num_layers: int
    num_moe_layers: int
    num_experts: int
    stages: dict[str, float]
    seconds: float
    busy: list[float]
    traffic: Traffic
    num_steps: int
    num_units: int
    num_deaths: int
    num_again: int
    driver_s: dict[str, float]
    experts_kept: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def dry_run(recipe: Recipe, machine: Machine, faults: Faults | None = None, costs: Costs | None = None) -> DryRun:
    """Drives the stages of a job over a cluster that is not there.

    Args:
        recipe: the job; of its model config.json is read.
        machine: the cluster.
        faults: what goes wrong; None for nothing.
        costs: what steps and units take; None for what the plan says.

    Raises:
        RecipeError: the method has no stand-ins.
        CalibrationError, CompressionError: too much went wrong at one place.
    """
    if recipe.method.name not in METHODS or recipe.method.sequential:
        raise RecipeError(f"method.name: '{recipe.method.name}' has no dry run; give one of {', '.join(METHODS)}")
    with TemporaryDirectory() as folder, open_layout(recipe.model) as (reader, _, num_predicting):
        skeleton, layers = open_original(recipe, reader)
        shape, result = describe(skeleton, layers), outcome(skeleton.model, layers, recipe.method)
        parts = part_sizes(skeleton, layers, result.kept_parameters, num_predicting * shape.largest_layer)
        work = Workload(recipe, shape, result, sum(part.bytes_after for part in parts), machine)
        costs = costs or planned_costs(work, machine, sum(part.num_bytes for part in parts))
        recipe = recipe.model_copy(update={"job_dir": folder, "output": str(Path(folder) / "output")})
        job = Job(recipe)
        prepared = Prepared(
            recipe=recipe,
            reader=reader,
            skeleton=skeleton,
            layers=layers,
            source_digest="",
            calibration_tokens=_tokens(Path(folder) / "calibration.safetensors", work.num_tokens, recipe.calibration),
            statistics=job.place("statistics"),
            evaluation_tokens=None,
        )
        names, size = list(skeleton.layers), work.resident_layers
        chunks = [names[i : i + size] for i in range(0, len(names), size)]
        token_bytes = shape.hidden_size * work.dtype.itemsize
        batches = TokenBatch.load(prepared.calibration_tokens).batches(recipe.calibration.batch_size)
        clock = Clock()
        assumed = machine.assumed
        bandwidths = assumed.storage, assumed.network
        gpus = Gpus(clock, machine.num_gpus, assumed.node_gpus, *bandwidths, faults or Faults())
        executor = SimulatedExecutor(
            gpus,
            clock,
            costs,
            stubs(layers),
            work.num_workers,
            Description(chunks, True, token_bytes),
            [batch.input_ids.numel() * token_bytes for batch in batches],
            lambda chunk: leave_statistics(
                prepared.statistics, [layer for layer in layers if skeleton.owner(layer.path) in chunks[chunk]]
            ),
            packs=recipe.cluster.placement == "pack",
            memory_bytes=machine.memory_bytes or 0,
        )
        reporter, watch = Reporter(job, Console(quiet=True)), _Watch(clock)
        scheme = scheme_of(job, prepared)
        with watch.stage("calibrate"):
            pending = calibrate(job, prepared, scheme, executor, reporter)
        with watch.stage("allocate"):
            decision = scheme.decide(pending, executor, reporter)
        with watch.stage("compress"):
            compress_layers(job, prepared, decision, executor, reporter)
        if (settings := recipe.evaluation) is not None and work.num_evaluation_batches():
            length = settings.sequence_length * settings.batch_size * work.num_evaluation_batches()
            windows = _tokens(Path(folder) / "windows.safetensors", length, settings)
            how = (windows, settings.batch_size, settings.dtype, "auto", executor, reporter)
            with watch.stage("evaluate"):
                run_evaluation(recipe.output_path, reader.folder, *how)
    calibrated = reporter.stages["calibrate"]
    return DryRun(
        num_layers=len(names),
        num_moe_layers=len(layers),
        num_experts=max(layer.num_experts for layer in layers),
        stages=watch.virtual_s,
        seconds=clock.now,
        busy=[busy / clock.now for busy in gpus.busy_s],
        traffic=executor.traffic,
        num_steps=executor.traffic.num_steps,
        num_units=executor.num_units,
        num_deaths=gpus.num_deaths,
        num_again=executor.num_again + int(calibrated.get("steps_again", 0)),
        driver_s=watch.real_s,
        experts_kept=decision.expert_parameters,
    )


def _tokens(path: Path, num_tokens: int, text: Any) -> Path:
    """A text of nothing but the first token."""
    ids = torch.zeros(num_tokens // text.sequence_length, text.sequence_length, dtype=torch.int64)
    TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool)).save(path)
    return path


class _Watch:
    """Times the stages, in virtual seconds and in the driver's own."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.virtual_s: dict[str, float] = {}
        self.real_s: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One of them."""
        virtual, real = self._clock.now, time.process_time()
        yield
        self.virtual_s[name] = self._clock.now - virtual
        self.real_s[name] = time.process_time() - real

"""What the training of a recipe would take: parameters, memory by process and ZeRO stage, disk, network, time.

Symbols: N parameters of the student and T of them trained, P processes, w bytes of an element in the dtype computed in,
n tokens trained on, b of a micro-batch, A parameters that a token is multiplied with. A forward pass is 2 n A
operations, the gradient of the inputs as many, that of the weights 2 n times the trained ones among A.

The student is what the method leaves of the original: experts of `kept` parameters, top_k of them a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil

import torch
from torch import nn

from ..distillation.order import Order, num_micro_batches
from ..distillation.parameters import router_parameters
from ..distillation_options import Distillation
from ..errors import RecipeError
from ..methods.limits import num_bases
from ..methods.slots import slots
from ..model.expert_bank import GROUPS
from .costs import PROCESS_BYTES
from .machine import Machine
from .outcome import Outcome
from .shape import ModelShape
from .timeline import StageTime, stage_time, too_large

_STATE_BYTES = 12
"""Of a trained parameter: its float32 master and two moments."""


@dataclass(frozen=True, slots=True)
class Student:
    """What is trained.

    Attributes:
        parameters, trained: N and T.
        active, trained_active: A, and those of it that are trained.
        num_bytes: on disk.
        note: what cannot be known before calibration.
    """

    parameters: int
    trained: int
    active: int
    trained_active: int
    num_bytes: int
    note: str


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What a training would take.

    Attributes:
        parameters, trained_parameters: of the student.
        note: what cannot be known before calibration.
        num_processes, zero_stage: how it is spread; in bf16 the optimizer's state always is.
        steps, tokens: optimizer steps, and tokens that they see.
        memory_bytes: of one process, by what holds it; on its GPU but for the libraries and what is offloaded.
        host_bytes: of these in the memory of the node.
        first_process_bytes: besides on the node of the first process when the best weights are kept: all of them.
        disk_bytes: what it leaves in the job folder, by kind.
        network_bytes: from process to process.
        flops: operations by stage; seconds: the same with every process busy.
        stages: on the cluster that is planned for; nothing where it is this machine.
        hours, gpu_hours: of these.
        warnings: what makes the cluster a bad choice.
    """

    parameters: int
    trained_parameters: int
    note: str
    num_processes: int
    zero_stage: int
    steps: int
    tokens: int
    memory_bytes: dict[str, int]
    host_bytes: int
    first_process_bytes: int
    disk_bytes: dict[str, int]
    network_bytes: int
    flops: dict[str, float]
    seconds: dict[str, float]
    stages: list[StageTime]
    hours: float | None
    gpu_hours: float | None
    warnings: list[str]


def student_of(model: nn.Module, shape: ModelShape, result: Outcome, settings: Distillation, num_bytes: int) -> Student:
    """What a method leaves of a model, and how much of it the recipe trains.

    Args:
        model: the original, on the meta device.
        shape: its numbers.
        result: what is left of the experts.
        settings: the recipe's part.
        num_bytes: of the output.

    Raises:
        RecipeError: nothing would be trained.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    owned = {name for layer in shape.layers for name in layer.owned}
    routers = router_parameters(model)
    original = sum(layer.num_parameters for layer in shape.layers)
    routed = sum(layer.num_parameters * shape.top_k // layer.num_experts for layer in shape.layers)
    # a merged expert is as large as one before, a factorised one smaller
    of_each = result.kept_parameters / sum(layer.num_parameters for layer in result.layers)
    kept, active_experts = result.kept_parameters, int(routed * of_each)
    rest, note = sum(sizes.values()) - original, ""
    wholes = kept if result.factorised is None else _base_parameters(result)
    of_experts = {"experts": kept, "factors": kept - wholes, "wholes": wholes}
    trained_experts = trained_rest = 0
    match settings.train:
        case "all":
            trained_experts, trained_rest = kept, rest - sum(sizes[name] for name in routers)
        case "routers":
            trained_rest = sum(sizes[name] for name in routers)
        case "experts" | "factors" | "wholes":
            trained_experts = of_experts[settings.train]
            if result.factorised is not None:
                note = "whole matrices among the factors are not known before calibration"
        case patterns:
            chosen = {name for name in sizes if any(fnmatchcase(name, pattern) for pattern in patterns)}
            trained_rest = sum(sizes[name] for name in chosen - owned)
            trained_experts = int(sum(sizes[name] for name in chosen & owned) * kept / original)
            if result.factorised is not None:
                note = "patterns are matched with the original's names; those of factors are not among them"
    if not (trained_experts + trained_rest or note):
        raise RecipeError(
            f"distillation.train: '{settings.train}' is none of the parameters of this model; choose another"
        )
    return Student(
        parameters=rest + kept,
        trained=trained_experts + trained_rest,
        active=shape.active_parameters - routed + active_experts,
        trained_active=min(trained_rest, shape.active_parameters - routed) + active_experts * trained_experts // kept,
        num_bytes=num_bytes,
        note=note,
    )


def _base_parameters(result: Outcome) -> int:
    """Bases that are sure to be there; whether others pay, calibration decides."""
    options = result.factorised
    assert options is not None
    return sum(
        round(num_bases(layer, slot, options) * slot.num_rows * slot.num_columns)
        for layer in result.layers
        for group in GROUPS
        for slot in slots(layer, group, options)
    )


class TrainingCosts:
    """The costs of a training.

    Args:
        settings: the recipe's part.
        student: what is trained.
        teacher: the original, its shape; what it learns from, if it does.
        teacher_bytes: of that on disk.
        machine: the cluster to plan for; None for this machine.
    """

    def __init__(
        self,
        settings: Distillation,
        student: Student,
        teacher: ModelShape,
        teacher_bytes: int,
        machine: Machine | None,
    ) -> None:
        self.settings, self.student, self.machine = settings, student, machine
        self.teacher, self.teacher_bytes = teacher, teacher_bytes
        own = torch.bfloat16 if teacher.dtype == torch.bfloat16 else torch.float32
        self.dtype = own if settings.dtype == "auto" else getattr(torch, settings.dtype)
        gpus = torch.cuda.device_count() if machine is None else machine.num_gpus
        self.num_processes = settings.deepspeed.processes or gpus or 1
        stage = settings.deepspeed.zero_stage
        self.stage = max(stage, 1) if self.dtype == torch.bfloat16 else stage
        self.steps = Order(
            settings.num_sequences, settings.batch_size, settings.epochs, settings.max_steps, settings.seed
        ).num_steps
        all_sequences = settings.epochs * settings.num_sequences
        self.tokens = min(self.steps * settings.batch_size, all_sequences) * settings.sequence_length

    def plan(self, speed: dict[str, float]) -> TrainingPlan:
        """All of it, at FLOP/s of one process by kind of work."""
        memory, flops = self.memory_bytes(), self.flops()
        rate = speed[str(self.dtype).removeprefix("torch.")] * self.num_processes
        seconds = {name: count / rate for name, count in flops.items()}
        stages = [] if self.machine is None else list(self._stages(self.machine, seconds))
        hours = sum(stage.seconds for stage in stages) / 3600 if stages else None
        is_offloaded = self.settings.deepspeed.offload and self.settings.deepspeed.zero_stage
        on_host = {"libraries", *(("optimizer",) if is_offloaded else ())}
        if is_offloaded and self.stage == 3:
            on_host.add("student")
        host_bytes = sum(size for name, size in memory.items() if name in on_host)
        return TrainingPlan(
            parameters=self.student.parameters,
            trained_parameters=self.student.trained,
            note=self.student.note,
            num_processes=self.num_processes,
            zero_stage=self.stage,
            steps=self.steps,
            tokens=self.tokens,
            memory_bytes=memory,
            host_bytes=host_bytes,
            first_process_bytes=self.student.trained * self.dtype.itemsize,
            disk_bytes=self.disk_bytes(),
            network_bytes=self.network_bytes(),
            flops=flops,
            seconds=seconds,
            stages=stages,
            hours=hours,
            gpu_hours=None if hours is None else hours * self.num_processes,
            warnings=list(self._warnings(sum(memory.values()) - host_bytes)),
        )

    def memory_bytes(self) -> dict[str, int]:
        """Of one process. Student: N w, at stage 3 a share of it. Gradients, summed in fp32: 4 T, from stage 2 on a
        share. Optimizer: two moments, 8 T, and from stage 1 on masters beside, a share of 12 T. A live teacher: as the
        student.

        Activations: what a layer keeps for its backward pass, b (k (5 D + 2 M + 2 F) + 8 D + 4 A) / 2 as in costs.py,
        of every layer; where they are recomputed, of one, and of all others their input. Loss: as in costs.py, and a
        live teacher's logits beside.
        """
        settings, model, width, trained = self.settings, self.teacher, self.dtype.itemsize, self.student.trained
        tokens = settings.micro_batch_size * settings.sequence_length
        routed = max(5 * l.hidden_size + 2 * l.up_shape[0] + 2 * l.intermediate_size for l in model.layers)
        layer = (model.top_k * routed + 8 * model.hidden_size + 4 * model.attention_width) // 2
        kept = model.num_layers * layer
        if settings.deepspeed.gradient_checkpointing:
            kept = layer + model.num_layers * model.hidden_size
        logits = tokens * model.vocab_size * (3 * width + 12)
        is_live = settings.teacher == "live"
        memory = {
            "libraries": PROCESS_BYTES,
            "student": self._shared(self.student.parameters * width, 3),
            "gradients": self._shared(4 * trained, 2),
            "optimizer": self._shared(_STATE_BYTES * trained, 1) if self.stage else 8 * trained,
            "activations of a micro-batch": tokens * kept * width,
            "loss of a micro-batch": logits + (tokens * model.vocab_size * (width + 4) if is_live else 0),
        }
        if is_live:
            memory["teacher"] = self._shared(self.teacher_bytes // model.dtype.itemsize * width, 3)
        return memory

    def disk_bytes(self) -> dict[str, int]:
        """Answers of a cached teacher: K logits of two bytes, K ids of two (four of a vocabulary over 65,536) and a
        tail of four for each token; snapshots: 12 T, twice while one takes the place of another; the best weights, T w;
        the output; tokens: nine bytes each."""
        settings, width = self.settings, self.dtype.itemsize
        sequences = settings.num_sequences + settings.validation_sequences
        top_k = min(settings.teacher_top_k, self.teacher.vocab_size)
        entry = (4 if self.teacher.vocab_size <= 2**16 else 6) * top_k + 4
        has_snapshots = 0 < settings.checkpoint_every < self.steps
        snapshots = 1 + (2 * settings.checkpoint_every < self.steps)
        return {
            "teacher's answers": sequences * settings.sequence_length * entry if settings.teacher == "cached" else 0,
            "snapshots": snapshots * _STATE_BYTES * self.student.trained if has_snapshots else 0,
            "best weights": self.student.trained * width,
            "output": self.student.num_bytes,
            "tokens": 9 * sequences * settings.sequence_length,
        }

    def network_bytes(self) -> int:
        """Of all processes and steps. Gradients, 4 T: summed and handed round a step, 2 (P - 1) times; from stage 2 on
        summed every micro-batch, P - 1 times, and at stage 2 the trained weights, T w, handed round a step. At stage 3
        all weights, N w, are gathered in every pass of a micro-batch, and a live teacher's."""
        settings, others, width = self.settings, self.num_processes - 1, self.dtype.itemsize
        micro = num_micro_batches(settings.batch_size, self.num_processes, settings.micro_batch_size)
        gradients, trained = 4 * self.student.trained, self.student.trained * width
        if self.stage < 2:
            return self.steps * others * 2 * gradients
        if self.stage == 2:
            return self.steps * others * (micro * gradients + trained)
        passes = 3 if settings.deepspeed.gradient_checkpointing else 2
        gathered = passes * self.student.parameters * width
        if settings.teacher == "live":
            gathered += self.teacher_bytes // self.teacher.dtype.itemsize * width
        return self.steps * others * micro * (gradients + gathered)

    def flops(self) -> dict[str, float]:
        """Operations by stage. `teach`: the teacher's forward pass, over every sequence once where its answers are
        cached, else with the student. `train`: the student's forward (again where activations are recomputed), the
        gradients of inputs and of trained weights. `validate`: its forward pass over the sequences held out."""
        settings, student = self.settings, self.student
        length = settings.sequence_length
        attention = 2 * self.teacher.num_layers * length * self.teacher.attention_width
        forward, theirs = 2.0 * student.active + attention, 2.0 * self.teacher.active_parameters + attention
        passes = 3 if settings.deepspeed.gradient_checkpointing else 2
        times = 1 + self.steps // settings.evaluate_every if settings.evaluate_every else 1
        is_last_known = settings.evaluate_every and self.steps % settings.evaluate_every == 0
        validated = (times + (not is_last_known)) * settings.validation_sequences * length
        taught = {
            "cached": (settings.num_sequences + settings.validation_sequences) * length,
            "live": self.tokens + validated,
            "none": 0,
        }[settings.teacher]
        return {
            "teach": taught * theirs,
            "train": self.tokens * (passes * forward + attention + 2.0 * student.trained_active),
            "validate": validated * forward,
        }

    def _warnings(self, device_bytes: int) -> Iterator[str]:
        if (machine := self.machine) is None:
            return
        cure = "set deepspeed.gradient_checkpointing, lower micro_batch_size, or raise deepspeed.zero_stage"
        yield from too_large(machine, "training process", device_bytes, cure)
        if self.num_processes > machine.num_gpus:
            yield f"deepspeed.processes: {self.num_processes} processes and {machine.num_gpus} GPUs; lower it"

    def _shared(self, num_bytes: int, from_stage: int) -> int:
        return ceil(num_bytes / self.num_processes) if self.stage >= from_stage else num_bytes

    def _stages(self, machine: Machine, seconds: dict[str, float]) -> Iterator[StageTime]:
        """`teach` streams the teacher once a process, if its answers are cached; `train` waits for the slower of
        computing and the network, the weights loaded by every process."""
        processes, settings = min(self.num_processes, machine.num_gpus), self.settings
        if settings.teacher == "cached":
            answers = self.disk_bytes()["teacher's answers"]
            reads = processes * self.teacher_bytes
            yield stage_time(
                machine, "teach", compute=seconds["teach"], busy_s=seconds["teach"], storage=reads + answers
            )
        computing = sum(seconds.values()) - (seconds["teach"] if settings.teacher == "cached" else 0)
        loads = processes * (self.student.num_bytes + (self.teacher_bytes if settings.teacher == "live" else 0))
        # a ring brings every byte into a node once, whatever the processes there
        network = self.network_bytes() * (machine.num_nodes - 1) // max(self.num_processes - 1, 1)
        yield stage_time(machine, "train", compute=computing, busy_s=computing, storage=loads, network=network)

"""The options of distillation, as a recipe's `distillation` part takes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .method_options import Part, Ratio
from .recipe_fields import Folder, TaskSource, Text, TextPairs, as_task

Trained = Literal["all", "experts", "factors", "wholes", "routers"]


class Loss(Part):
    """What is minimised: ce CE + kd T^2 KL(teacher_T || student_T), averaged over the tokens that count, and more.

    Attributes:
        ce: weight of the cross-entropy with the text; None for 0 where a teacher answers on a text, whose errors are
            not to be learned instead, and for 1 on a task or without a teacher.
        kd: weight of the divergence from the teacher (lambda in the paper, where it is 0.2).
        temperature: T.
        hidden: weight of the squared distance of the layers' outputs, relative to the teacher's; live teacher only.
        router: weight of the divergence of the routers' choices where both have as many experts; live teacher only.
    """

    ce: float | None = Field(None, ge=0)
    kd: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    hidden: float = Field(0.0, ge=0)
    router: float = Field(0.0, ge=0)


class Sparsity(Part):
    """Sparse columns pruned in training (MC-SMoE): those of least smoothed |s dL/ds|, on a cubic schedule.

    Attributes:
        ratio: fraction of the routed-expert parameters removed at the end, as of a method.
        initial_warmup, final_warmup: fractions of the steps before the first and after the last column goes.
        beta: of the exponential moving average of the importance.
    """

    ratio: Ratio
    initial_warmup: float = Field(0.1, ge=0, lt=1)
    final_warmup: float = Field(0.3, ge=0, lt=1)
    beta: float = Field(0.85, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_time(self) -> Sparsity:
        if self.initial_warmup + self.final_warmup >= 1:
            raise ValueError("initial_warmup and final_warmup leave no step between them; lower one")
        return self


class Optimizer(Part):
    """AdamW and its schedule.

    Attributes:
        learning_rate: the highest; None for 0.003 where routers train alone, else 0.0003.
        schedule: how it falls after the warm-up, to `final` of the highest.
        warmup: fraction of the steps in which it rises.
        weight_decay, beta1, beta2, eps: of AdamW.
        clip: norm that the gradient is clipped to; 0 for none.
    """

    learning_rate: float | None = Field(None, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = Field(0.1, ge=0, le=1)
    warmup: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, ge=0)


class DeepSpeed(Part):
    """How the training is spread.

    Attributes:
        processes: training processes; None for one a GPU, or one.
        zero_stage: 0 keeps everything everywhere, 1 spreads the optimizer's state, 2 the gradients too, 3 the
            parameters too, and the live teacher's.
        offload: keep the optimizer's state, and the parameters of stage 3, in the memory of the CPU.
        gradient_checkpointing: recompute activations in the backward pass.
        max_failures: how often a run starts again by itself after a process died.
    """

    processes: int | None = Field(None, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: bool = False
    gradient_checkpointing: bool = False
    max_failures: int = Field(3, ge=0)


class Distillation(TextPairs):
    """How a compressed checkpoint recovers; without a teacher, how any checkpoint is trained on text or a task.

    Attributes:
        output: folder of the trained checkpoint; `<output of the recipe>-distilled` where nothing is said.
        text: what to train on: files or a dataset, packed into sequences; pairs for an encoder-decoder model.
        task: instead of text, a task (see evaluation/tasks), an example a sequence, trained on the answers: a name, or
            `{name: ..., train: files or dataset}`.
        num_sequences, sequence_length, seed: how much of the text: the sequences of one epoch, the tokens of each.
        validation_sequences: sequences of the same text that are held out, to choose the best checkpoint by.
        teacher: `cached` computes the teacher's most likely tokens once and needs no teacher in memory, `live` runs it
            beside the student, `none` trains on the text alone.
        teacher_top_k: how many tokens the cache keeps for each position; all others share the mass that is left.
        train: `all` parameters but the routers' (the paper's way), those of the `experts`, of these the low-rank and
            sparse `factors` alone or the `wholes` alone (merged experts, bases), the `routers` alone (Router-KD), or a
            list of patterns of parameter names.
        epochs, max_steps: how long; the first of both to be reached.
        batch_size: sequences an optimizer step, over all processes.
        micro_batch_size: sequences a forward pass of one process; changes memory, not the result but by rounding, and
            which columns `sparsity` prunes, whose importance is taken a micro-batch.
        dtype: of the forward and backward pass; masters and moments are float32 always. `auto` is the checkpoint's.
        evaluate_every, checkpoint_every: steps; 0 for the end alone.
        keep: which weights are published, the `best` by the sequences held out or the `last`.
    """

    output: Folder | None = None
    text: Text | None = None
    task: TaskSource | None = None
    num_sequences: int = Field(4096, ge=1)
    sequence_length: int = Field(1024, ge=2)
    validation_sequences: int = Field(32, ge=1)
    seed: int = Field(0, ge=0)
    teacher: Literal["cached", "live", "none"] = "cached"
    teacher_top_k: int = Field(256, ge=1)
    train: Trained | list[str] = "all"
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    sparsity: Sparsity | None = None
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1)
    micro_batch_size: int = Field(4, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    evaluate_every: int = Field(100, ge=0)
    checkpoint_every: int = Field(100, ge=0)
    keep: Literal["best", "last"] = "best"
    deepspeed: DeepSpeed = DeepSpeed()

    @field_validator("task", mode="before")
    @classmethod
    def _named_task(cls, value: Any) -> Any:
        return as_task(value)

    @property
    def ce(self) -> float:
        """Weight of the cross-entropy."""
        if self.loss.ce is not None:
            return self.loss.ce
        return 0.0 if self.task is None and self.teacher != "none" else 1.0

    @property
    def learning_rate(self) -> float:
        """The highest."""
        return self.optimizer.learning_rate or (3e-3 if self.train == "routers" else 3e-4)

    @model_validator(mode="after")
    def _agrees(self) -> Distillation:
        if self.text is None and self.task is None:
            raise ValueError("text: missing; give text, or a task, to train on")
        if self.text is not None and self.task is not None:
            raise ValueError("task: stands beside text; leave one of both out")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size: {self.batch_size} is no multiple of micro_batch_size, {self.micro_batch_size}; change one"
            )
        for name in ("hidden", "router"):
            if self.teacher != "live" and getattr(self.loss, name):
                raise ValueError(f"loss.{name}: needs the teacher's own layers; set teacher: live")
        return self

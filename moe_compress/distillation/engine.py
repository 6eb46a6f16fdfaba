"""DeepSpeed: its settings, and the state of a training by the names of parameters.

A training's state is the float32 master and the two moments of AdamW of each trained parameter. DeepSpeed keeps them
whole or in parts, by ZeRO stage and number of processes, and so do its own checkpoints. Here they are gathered one
parameter at a time under the parameter's name: such a state loads at any stage and any number of processes, bit for
bit, and lies in safetensors.

DeepSpeed is imported where it is used, so that this package imports without it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distillation_options import Distillation
from ..errors import RecipeError
from ..process import choose_accelerator

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"

_FLAT_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
"""What DeepSpeed's optimizers of stages 1 and 2, of stage 3 and of bf16 without ZeRO call the flat float32 masters."""


def require_deepspeed() -> None:
    """Imports DeepSpeed, quietly and without compiling anything.

    Raises:
        RecipeError: it is not installed.
    """
    choose_accelerator()
    try:
        import deepspeed
    except ImportError as error:
        raise RecipeError(
            f"distillation: needs DeepSpeed, which does not import ({error}); pip install 'moe-compress[distill]'"
        ) from None
    if not torch.cuda.is_available():
        with _silent():  # at this it asks a compiler what it could build
            # a faster all-reduce among processes of one machine, which takes a minute to compile
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def _silent() -> Iterator[None]:
    """Leaves out what this process and its children print."""
    sys.stdout.flush()
    sys.stderr.flush()
    shown = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere:
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, own in zip((1, 2), shown, strict=True):
            os.dup2(own, number)
            os.close(own)


def deepspeed_config(settings: Distillation, dtype: torch.dtype, accumulation: int, world: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given."""
    how, optimizer = settings.deepspeed, settings.optimizer
    device = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # in bf16 DeepSpeed has float32 masters and accumulation from stage 1 on
    stage = max(how.zero_stage, 1) if dtype == torch.bfloat16 else how.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if how.offload and how.zero_stage:
        zero["offload_optimizer"] = device
        if how.zero_stage == 3:
            zero["offload_param"] = device
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": settings.micro_batch_size * accumulation * world,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": optimizer.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would compile
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }


def join_processes() -> None:
    """Tells DeepSpeed of the process group of torch.distributed, which must be up."""
    import deepspeed

    deepspeed.init_distributed(verbose=False)


@contextmanager
def partitioned(config: dict[str, Any], is_on: bool) -> Iterator[None]:
    """Models that transformers loads here keep a part of their parameters alone, if `is_on`."""
    if not is_on:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # transformers asks for it as long as it lives, which is how it learns of ZeRO 3
    alive = HfDeepSpeedConfig(config)
    yield
    del alive


class Engine:
    """A model under training.

    Args:
        model: the student; those of its parameters train that require gradients.
        settings: the recipe's part.
        config: of `deepspeed_config`.

    Attributes:
        module: the model.
        trained: its trained parameters by name.
    """

    def __init__(self, model: nn.Module, settings: Distillation, config: dict[str, Any]) -> None:
        import deepspeed

        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._config, options = config, settings.optimizer
        optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=0.0,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
        with redirect_stdout(StringIO()):  # it prints how much memory there is
            self._engine, self._optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.module: Any = self._engine.module
        self._is_plain = self._optimizer is optimizer  # the parameters are the masters

    @property
    def device(self) -> torch.device:
        """Of this process."""
        device: torch.device = self._engine.device
        return device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch."""
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        """Ends a micro-batch; after the last one of a step the optimizer steps."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if self._is_plain and self._engine.is_gradient_accumulation_boundary():
            for parameter in self.trained.values():
                if parameter.grad is None:  # no token came to it; ZeRO has zeros there too
                    parameter.grad = torch.zeros_like(parameter)
        self._engine.step()

    def beside(self, teacher: nn.Module) -> Any:
        """A model that only answers: on this process's device, or spread like this one at stage 3."""
        teacher.eval().requires_grad_(False)
        if self._engine.zero_optimization_stage() != 3:
            return teacher.to(self.device)
        import deepspeed

        config = {key: value for key, value in self._config.items() if key not in ("gradient_clipping", "data_types")}
        config["zero_optimization"] = {
            key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"
        }
        return deepspeed.initialize(model=teacher, config=config)[0]

    @property
    def gradient_norm(self) -> float | None:
        """Before clipping, of the last step."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Of each trained parameter its float32 master and moments, whole; all processes must go through it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.trained.items():
            if self._is_plain:
                own = self._optimizer.state[parameter]
                yield name, {MASTER: parameter.detach(), **{key: own[key] for key in MOMENTS}}
                continue
            state = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            yield name, {MASTER: safe_get_full_fp32_param(parameter), **state}

    def load_state(self, step: int, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Goes on from what `state` gave after some optimizer steps; all processes must call it.

        Args:
            step: how many.
            read: gives a parameter's state by its name.
        """
        from deepspeed import utils

        self._begin_moments(step)
        parameter: Any
        for name, parameter in self.trained.items():
            own = read(name)
            if self._is_plain:
                with torch.no_grad():
                    parameter.copy_(own[MASTER])
                moments = {key: own[key].to(parameter.device, copy=True) for key in MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
                continue
            if hasattr(parameter, "ds_id"):
                parts = {key: _own_part(parameter, value) for key, value in own.items()}
                utils.safe_set_local_fp32_param(parameter, parts[MASTER])
                for key in MOMENTS:
                    utils.safe_set_local_optimizer_state(parameter, parts[key], key)
                parameter.ds_tensor.data.copy_(parts[MASTER])  # else the master counts from the next step on alone
                continue
            utils.safe_set_full_fp32_param(parameter, own[MASTER])
            for key in MOMENTS:
                utils.safe_set_full_optimizer_state(parameter, own[key], key)
            parameter.data.copy_(own[MASTER])

    def _begin_moments(self, step: int) -> None:
        """Makes what AdamW makes in its first step, so that there is something to be loaded into."""
        flat = next((getattr(self._optimizer, name) for name in _FLAT_MASTERS if hasattr(self._optimizer, name)), None)
        for master in flat or ():
            moments = {key: torch.zeros_like(master) for key in MOMENTS}
            self._optimizer.optimizer.state[master] = {"step": torch.tensor(float(step)), **moments}
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters, whole and in the model's dtype, on the CPU of the first process; {} elsewhere."""
        found = {}
        for name, parameter in self.trained.items():
            with _whole(parameter):
                if torch.distributed.get_rank() == 0:
                    found[name] = parameter.detach().to("cpu", copy=True)
        return found


def _whole(parameter: nn.Parameter) -> AbstractContextManager[None]:
    """Here a parameter that ZeRO 3 spreads is whole."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([parameter])
    return gathered


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """This process's part of a tensor that is spread as the parameter is at stage 3, the last part filled up."""
    size, rank = parameter.ds_tensor.ds_numel, torch.distributed.get_rank()
    flat = functional.pad(value.flatten(), (0, size * torch.distributed.get_world_size() - value.numel()))
    return flat[rank * size : (rank + 1) * size]


def learning_rate(settings: Distillation, step: int, num_steps: int) -> float:
    """Of a step, the first being 0: a linear rise over the warm-up, then the schedule's fall."""
    options, highest = settings.optimizer, settings.learning_rate
    warmup = math.ceil(options.warmup * num_steps)
    if step < warmup:
        return highest * (step + 1) / warmup
    if options.schedule == "constant":
        return highest
    done = (step - warmup) / max(1, num_steps - warmup - 1)
    left = (1 + math.cos(math.pi * done)) / 2 if options.schedule == "cosine" else 1 - done
    return highest * (options.final + (1 - options.final) * left)

"""MC-SMoE in training: of W ~ U V + S the columns of S are pruned, all layers together, until a ratio is reached.

    I_j = 1/M sum_i |s_ij dL/ds_ij|      importance of a column, a parameter; added up over the micro-batches of a step
    I'  = beta I' + (1 - beta) I         smoothed over the steps, from 0 on
    keep(t) = final + (1 - final) (1 - (t - a) / (b - a))^3      in between 1 until step a and `final` from step b on

After step t the columns of highest I' stay that fit into keep(t) of the parameters of all columns: one threshold for
all slots and layers. What is pruned stays pruned.

The mask is laid over S in the forward pass, and the importance taken from the gradient of the masked product, where
both are whole: where an optimizer keeps masters, moments and parts of parameters (ZeRO) makes no difference, and
nothing that momentum moves comes back.

Source: arXiv 2310.01334 section 3.2. There |s dL/ds| is that of a step; here it is taken a micro-batch, because the
gradient of a step is never whole anywhere, and averaged over processes as the gradient is.
Cost: a copy of S a forward pass, one pass over S a micro-batch; a step sorts the scores of columns, never of entries.

Shapes: C sparse columns of all slots and layers, R of one slot, M their entries.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import floor, prod
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from ..distillation_options import Sparsity
from ..errors import CheckpointError, RecipeError
from ..model.experts import FactorisedExperts
from ..model.slots import INDEX_SUFFIX, FactorisedSlot


def keep_ratio(step: int, num_steps: int, final: float, initial_warmup: float, final_warmup: float) -> float:
    """The fraction kept after a step.

    Args:
        step: optimizer steps done.
        num_steps: of the whole training.
        final: what is kept in the end.
        initial_warmup, final_warmup: fractions of the steps before the first and after the last column goes.
    """
    first, last = initial_warmup * num_steps, (1 - final_warmup) * num_steps
    left = min(max((last - step) / (last - first), 0.0), 1.0)
    return final + (1 - final) * left**3


def keep_best(score_C: Tensor, cost_C: Tensor, is_kept_C: Tensor, budget: int) -> Tensor:
    """(C,) bool: of the columns kept so far those of highest score within a budget; of equal ones the first.

    Args:
        score_C: the higher the better.
        cost_C: int64 parameters of each.
        is_kept_C: bool, those to choose among.
        budget: parameters of all that stay; where the next does not fit, the choice ends.
    """
    order_C = score_C.masked_fill(~is_kept_C, -torch.inf).sort(descending=True, stable=True).indices
    spent_C = (cost_C * is_kept_C)[order_C].cumsum(0)
    return is_kept_C & torch.empty_like(is_kept_C).index_copy_(0, order_C, spent_C <= budget)


class _Masked(torch.autograd.Function):
    """The columns that are kept, and zeros; the backward pass adds up their importance."""

    @staticmethod
    def forward(ctx: Any, s_RM: Tensor, is_pruned_R: Tensor, importance_R: Tensor) -> Tensor:
        ctx.save_for_backward(s_RM)
        ctx.is_pruned_R, ctx.importance_R = is_pruned_R, importance_R
        return s_RM.masked_fill(is_pruned_R[:, None], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RM: Tensor) -> tuple[Tensor, None, None]:
        (s_RM,) = ctx.saved_tensors
        sum_R = torch.linalg.vector_norm(s_RM * grad_RM, ord=1, dim=1, dtype=torch.float32)
        ctx.importance_R.add_(sum_R / s_RM.shape[1])
        return grad_RM.masked_fill(ctx.is_pruned_R[:, None], 0), None, None


@dataclass(frozen=True, slots=True)
class _Packed:
    """The sparse columns of one slot.

    Attributes:
        path, experts: the module, and its name in the model.
        slot: which slot.
        place: its columns among all.
    """

    path: str
    experts: FactorisedExperts
    slot: FactorisedSlot
    place: slice


class ColumnPruner:
    """Prunes the sparse columns of a model while it trains; from now on the model's forward pass goes without them.

    Args:
        model: the student; which of its parameters train has been settled.
        options: how far, and when.
        num_steps: optimizer steps of the whole training.
        original_parameters: of all routed experts of the original.

    Raises:
        RecipeError: there are no columns that train, or none need go, or it does not help that all go.
    """

    def __init__(self, model: Any, options: Sparsity, num_steps: int, original_parameters: int) -> None:
        self.options, self.num_steps = options, num_steps
        self._layers = model.config.quantization_config.layers if _experts_of(model) else {}
        self._packed: list[_Packed] = []
        stored, num_columns, costs = 0, 0, []
        for path, experts in _experts_of(model).items():
            for slot in experts.slots:
                stored += sum(map(prod, slot.shapes().values()))
                if count := sum(slot.sparse.lengths):
                    self._packed.append(_Packed(path, experts, slot, slice(num_columns, num_columns + count)))
                    num_columns += count
                    costs.append(torch.full((count,), slot.num_rows + 1))  # entries, and the number of the column
        self._check_trained()
        self._cost_C = torch.cat(costs)
        self._all = self._kept = int(self._cost_C.sum())
        self._final = self._final_budget(original_parameters, stored)
        self._score_C = torch.zeros(len(self._cost_C))
        self._importance_C = torch.zeros_like(self._score_C)
        self._is_kept_C = torch.ones_like(self._cost_C, dtype=torch.bool)
        for packed in self._packed:
            packed.experts.column_filters[packed.slot.name] = partial(self._masked, packed.place)

    def _check_trained(self) -> None:
        if not self._packed:
            raise RecipeError(
                "distillation.sparsity: prunes sparse columns, of which the student has none; compress with"
                " method.name: mcsmoe and method.start, or leave sparsity out"
            )
        names = ((f"{p.path}.{p.slot.name}_s", getattr(p.experts, f"{p.slot.name}_s")) for p in self._packed)
        frozen = next((name for name, parameter in names if not parameter.requires_grad), None)
        if frozen is not None:
            raise RecipeError(
                f"distillation.train: {frozen} does not train, but sparsity goes by its gradient; set train:"
                " compressed, or leave sparsity out"
            )

    def _final_budget(self, original: int, stored: int) -> int:
        """Parameters that the columns may have in the end."""
        ratio, columns = self.options.ratio, self._all
        budget = floor((1 - ratio) * original) - (stored - columns)
        if budget < 0:
            highest = floor((1 - (stored - columns) / original) * 10_000) / 10_000
            raise RecipeError(
                f"distillation.sparsity.ratio: {ratio} is more than the student loses with all its sparse columns,"
                f" {highest:g}; lower it, or compress with a higher method.ratio and method.start"
            )
        if budget >= columns:
            raise RecipeError(
                f"distillation.sparsity.ratio: {ratio} needs no column pruned, the student has lost"
                f" {1 - stored / original:.4g} already; raise it, or leave sparsity out"
            )
        return budget

    def _masked(self, place: slice, s_RM: Tensor) -> Tensor:
        if self._score_C.device != s_RM.device:
            self._move(s_RM.device)
        masked: Tensor = _Masked.apply(s_RM, ~self._is_kept_C[place], self._importance_C[place])
        return masked

    @torch.inference_mode(False)  # an evaluation may come before the first step
    def _move(self, device: torch.device) -> None:
        for name in ("_cost_C", "_score_C", "_importance_C", "_is_kept_C"):
            setattr(self, name, getattr(self, name).to(device))

    @property
    def is_done(self) -> bool:
        """Whether the ratio is reached."""
        return self._kept <= self._final

    @property
    def progress(self) -> dict[str, float]:
        """For a progress line: the fraction kept of the columns' parameters, how many columns, the least score kept."""
        kept_K = self._score_C[self._is_kept_C]
        return {
            "keep_ratio": self._kept / self._all,
            "num_columns": len(kept_K),
            "smallest_score": float(kept_K.min()) if len(kept_K) else 0.0,
        }

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Scores and prunes after an optimizer step; all processes must call it, and decide alike.

        Args:
            step: optimizer steps done, this one among them: 1 after the first, `num_steps` after the last.
        """
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self._importance_C)
            self._importance_C /= distributed.get_world_size()
        self._score_C.lerp_(self._importance_C, 1 - self.options.beta)
        self._importance_C.zero_()
        warmups = self.options.initial_warmup, self.options.final_warmup
        keep = keep_ratio(step, self.num_steps, self._final / self._all, *warmups)
        self._prune(max(self._final, floor(keep * self._all)))

    def _prune(self, budget: int) -> None:
        if budget < self._kept:
            self._is_kept_C = keep_best(self._score_C, self._cost_C, self._is_kept_C, budget)
            self._kept = int(self._cost_C[self._is_kept_C].sum())

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed training needs, on the CPU: (C,) float32 scores, (C,) bool which columns are kept."""
        return {"score": self._score_C.to("cpu", copy=True), "is_kept": self._is_kept_C.to("cpu", copy=True)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from what `state_dict` gave after a step.

        Raises:
            CheckpointError: it is of another student.
        """
        if state["score"].shape != self._score_C.shape:
            raise CheckpointError(
                f"state of the column pruner: has {len(state['score'])} columns, the student {len(self._score_C)};"
                " give the student that it was saved with"
            )
        self._score_C.copy_(state["score"])
        self._is_kept_C = state["is_kept"].to(self._is_kept_C.device, copy=True)
        self._kept = int(self._cost_C[self._is_kept_C].sum())

    def compact(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """Leaves out what is pruned.

        Args:
            state: name in the model -> tensor, the sparse columns whole; their numbers may be missing.

        Returns:
            the state with fewer columns and their numbers; `quantization_config.layers` of its config.json.
        """
        state, layers, is_kept_C = dict(state), deepcopy(self._layers), self._is_kept_C.cpu()
        for packed in self._packed:
            slot, is_kept_R = packed.slot, is_kept_C[packed.place]
            num_sparse = [int(is_kept_R[slot.sparse_rows(expert)].sum()) for expert in range(len(slot.ranks))]
            layers[packed.path][slot.name]["num_sparse"] = num_sparse
            columns = getattr(packed.experts, slot.name + INDEX_SUFFIX)
            for suffix, tensor in (("_s", state[f"{packed.path}.{slot.name}_s"]), (INDEX_SUFFIX, columns)):
                name = f"{packed.path}.{slot.name}{suffix}"
                state[name] = tensor[is_kept_R.to(tensor.device)]
                if not sum(num_sparse):
                    del state[name]
        return state, layers


def _experts_of(model: nn.Module) -> dict[str, FactorisedExperts]:
    return {path: module for path, module in model.named_modules() if isinstance(module, FactorisedExperts)}

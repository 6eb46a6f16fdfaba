"""Small random layers with the statistics that calibration would have summed over their tokens, for tests of D2-MoE.

Shapes cover every form of the problem: input or output side the smaller one, alone or only once gate and up are
taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from moe_compress.calibration.statistics import LayerStatistics
from moe_compress.linalg.packed import pack
from moe_compress.method_options import Base, D2MoE
from moe_compress.methods.d2moe import GroupProblem
from moe_compress.model.discovery import MoELayer
from moe_compress.model.expert_bank import GROUPS, Group
from moe_compress.model.slots import FactorisedSlot

Shape = tuple[int, int, bool]
"""hidden_size D, intermediate_size F, has_gate."""

SHAPES: list[Shape] = [
    (6, 10, True),  # down by its output
    (12, 8, True),  # gate and up by their output, but together by their input
    (18, 5, True),  # gate and up by their output
    (9, 7, False),  # up by its output
]
BASES = get_args(Base)
WEIGHTINGS = ["loss", "input", "none"]


@dataclass(frozen=True)
class Case:
    """A layer, its weights (E, M, N), and per group and expert the inputs (n, N) and the norms of gradients (n, 1)."""

    layer: MoELayer
    weight: dict[Group, Tensor]
    inputs: dict[Group, list[Tensor]]
    norms: dict[Group, list[Tensor]]
    fisher: dict[Group, Tensor]

    def statistics(self) -> LayerStatistics:
        """What calibration would have summed."""
        found = LayerStatistics(self.layer, full=True)
        found.tensors["num_tokens"] = torch.tensor([len(x) for x in self.inputs["up"]])
        for group in GROUPS:
            found.tensors[f"{group}_fisher"] = self.fisher[group]
            outputs = [x @ w.T for w, x in zip(self.weight[group], self.inputs[group], strict=True)]
            for side, rows in (("input", self.inputs[group]), ("output", outputs)):
                if f"{group}_{side}_gram" in found:
                    weighted = [r * n for r, n in zip(rows, self.norms[group], strict=True)]
                    found.tensors[f"{group}_{side}_gram"] = pack(torch.stack([r.T @ r for r in rows]))
                    found.tensors[f"{group}_{side}_loss_gram"] = pack(torch.stack([r.T @ r for r in weighted]))
        return found

    def covariances(self, group: Group, weighting: str) -> Tensor:
        """(E, N, N) fp64 covariance of each expert's input."""
        if weighting == "none":
            num_experts, _, columns = self.weight[group].shape
            return torch.eye(columns, dtype=torch.float64).expand(num_experts, -1, -1)
        rows = [
            x.double() * (n.double() if weighting == "loss" else 1)
            for x, n in zip(self.inputs[group], self.norms[group], strict=True)
        ]
        return torch.stack([r.T @ r for r in rows])

    def problem(self, group: Group, options: D2MoE, order: Tensor | None = None) -> GroupProblem:
        return GroupProblem(self.layer, group, self.weight[group], self.statistics(), options, order)


def make_case(shape: Shape, num_tokens: tuple[int, ...] = (40, 25, 33, 60), seed: int = 0, decay: float = 0.5) -> Case:
    """Random weights; inputs whose features fall off over `decay` decades."""
    hidden, inner, gated = shape
    generator = torch.Generator().manual_seed(seed)
    layer = MoELayer("experts", len(num_tokens), hidden, inner, gated, False, False, True)
    shapes: dict[Group, tuple[int, int]] = {"up": layer.up_shape, "down": layer.down_shape}

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return Case(
        layer,
        {g: random(len(num_tokens), *s) / s[1] ** 0.5 for g, s in shapes.items()},
        {g: [random(n, s[1]) * torch.logspace(0, -decay, s[1]) for n in num_tokens] for g, s in shapes.items()},
        {g: [random(n, 1).abs() for n in num_tokens] for g in shapes},
        {g: random(len(num_tokens)).double().square() for g in shapes},
    )


def method(**options: Any) -> D2MoE:
    ranks = {} if options.get("ranks") == "full" else {"ratio": 0.5}
    return D2MoE.model_validate({"name": "d2moe", "min_tokens": 0, **ranks, **options})


def rebuilt(
    problem: GroupProblem, ranks: dict[str, list[int]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Slot -> (E, M, N), what the tensors that `factors` stores stand for."""
    tensors = problem.factors(ranks, dtype)
    out = {}
    for slot in problem.slots:
        layout = FactorisedSlot(slot.name, slot.num_rows, slot.num_columns, ranks[slot.name])
        base = tensors.get(f"{slot.name}_base", torch.zeros(1))[0]
        u, v = (tensors[f"{slot.name}_{part}"].float() for part in "uv")
        weights = []
        for expert in range(len(layout.ranks)):
            rows = layout.factor_rows(expert)
            weights.append(u[rows].T @ v[rows] + base)
            if expert in layout.dense_index:
                weights[-1] = tensors[f"{slot.name}_dense"][layout.dense_index[expert]]
        out[slot.name] = torch.stack(weights)
    return out


def same_ranks(problem: GroupProblem, rank: int) -> dict[str, list[int]]:
    return {slot.name: [rank] * problem.layer.num_experts for slot in problem.slots}


def weighted_energy(difference: Tensor, gram: Tensor) -> float:
    difference = difference.double()
    return float((difference @ gram.double() * difference).sum())

"""D2-MoE: every expert is a shared base plus a low-rank delta.

For each projection of a layer, W_e (M, N) the weight of expert e, A_e the covariance of its input:

    W_e = W_b + D_e,      D_e ~ U_e V_e  minimising  ||(D_e - U_e V_e) A_e^{1/2}||_F  at rank r_e

Source: arXiv 2502.17298, sections 3.1 (base) and 3.2 (truncation-aware SVD of the deltas). Differences, each because
it measures better:

* Tokens weigh by the squared gradient at the projection's output, A_e = sum_t ||d_t||^2 x_t x_t^T, so that the
  energies of all layers and projections are in units of the loss, and one budget can be spent on them (budget.py).
* The base is optional. Experts that share no ancestor have little in common, and a forced base costs its bytes.
* Gate and up read the same input: factorised as one matrix they share the right factor.
* No Cholesky, no inverse of a covariance, no SVD of a tall matrix (linalg/factorisation.py).

Bases, F_e Fisher information of the projection, f_e activation frequency:
    mean 1/E sum W_e;  frequency, fisher, fisher_frequency: weighted means;
    closed_form argmin sum_e ||(W_e - W_b) A_e^{1/2}||^2 = (sum W_e A_e)(sum A_e)^{-1}, damped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import DENSE, Item, uniform_rank
from ..calibration.statistics import LayerStatistics, down_side, up_side
from ..errors import CompressionError, RecipeError
from ..linalg.alignment import ExpertWeights, align
from ..linalg.factorisation import (
    InputRoot,
    factorise_left,
    factorise_right,
    left_gram,
    right_gram,
    spectrum,
)
from ..linalg.symmetric import damp, shrink_rare
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS, Group
from ..recipe import D2MoE


@dataclass(frozen=True, slots=True)
class Slot:
    """One factorised projection of a layer.

    Attributes:
        name: slot name of model/experts.py.
        rows: which rows of the group's matrix it covers.
        num_columns: N.
    """

    name: str
    rows: slice
    num_columns: int

    @property
    def num_rows(self) -> int:
        """M."""
        return self.rows.stop - self.rows.start


def slots(layer: MoELayer, group: Group, options: D2MoE) -> list[Slot]:
    """The slots that a group of projections is factorised as."""
    if group == "down":
        return [Slot("down", slice(0, layer.hidden_size), layer.intermediate_size)]
    inner, hidden = layer.intermediate_size, layer.hidden_size
    if not layer.has_gate:
        return [Slot("up", slice(0, inner), hidden)]
    if options.gate_up == "joint":
        return [Slot("gate_up", slice(0, 2 * inner), hidden)]
    return [Slot("gate", slice(0, inner), hidden), Slot("up", slice(inner, 2 * inner), hidden)]


class GroupProblem:
    """The weighted factorisation of one group of projections of one layer, expert by expert.

    Only one expert (on a GPU: all of them at once) exists in fp32 at a time.

    Args:
        layer: the layer.
        group: `up` (gate and up) or `down`.
        weight_EMN: the group's experts in canonical layout, any floating dtype.
        statistics: what the layer saw.
        options: the recipe's method.
        permutations_EF: channel orders from `channel_alignment`, or None.
        device: where the arithmetic is done.

    Attributes:
        base_MN: what all experts of the group share, fp32, or None.
    """

    def __init__(
        self,
        layer: MoELayer,
        group: Group,
        weight_EMN: Tensor,
        statistics: LayerStatistics,
        options: D2MoE,
        permutations_EF: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layer, self.group, self.options, self.statistics = layer, group, options, statistics
        self.device = torch.device(device)
        self.weight_EMN = weight_EMN
        self.permutations_EF = permutations_EF
        self.slots = slots(layer, group, options)
        self.side = up_side(layer) if group == "up" else down_side(layer)
        self._gram_EKK, self._of_output = self._covariance()
        self.base_MN = self._base()

    def energies(self) -> dict[str, Tensor]:
        """(E, K) squared singular values of each slot's weighted problem, descending, fp32 on the CPU."""
        rows: dict[str, list[Tensor]] = {slot.name: [] for slot in self.slots}
        for block in self._blocks():
            delta, root = self._delta(block), self._root(block)
            for slot in self.slots:
                gram = self._problem(slot, delta, root, block)
                rows[slot.name].append(spectrum(gram).energy_EK.cpu())
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def factors(self, ranks: dict[str, list[int]], dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of the group's slots by parameter name (see model/experts.py), on the CPU.

        Args:
            ranks: slot name -> one rank an expert, DENSE for a whole matrix.
            dtype: to store in.
        """
        out: dict[str, Tensor] = {}
        filled = {slot.name: [0, 0] for slot in self.slots}
        for slot in self.slots:
            total = sum(max(rank, 0) for rank in ranks[slot.name])
            out[f"{slot.name}_u"] = torch.empty(total, slot.num_rows, dtype=dtype)
            out[f"{slot.name}_v"] = torch.empty(total, slot.num_columns, dtype=dtype)
            num_dense = ranks[slot.name].count(DENSE)
            if num_dense:
                shape = (num_dense, slot.num_rows, slot.num_columns)
                out[f"{slot.name}_dense"] = torch.empty(shape, dtype=dtype)
            if self.base_MN is not None:
                out[f"{slot.name}_base"] = self.base_MN[slot.rows].to("cpu", dtype)
        for block in self._blocks():
            delta, root = self._delta(block), self._root(block)
            for slot in self.slots:
                wanted = ranks[slot.name][block]
                positive = [max(rank, 0) for rank in wanted]
                part = delta[:, slot.rows]
                if root is not None:
                    pairs = factorise_right(part, root, positive)
                else:
                    pairs = factorise_left(part, self._problem(slot, delta, root, block), positive)
                place = filled[slot.name]
                for expert, (rank, (u, v)) in enumerate(zip(wanted, pairs, strict=True)):
                    if rank == DENSE:
                        whole = part[expert] if self.base_MN is None else part[expert] + self.base_MN[slot.rows]
                        out[f"{slot.name}_dense"][place[1]] = whole.to("cpu", dtype)
                        place[1] += 1
                        continue
                    rows = slice(place[0], place[0] + rank)
                    out[f"{slot.name}_u"][rows] = u.mT.to("cpu", dtype)
                    out[f"{slot.name}_v"][rows] = v.to("cpu", dtype)
                    place[0] += rank
        return out

    # --- internals -----------------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[slice]:
        """Experts to work on at once: LAPACK gains nothing from a batch, a GPU does."""
        size = 1 if self.device.type == "cpu" else self.layer.num_experts
        for start in range(0, self.layer.num_experts, size):
            yield slice(start, start + size)

    def _delta(self, block: slice) -> Tensor:
        """(block, M, N) fp32 what the base does not explain, channels in aligned order."""
        weight = self.weight_EMN[block].to(self.device, torch.float32)
        if self.permutations_EF is not None:
            order = self._channel_order()[block]
            axis = 1 if self.group == "up" else 2
            index = order[:, :, None] if axis == 1 else order[:, None, :]
            weight = weight.gather(axis, index.expand_as(weight))
        base = getattr(self, "base_MN", None)
        return weight if base is None else weight - base

    def _root(self, block: slice) -> InputRoot | None:
        """Root of the input covariance, where the input side is the smaller one."""
        if self.side == "output":
            return None
        return InputRoot.from_gram(self._gram_EKK[block], self.options.damping)

    def _problem(self, slot: Slot, delta_EMN: Tensor, root: InputRoot | None, block: slice) -> Tensor:
        """The small symmetric matrices whose eigenvectors solve a slot's problem."""
        part = delta_EMN[:, slot.rows]
        if root is not None:
            return right_gram(part, root)
        if self._of_output:
            return self._gram_EKK[block][:, slot.rows, slot.rows]
        return left_gram(part, self._gram_EKK[block])

    def _covariance(self) -> tuple[Tensor, bool]:
        """The covariance the error is weighted with, and whether it is that of the outputs themselves.

        The covariance of the outputs W_e x is that of the problem only where there is no base.
        """
        E, N = self.weight_EMN.shape[0], self.weight_EMN.shape[2]
        if self.options.weighting == "none":
            return torch.eye(N, device=self.device).expand(E, N, N), False
        of_output = self.side == "output" and self.options.base == "none"
        side = "output" if of_output else "input"
        name = f"{self.group}_{side}{'_loss' if self.options.weighting == 'loss' else ''}_gram"
        if name not in self.statistics:
            raise CompressionError(
                f"{self.layer.path}: statistics lack {name}; run with calibration.full_covariance: always"
            )
        gram = shrink_rare(
            self.statistics[name].to(self.device),
            self.statistics["num_tokens"].to(self.device),
            self.options.min_tokens,
        )
        channels = self.group == "up" if of_output else self.group == "down"
        if self.permutations_EF is not None and channels:
            order = self._channel_order()
            gram = gram.gather(1, order[:, :, None].expand_as(gram))
            gram = gram.gather(2, order[:, None, :].expand_as(gram))
        return gram, of_output

    def _base(self) -> Tensor | None:
        kind = self.options.base
        if kind == "none":
            return None
        weights = (self._delta(block) for block in self._blocks())
        if kind == "closed_form":
            total = damp(self._gram_EKK.sum(0), max(self.options.damping, 1e-6))
            mixed = sum(
                torch.einsum("emn,enk->mk", weight, self._gram_EKK[block])
                for weight, block in zip(weights, self._blocks(), strict=True)
            )
            assert isinstance(mixed, Tensor)
            return torch.linalg.solve(total, mixed, left=False)
        frequency = self.statistics["num_tokens"].double()
        fisher = self.statistics[f"{self.group}_fisher"]
        share_E = {
            "mean": torch.ones_like(frequency),
            "frequency": frequency,
            "fisher": fisher,
            "fisher_frequency": fisher * frequency,
        }[kind]
        if float(share_E.sum()) == 0:  # a layer the text never reached: all experts alike
            share_E = torch.ones_like(share_E)
        share_E = (share_E / share_E.sum()).to(self.device, torch.float32)
        base = sum(
            torch.einsum("e,emn->mn", share_E[block], weight)
            for weight, block in zip(weights, self._blocks(), strict=True)
        )
        assert isinstance(base, Tensor)
        return base

    def _channel_order(self) -> Tensor:
        """(E, M) or (E, F) index of each channel's place; gate and up rows move together."""
        assert self.permutations_EF is not None
        order = self.permutations_EF.to(self.device)
        if self.group == "down":
            return order
        inner, num_rows = self.layer.intermediate_size, self.layer.up_shape[0]
        return torch.cat([order + start for start in range(0, num_rows, inner)], dim=1)


def channel_alignment(layer: MoELayer, up_EMD: Tensor, down_EDF: Tensor, statistics: LayerStatistics) -> Tensor:
    """(E, F) int64: each expert's channels in the order of the most used expert's. Function-preserving.

    Raises:
        RecipeError: the experts carry biases, which would have to be permuted and stored too.
    """
    if layer.has_bias:
        raise RecipeError(f"method.align: {layer.path} has biases, which alignment does not move; set align: false")

    def weights(expert: int) -> ExpertWeights:
        up_MD, inner = up_EMD[expert].float(), layer.intermediate_size
        return ExpertWeights(
            up_FD=up_MD[-inner:],
            down_DF=down_EDF[expert].float(),
            gate_FD=up_MD[:inner] if layer.has_gate else None,
        )

    reference = weights(int(statistics["num_tokens"].argmax()))
    return torch.stack([align(reference, weights(expert)) for expert in range(layer.num_experts)])


def check_ratio(layers: list[MoELayer], options: D2MoE) -> None:
    """Refuses a ratio that the bases alone exceed.

    Raises:
        RecipeError: names the highest ratio that is possible.
    """
    if options.ratio is None:
        return
    for layer in layers:
        highest = 1 - 1 / layer.num_experts if options.base != "none" else 1.0
        if options.ratio >= highest:
            raise RecipeError(
                f"method.ratio: {options.ratio} is more than the shared bases of {layer.num_experts} experts"
                f" leave; the highest possible is below {highest:.4g}; lower it or set base: none"
            )
        if options.ranks == "uniform":
            for group in GROUPS:
                for slot in slots(layer, group, options):
                    _check_uniform(layer, slot, options)


def _check_uniform(layer: MoELayer, slot: Slot, options: D2MoE) -> None:
    assert options.ratio is not None
    based = options.base != "none"
    if uniform_rank(slot.num_rows, slot.num_columns, layer.num_experts, options.ratio, based) < 1:
        area, width = slot.num_rows * slot.num_columns, slot.num_rows + slot.num_columns
        highest = 1 - (width + (area / layer.num_experts if based else 0)) / area
        raise RecipeError(
            f"method.ratio: {options.ratio} leaves no rank for {slot.name} of {layer.path}"
            f" ({slot.num_rows} x {slot.num_columns}); the highest possible is {max(highest, 0):.4f}"
        )


def fixed_ranks(layer: MoELayer, slot: Slot, options: D2MoE) -> list[int]:
    """Ranks where nothing is allocated: `uniform` or `full`."""
    if options.ranks == "full":
        return [min(slot.num_rows, slot.num_columns)] * layer.num_experts
    assert options.ratio is not None
    rank = uniform_rank(slot.num_rows, slot.num_columns, layer.num_experts, options.ratio, options.base != "none")
    return [rank] * layer.num_experts


def budget_parameters(layers: list[MoELayer], options: D2MoE) -> int:
    """Parameters left for deltas when `ratio` of all routed-expert parameters is gone and bases are paid."""
    assert options.ratio is not None
    total = sum(layer.num_parameters for layer in layers)
    bases = 0
    if options.base != "none":
        bases = sum(layer.num_parameters // layer.num_experts for layer in layers)
    return int((1 - options.ratio) * total) - bases


def items_of(slot: Slot, energy_EK: Tensor) -> list[Item]:
    """One budget item an expert."""
    return [Item(slot.num_rows, slot.num_columns, row) for row in energy_EK.numpy()]

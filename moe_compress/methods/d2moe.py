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

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..budget import uniform_rank
from ..calibration.statistics import LayerStatistics, down_side, up_side
from ..errors import CompressionError, RecipeError
from ..linalg.factorisation import (
    InputRoot,
    factorise_left,
    factorise_right,
    left_gram,
    right_gram,
    spectrum,
)
from ..linalg.symmetric import damp, shrink_rare, symmetric_product
from ..method_options import D2MoE
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS, Group, channel_index
from ..model.slots import FactorisedSlot
from ..model.stored_experts import StoredExperts
from .merge import align_expert


@dataclass(frozen=True, slots=True)
class Slot:
    """One factorised projection of a layer.

    Attributes:
        name: slot name of model/slots.py.
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


def sums_used(options: D2MoE, group: Group) -> list[str]:
    """Names of the statistics that a group's problem may read: the rest need not be loaded."""
    weighted = "loss_gram" if options.weighting == "loss" else "gram"
    return ["num_tokens", f"{group}_fisher", f"{group}_input_{weighted}", f"{group}_output_{weighted}"]


class GroupProblem:
    """The weighted factorisation of one group of projections of one layer, expert by expert.

    Only one expert (on a GPU: all of them at once) exists in fp32 at a time.

    Args:
        layer: the layer.
        group: `up` (gate and up) or `down`.
        weight_EMN: the group's experts in canonical layout, any floating dtype; read a block at a time.
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
        weight_EMN: Tensor | StoredExperts,
        statistics: LayerStatistics,
        options: D2MoE,
        permutations_EF: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layer, self.group, self.options, self.statistics = layer, group, options, statistics
        self.device = torch.device(device)
        self.weight_EMN = weight_EMN
        self.slots = slots(layer, group, options)
        self._order_EC = (
            None if permutations_EF is None else channel_index(layer, group, permutations_EF.to(self.device))
        )
        self._gram_name, self._of_output = self._covariance()
        self.base_MN = self._base()

    def energies(self) -> dict[str, Tensor]:
        """(E, K) squared singular values of each slot's weighted problem, descending, fp32 on the CPU."""
        rows: dict[str, list[Tensor]] = {slot.name: [] for slot in self.slots}
        for block in self._blocks():
            for name, energy_EK in self._energies(block).items():
                rows[name].append(energy_EK.cpu())
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def factors(self, ranks: dict[str, list[int]], dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of the group's slots by parameter name (see model/slots.py), on the CPU.

        Args:
            ranks: slot name -> one rank an expert, DENSE for a whole matrix: the expert's own, to the bit.
            dtype: to store in.
        """
        bases = None if self.base_MN is None else [0] * self.layer.num_experts
        layouts = [FactorisedSlot(s.name, s.num_rows, s.num_columns, ranks[s.name], bases) for s in self.slots]
        out = {name: torch.empty(shape, dtype=dtype) for layout in layouts for name, shape in layout.shapes().items()}
        for slot, layout in zip(self.slots, layouts, strict=True):
            if self.base_MN is not None:
                out[f"{slot.name}_base"][0] = self.base_MN[slot.rows]
            for expert, place in layout.dense_index.items():
                out[f"{slot.name}_dense"][place] = self._weight(slice(expert, expert + 1))[0, slot.rows]
        for block in self._blocks():
            self._factorise(block, layouts, out)
        return out

    # --- internals -----------------------------------------------------------------------------------------

    def _energies(self, block: slice) -> dict[str, Tensor]:
        delta, root = self._delta(self._weight(block)), self._root(block)
        return {slot.name: spectrum(self._problem(slot, delta, root, block)).energy_EK for slot in self.slots}

    def _factorise(self, block: slice, layouts: list[FactorisedSlot], out: dict[str, Tensor]) -> None:
        """Writes the factors of some experts where they belong."""
        wanted = [[max(rank, 0) for rank in layout.ranks[block]] for layout in layouts]
        if not any(map(any, wanted)):
            return  # whole matrices and empty factors need no decomposition
        delta, root = self._delta(self._weight(block)), self._root(block)
        for slot, layout, ranks in zip(self.slots, layouts, wanted, strict=True):
            part = delta[:, slot.rows]
            if root is not None:
                pairs = factorise_right(part, root, ranks)
            else:
                pairs = factorise_left(part, self._problem(slot, delta, root, block), ranks)
            for expert, (u, v) in enumerate(pairs, block.start):
                rows = layout.factor_rows(expert)
                out[f"{slot.name}_u"][rows] = u.mT
                out[f"{slot.name}_v"][rows] = v

    def _blocks(self) -> Iterator[slice]:
        """Experts to work on at once: LAPACK gains nothing from a batch, a GPU does."""
        size = 1 if self.device.type == "cpu" else self.layer.num_experts
        for start in range(0, self.layer.num_experts, size):
            yield slice(start, start + size)

    def _weight(self, block: slice) -> Tensor:
        """(block, M, N) fp32, channels in aligned order."""
        weight = self.weight_EMN[block].to(self.device, torch.float32)
        if self._order_EC is None:
            return weight
        order = self._order_EC[block]
        if self.group == "up":
            return weight.gather(1, order[:, :, None].expand_as(weight))
        return weight.gather(2, order[:, None, :].expand_as(weight))

    def _delta(self, weight_EMN: Tensor) -> Tensor:
        """What the base does not explain."""
        return weight_EMN if self.base_MN is None else weight_EMN - self.base_MN

    def _root(self, block: slice) -> InputRoot | None:
        """Root of the input covariance, where the input side of the slots, all of one shape, is the smaller one."""
        if self.slots[0].num_rows < self.slots[0].num_columns:
            return None
        return InputRoot.from_gram(self._gram(block), self.options.damping)

    def _problem(self, slot: Slot, delta_EMN: Tensor, root: InputRoot | None, block: slice) -> Tensor:
        """The small symmetric matrices whose eigenvectors solve a slot's problem."""
        part = delta_EMN[:, slot.rows]
        if root is not None:
            return right_gram(part, root)
        if self._of_output:
            return self._gram(block)[:, slot.rows, slot.rows]
        return left_gram(part, self._gram(block))

    def _covariance(self) -> tuple[str, bool]:
        """Name of the covariance that the error is weighted with, and whether it is that of the outputs themselves.

        The covariance of the outputs W_e x is that of the problem only where there is no base.
        """
        if self.options.weighting == "none":
            return "", False
        side = up_side(self.layer) if self.group == "up" else down_side(self.layer)
        of_output = side == "output" and self.options.base == "none"
        weighted = ["loss"] if self.options.weighting == "loss" else []
        name = "_".join([self.group, "output" if of_output else "input", *weighted, "gram"])
        if name not in self.statistics:
            raise CompressionError(
                f"{self.layer.path}: statistics lack {name}; run with calibration.full_covariance: always"
            )
        return name, of_output

    def _gram(self, block: slice) -> Tensor:
        """(block, K, K) fp32 covariances that the error is weighted with, those of rare experts shrunk."""
        if not self._gram_name:
            size = self.weight_EMN.shape[2]
            return torch.eye(size, device=self.device).expand(
                len(range(*block.indices(self.layer.num_experts))), -1, -1
            )
        num_tokens, floor = self.statistics["num_tokens"][block].to(self.device), self.options.min_tokens
        gram = self._seen_gram(block)
        if not bool((num_tokens < floor).any()):
            return gram
        if not self._of_output:
            return shrink_rare(gram, num_tokens, floor, self._mean_gram)
        # What other experts put out says nothing of the directions of this one; white inputs do.
        weight = self._weight(block)
        prior = self._white_energy * symmetric_product(weight.mT, weight.mT)
        return shrink_rare(gram, num_tokens, floor, prior)

    def _seen_gram(self, block: slice) -> Tensor:
        """(block, K, K) the covariances as they were summed, channels in aligned order."""
        gram = self.statistics.gram(self._gram_name, block).to(self.device)
        if self._order_EC is not None and self.group == ("up" if self._of_output else "down"):
            order = self._order_EC[block]
            gram = gram.gather(1, order[:, :, None].expand_as(gram)).gather(2, order[:, None, :].expand_as(gram))
        return gram

    @cached_property
    def _mean_gram(self) -> Tensor:
        """(K, K) covariance of one token of the layer."""
        total = torch.stack([self._seen_gram(block).sum(0) for block in self._blocks()]).sum(0)
        num_tokens = int(self.statistics["num_tokens"].sum())
        return total / num_tokens if num_tokens else torch.eye(len(total), device=self.device)

    @cached_property
    def _white_energy(self) -> float:
        """s for which white inputs, of outputs s W_e W_e^T a token, would put out the energy that the layer's did."""
        energy = white = 0.0
        for block in self._blocks():
            num_tokens = self.statistics["num_tokens"][block].to(self.device)
            energy += float(self._seen_gram(block).diagonal(dim1=1, dim2=2).sum())
            white += float((num_tokens * self._weight(block).square().sum((1, 2))).sum())
        return energy / white if white > 0 else 1.0

    def _base(self) -> Tensor | None:
        kind = self.options.base
        if kind == "none":
            return None
        if kind == "closed_form":
            num_rows, num_columns = self.weight_EMN.shape[1:]
            total = torch.zeros(num_columns, num_columns, device=self.device)
            weighted = torch.zeros(num_rows, num_columns, device=self.device)
            for block in self._blocks():
                gram = self._gram(block)
                total += gram.sum(0)
                weighted += (self._weight(block) @ gram).sum(0)
            return torch.linalg.solve(damp(total, max(self.options.damping, 1e-6)), weighted, left=False)
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
        base = torch.zeros(self.weight_EMN.shape[1:], device=self.device)
        for block in self._blocks():
            base += torch.einsum("emn,e->mn", self._weight(block), share_E[block])
        return base


def channel_alignment(layer: MoELayer, up_EMD: Tensor, down_EDF: Tensor, statistics: LayerStatistics) -> Tensor:
    """(E, F) int64: each expert's channels in the order of the most used expert's. Function-preserving."""
    leader = int(statistics["num_tokens"].argmax())
    tensors = {"up": up_EMD, "down": down_EDF}
    return torch.stack([align_expert(layer, tensors, expert, leader) for expert in range(layer.num_experts)])


def highest_ratio(layers: list[MoELayer], options: D2MoE) -> float:
    """The bound that the ratio must stay under (uniform ranks: may reach).

    Allocated: 1, less 1/E for a base. Uniform: rank one everywhere, 1 - (M + N) / (M N), less 1/E for a base.
    """
    bounds = []
    for layer in layers:
        base = 1 / layer.num_experts if options.base != "none" else 0.0
        for slot in (slot for group in GROUPS for slot in slots(layer, group, options)):
            rank_one = (slot.num_rows + slot.num_columns) / (slot.num_rows * slot.num_columns)
            bounds.append(1 - base - (rank_one if options.ranks == "uniform" else 0))
    return min(bounds)


def check_ratio(layers: list[MoELayer], options: D2MoE) -> None:
    """Refuses a ratio that leaves nothing for deltas.

    Raises:
        RecipeError: names the highest ratio that is possible.
    """
    if options.ratio is None:
        return
    highest = highest_ratio(layers, options)
    named = f"{max(math.floor(highest * 10_000), 0) / 10_000:g}"  # rounded up it would be refused itself
    if options.ranks == "uniform":
        if options.ratio > highest + 1e-12:
            raise RecipeError(
                f"method.ratio: {options.ratio} leaves some projection no rank; the highest possible is {named};"
                " lower it or set ranks: allocated"
            )
    elif options.ratio >= highest:
        raise RecipeError(
            f"method.ratio: {options.ratio} is more than the shared bases of the experts leave; the highest possible"
            f" is below {named}; lower it or set base: none"
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

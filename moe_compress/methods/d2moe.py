"""D2-MoE: every expert is a shared base plus a low-rank delta.

For each projection of a layer, W_e (M, N) the weight of expert e, A_e the covariance of its input:

    W_e = W_b + D_e,      D_e ~ U_e V_e  minimising  ||(D_e - U_e V_e) A_e^{1/2}||_F  at rank r_e

Source: arXiv 2502.17298, sections 3.1 (base) and 3.2 (truncation-aware SVD of the deltas). Differences, each because
it measures better:

* Tokens weigh by the squared gradient at the projection's output, A_e = sum_t ||d_t||^2 x_t x_t^T, so that the
  energies of all layers and projections are in units of the loss, and one budget can be spent on them (budget.py).
* Bases are optional, and there may be several, each of a cluster of experts (bases.py). Experts that share no ancestor
  have little in common, and a forced base costs its bytes.
* Gate and up read the same input: factorised as one matrix they share the right factor. So may several experts.
* No Cholesky, no inverse of a covariance, no SVD of a tall matrix (linalg/factorisation.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import LayerStatistics
from ..linalg.factorisation import project_right, right_gram, shared_right
from ..method_options import D2MoE
from ..model.discovery import MoELayer
from ..model.expert_bank import Group, channel_index
from ..model.slots import INDEX_SUFFIX, FactorisedSlot
from ..model.stored_experts import StoredExperts
from .bases import closed_form_bases, prune_bases, solve_bases, weighted_bases
from .forms import PLAIN, Form
from .merge import align_expert
from .metric import BlockMetric, ErrorMetric
from .slots import slots

_LEAST_GAIN = 1e-3
"""Relative, by which a round of alternation must lower the error for another to follow."""


@dataclass(frozen=True, slots=True)
class _Weights:
    """(n, M, N) fp32 of a block of experts, channels in aligned order. By itself, so that nothing refers to itself."""

    weight_EMN: Tensor | StoredExperts
    group: Group
    order_EC: Tensor | None
    device: torch.device

    def __call__(self, block: slice) -> Tensor:
        weight = self.weight_EMN[block].to(self.device, torch.float32)
        if self.order_EC is None:
            return weight
        order = self.order_EC[block]
        if self.group == "up":
            return weight.gather(1, order[:, :, None].expand_as(weight))
        return weight.gather(2, order[:, None, :].expand_as(weight))


class GroupProblem:
    """The weighted factorisation of one group of projections of one layer, expert by expert.

    Only one expert (on a GPU: a block of them) exists in fp32 at a time.

    Args:
        layer: the layer.
        group: `up` (gate and up) or `down`.
        weight_EMN: the group's experts in canonical layout, any floating dtype; read a block at a time.
        statistics: what the layer saw.
        options: the recipe's method.
        permutations_EF: channel orders from `channel_alignment`, or None.
        device: where the arithmetic is done.
        form: how the experts are put together.

    Attributes:
        bases_BMN: what the experts of each cluster share, fp32, or None.
        columns_C: numbers of the columns of the bases that are stored, or None for all.
        items: the experts that share a rank; one each, but where right factors are shared.
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
        form: Form = PLAIN,
    ) -> None:
        self.layer, self.group, self.options, self.statistics = layer, group, options, statistics
        self.device = torch.device(device)
        self.weight_EMN, self.form = weight_EMN, form
        self.slots = slots(layer, group, options)
        self.items = form.items(layer.num_experts)
        order_EC = None if permutations_EF is None else channel_index(layer, group, permutations_EF.to(self.device))
        self._weight = _Weights(weight_EMN, group, order_EC, self.device)
        needs_input = form != PLAIN
        self.metric = ErrorMetric(layer, group, statistics, options, order_EC, self._weight, needs_input, self.device)
        self.bases_BMN, self.columns_C = self._bases(), None
        if self.bases_BMN is not None and options.base_sparsity:
            self.columns_C, self.bases_BMN = prune_bases(self.bases_BMN, self.metric)

    def energies(self) -> dict[str, Tensor]:
        """(I, K) error that each direction removes, of each item by slot, fp32 on the CPU.

        Squared singular values of the weighted problem, descending; where a right factor is shared, the sum of what
        a direction removes for each of its experts.
        """
        rows: dict[str, list[Tensor]] = {slot.name: [] for slot in self.slots}
        if self.form.share_of is None:
            for block in self.metric.blocks():
                for name, energy_nK in self._energies(block).items():
                    rows[name].append(energy_nK.cpu())
        else:
            for members in self.items:
                for slot in self.slots:
                    rows[slot.name].append(self._shared_energies(members, slot.rows)[None].cpu())
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def factors(self, ranks: dict[str, list[int]], dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of the group's slots by parameter name (see model/experts.py), on the CPU.

        Args:
            ranks: slot name -> one rank an expert, DENSE for a whole matrix: the expert's own, to the bit.
            dtype: to store in.
        """
        layouts = self.layouts(ranks)
        if self.bases_BMN is not None:
            self._alternate(layouts)
            self.bases_BMN = self.bases_BMN.to(dtype).float()  # deltas make up for its rounding
        out = {name: torch.empty(shape, dtype=dtype) for layout in layouts for name, shape in layout.shapes().items()}
        for slot, layout in zip(self.slots, layouts, strict=True):
            if self.bases_BMN is not None:
                columns = slice(None) if self.columns_C is None else self.columns_C
                out[f"{slot.name}_base"].copy_(self.bases_BMN[:, slot.rows, columns])
            if self.columns_C is not None:
                out[f"{slot.name}_base{INDEX_SUFFIX}"] = self.columns_C.to("cpu", torch.int32)
            for expert, place in layout.dense_index.items():
                out[f"{slot.name}_dense"][place] = self._weight(slice(expert, expert + 1))[0, slot.rows]
        for expert, slot_index, u_MR, v_RN in self._pairs(layouts):
            layout = layouts[slot_index]
            out[f"{layout.name}_u"][layout.factor_rows(expert)] = u_MR.mT.to(dtype)
            if layout.leads[expert] == expert:
                out[f"{layout.name}_v"][layout.right_rows(expert)] = v_RN.to(dtype)
        return out

    def layouts(self, ranks: dict[str, list[int]]) -> list[FactorisedSlot]:
        """Names and places of the tensors of each slot."""
        form, options = self.form, self.options
        return [
            FactorisedSlot(slot.name, slot.num_rows, slot.num_columns, ranks[slot.name], **form.spec(slot, options))
            for slot in self.slots
        ]

    def weights(self) -> Iterator[Tensor]:
        """All experts, (n, M, N) fp32 a block, channels in aligned order."""
        return map(self._weight, self.metric.blocks())

    # --- deltas --------------------------------------------------------------------------------------------

    def _delta(self, block: slice) -> Tensor:
        """(n, M, N) what the bases do not explain."""
        weight = self._weight(block)
        if self.bases_BMN is None or self.form.base_of is None:
            return weight
        return weight - self.bases_BMN[list(self.form.base_of[block])]

    def _block_metric(self, block: slice) -> BlockMetric:
        return BlockMetric(self.metric, block, self.slots[0].num_rows)

    def _energies(self, block: slice) -> dict[str, Tensor]:
        delta, metric = self._delta(block), self._block_metric(block)
        return {slot.name: metric.energies(delta[:, slot.rows], slot.rows) for slot in self.slots}

    def _pairs(self, layouts: list[FactorisedSlot]) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(expert, index of the slot, u (M, R), v (R, N)) of all experts that have factors."""
        if self.form.share_of is not None:
            yield from self._shared_pairs(layouts)
            return
        for block in self.metric.blocks():
            yield from self._block_pairs(block, layouts)

    def _block_pairs(self, block: slice, layouts: list[FactorisedSlot]) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        wanted = [layout.left.lengths[block] for layout in layouts]
        if not any(map(any, wanted)):
            return  # whole matrices and empty factors need no decomposition
        delta, metric = self._delta(block), self._block_metric(block)
        for index, (slot, ranks) in enumerate(zip(self.slots, wanted, strict=True)):
            pairs = metric.factorise(delta[:, slot.rows], slot.rows, ranks)
            for expert, (u_MR, v_RN) in enumerate(pairs, block.start):
                yield expert, index, u_MR, v_RN

    # --- shared right factors ------------------------------------------------------------------------------

    def _shared(self, members: Sequence[int], rows: slice) -> Tensor:
        """(N, N) right factor of several experts, strongest row first."""
        blocks = [slice(expert, expert + 1) for expert in members]
        gram = self.metric.gram(blocks[0]).clone()
        for block in blocks[1:]:
            gram += self.metric.gram(block)
        root = self.metric.root(gram)
        problem = torch.zeros_like(gram[0])
        for metric in map(self._block_metric, blocks):
            weighted = metric.weighted(self._delta(metric.block)[:, rows], rows)
            problem += right_gram(weighted, root)[0] / metric.scale
        return shared_right(problem, root)

    def _shared_energies(self, members: Sequence[int], rows: slice) -> Tensor:
        """(N,) error that each shared direction removes, of all members together."""
        v_NN, total = self._shared(members, rows), torch.zeros(self.metric.num_columns, device=self.device)
        for expert in members:
            metric = self._block_metric(slice(expert, expert + 1))
            weighted = metric.weighted(self._delta(metric.block)[:, rows], rows)
            _, z_1NM = project_right(weighted, metric.root, v_NN)
            total += z_1NM[0].square().sum(1).float() / metric.scale
        return total

    def _shared_pairs(self, layouts: list[FactorisedSlot]) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        for members in self.items:
            for index, (slot, layout) in enumerate(zip(self.slots, layouts, strict=True)):
                rank = layout.ranks[members[0]]
                if rank <= 0:
                    continue
                v_RN = self._shared(members, slot.rows)[:rank]
                for expert in members:
                    metric = self._block_metric(slice(expert, expert + 1))
                    # whatever the weight on the output side, least squares gives each row of U by itself
                    t_1RR, z_1RM = project_right(self._delta(metric.block)[:, slot.rows], metric.root, v_RN)
                    u_1RM = torch.linalg.solve_triangular(t_1RR, z_1RM, upper=True)
                    yield expert, index, u_1RM[0].mT.float(), v_RN

    # --- bases ---------------------------------------------------------------------------------------------

    def _bases(self) -> Tensor | None:
        if self.form.base_of is None:
            return None
        if self.options.base == "closed_form":
            return closed_form_bases(self.metric, self._weight, self.form.base_of)
        return weighted_bases(self.options.base, self.metric, self._weight, self.form.base_of)

    def _alternate(self, layouts: list[FactorisedSlot]) -> None:
        """Fits the bases to what the deltas leave, and so in turn, until the weighted error falls no more.

        Neither step raises it: deltas are the best for the bases, and bases move by what lowers it most, with a small
        price on the way.
        """
        assert self.bases_BMN is not None
        before = math.inf
        for _ in range(self.options.alternate):
            error, steps = self._refit(layouts)
            if error > before * (1 - _LEAST_GAIN):
                return
            before = error
            for slot, step_BMN in zip(self.slots, steps, strict=True):
                self.bases_BMN[:, slot.rows] += step_BMN

    def _refit(self, layouts: list[FactorisedSlot]) -> tuple[float, list[Tensor]]:
        """The weighted error of bases and deltas as they are, and for each slot (B, M, N) what to add to its bases."""
        assert self.form.base_of is not None
        assert self.bases_BMN is not None
        moments = [torch.zeros_like(self.bases_BMN[:, slot.rows]) for slot in self.slots]
        size = self.metric.num_columns
        grams = [torch.zeros(self.form.num_bases, size, size, device=self.device) for _ in self.slots]
        error = 0.0
        for block in self.metric.blocks():
            delta, metric = self._delta(block), self._block_metric(block)
            for slot, layout, moment_BMN, gram_BNN in zip(self.slots, layouts, moments, grams, strict=True):
                residual = delta[:, slot.rows].clone()
                pairs = metric.factorise(residual, slot.rows, layout.left.lengths[block])
                for place, (u_MR, v_RN) in enumerate(pairs):
                    expert = block.start + place
                    if expert in layout.dense_index:
                        residual[place] = 0
                        continue
                    residual[place].addmm_(u_MR, v_RN, alpha=-1)
                    moment_BMN[self.form.base_of[expert]] += residual[place] @ metric.gram[place]
                    gram_BNN[self.form.base_of[expert]] += metric.gram[place]
                error += float(metric.errors(residual, slot.rows).sum())
        return error, [solve_bases(*sums, self.options.damping) for sums in zip(grams, moments, strict=True)]


def channel_alignment(layer: MoELayer, up_EMD: Tensor, down_EDF: Tensor, statistics: LayerStatistics) -> Tensor:
    """(E, F) int64: each expert's channels in the order of the most used expert's. Function-preserving."""
    leader = int(statistics["num_tokens"].argmax())
    tensors = {"up": up_EMD, "down": down_EDF}
    return torch.stack([align_expert(layer, tensors, expert, leader) for expert in range(layer.num_experts)])

"""What one MoE layer saw of the calibration text: every sum that a compression method needs.

For the tokens t routed to expert e, x input of gate and up, u their output `[gate; up]`, h input of down, y output of
down, g router weight, d_u and d_y gradients of the summed log-likelihood (METHODS: Statistics):

    num_tokens          n_e
    weight_sum          sum g                            saliency_sum     sum g ||expert_e(x)||   (REAP)
    output_norm_max     max ||expert_e(x)||              router_gram      H H^T, H router logits (E, T)
    *_gram              sum z z^T                        *_loss_gram      sum ||d||^2 z z^T
    *_grad_gram         sum d d^T                        *_grad_diagonal  its diagonal
    *_fisher            sum over sequences ||sum_t d z^T||^2, the squared norm of the gradient of the weights
    *_fisher_columns    the same by input column

where for a projection W with input z and output Wz the Gram is taken on the *smaller* side: of z, or of Wz, which is
all the truncated factorisation of W needs (`side`). `full` adds the Gram of z where that is the larger side: bases
other than none need it. The Gram of d is whole on the smaller side and a diagonal on the larger one.

The Fisher norm never forms the gradient of the weights: with K = d d^T and a sequence's tokens as rows,
||d^T z||^2 by column = ((K z) * z) summed over tokens: n^2 (M + N) operations instead of n M N.

Sums are fp32 (scalars fp64), taken in the order of the micro-batches by one worker: the same for any number of
workers. Cost a routed pair: four or five products with the smaller side's squared width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.writer import write_shard
from ..model.discovery import MoELayer
from ..model.observer import RoutedTokens

Side = Literal["input", "output"]

_SEGMENT_ROWS = 2048
"""Rows of padded sequences that the Fisher sums hold at a time."""


def up_side(layer: MoELayer) -> Side:
    """The smaller side of the first projection."""
    rows, columns = layer.up_shape
    return "input" if columns <= rows else "output"


def down_side(layer: MoELayer) -> Side:
    """The smaller side of the down projection."""
    rows, columns = layer.down_shape
    return "input" if columns <= rows else "output"


def gram_shapes(layer: MoELayer, full: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrix sums of a layer; what calibration holds in memory for it besides vectors."""
    E, (M, D), F = layer.num_experts, layer.up_shape, layer.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    for name, side, num_out, num_in in (
        ("up", up_side(layer), M, D),
        ("down", down_side(layer), D, F),
    ):
        width = num_in if side == "input" else num_out
        shapes[f"{name}_{side}_gram"] = shapes[f"{name}_{side}_loss_gram"] = (E, width, width)
        if full and side == "output":
            shapes[f"{name}_input_gram"] = shapes[f"{name}_input_loss_gram"] = (E, num_in, num_in)
        if side == "output":
            shapes[f"{name}_grad_gram"] = (E, num_out, num_out)
        else:
            shapes[f"{name}_grad_diagonal"] = (E, num_out)
    return shapes


class LayerStatistics:
    """Sums over one layer's routed tokens.

    Args:
        layer: the layer.
        full: also the input Grams on the larger side.
        device: where the sums are kept while they grow.

    Attributes:
        tensors: the sums by name; see the head of this file.
    """

    def __init__(self, layer: MoELayer, full: bool, device: str | torch.device = "cpu") -> None:
        self.layer, self.full = layer, full
        E, F, D = layer.num_experts, layer.intermediate_size, layer.hidden_size

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tensors: dict[str, Tensor] = {"num_tokens": zeros(E, dtype=torch.int64)}
        for name in ("weight_sum", "saliency_sum", "output_norm_max", "up_fisher", "down_fisher"):
            self.tensors[name] = zeros(E, dtype=torch.float64)
        self.tensors["router_gram"] = zeros(E, E, dtype=torch.float64)
        self.tensors["up_fisher_columns"] = zeros(E, D)
        self.tensors["down_fisher_columns"] = zeros(E, F)
        self.tensors["num_sequences"] = zeros(1, dtype=torch.int64)
        for name, shape in gram_shapes(layer, full).items():
            self.tensors[name] = zeros(*shape)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def update(self, seen: RoutedTokens, num_sequences: int, sequence_length: int) -> None:
        """Adds one micro-batch of `num_sequences` sequences, flattened to num_sequences * sequence_length tokens."""
        sums = self.tensors
        counts = torch.tensor(seen.counts, device=sums["num_tokens"].device)
        sums["num_tokens"] += counts
        sums["num_sequences"] += num_sequences
        by_expert = torch.repeat_interleave(torch.arange(len(seen.counts), device=counts.device), counts)
        norms, weights = seen.output_norm_S.double(), seen.weight_S.double()
        sums["weight_sum"].scatter_add_(0, by_expert, weights)
        sums["saliency_sum"].scatter_add_(0, by_expert, weights * norms)
        sums["output_norm_max"].scatter_reduce_(0, by_expert, norms, "amax")
        if seen.router_logits_TE is not None:
            logits = seen.router_logits_TE.double()
            sums["router_gram"].addmm_(logits.T, logits)
        self._add_grams("up", seen.x_SD, seen.up_SM, seen.d_up_SM, seen.counts)
        self._add_grams("down", seen.h_SF, seen.y_SD, seen.d_y_SD, seen.counts)
        segment_S = by_expert * num_sequences + seen.token_S // sequence_length
        lengths = torch.bincount(segment_S, minlength=len(seen.counts) * num_sequences)
        self._add_fisher("up", seen.x_SD, seen.d_up_SM, lengths)
        self._add_fisher("down", seen.h_SF, seen.d_y_SD, lengths)

    def _add_grams(self, name: str, z_SN: Tensor, out_SM: Tensor, d_SM: Tensor, counts: list[int]) -> None:
        sums = self.tensors
        for expert, (z, out, d) in enumerate(
            zip(z_SN.split(counts), out_SM.split(counts), d_SM.split(counts), strict=True)
        ):
            if len(z) == 0:
                continue
            d = d.float()
            loss_weight = torch.linalg.vector_norm(d, dim=1, keepdim=True)
            for side, rows in (("input", z), ("output", out)):
                if f"{name}_{side}_gram" not in sums:
                    continue
                rows = rows.float()
                _add_gram(sums[f"{name}_{side}_gram"][expert], rows)
                _add_gram(sums[f"{name}_{side}_loss_gram"][expert], rows * loss_weight)
            if f"{name}_grad_gram" in sums:
                _add_gram(sums[f"{name}_grad_gram"][expert], d)
            else:
                sums[f"{name}_grad_diagonal"][expert] += d.square().sum(0)

    def _add_fisher(self, name: str, z_SN: Tensor, d_SM: Tensor, lengths: Tensor) -> None:
        num_experts = self.layer.num_experts
        for experts_G, rows_GL, mask_GL1 in _segments(lengths, num_experts):
            z = z_SN[rows_GL].float() * mask_GL1
            d = d_SM[rows_GL].float() * mask_GL1
            columns_GN = (((d @ d.mT) @ z) * z).sum(1)
            # one-hot product instead of index_add_: the same order of summation on every device
            member_EG = torch.nn.functional.one_hot(experts_G, num_experts).T
            self.tensors[f"{name}_fisher_columns"] += member_EG.float() @ columns_GN
            self.tensors[f"{name}_fisher"] += member_EG.double() @ columns_GN.double().sum(1)

    def merge(self, other: LayerStatistics) -> None:
        """Adds the sums of other text; the order of merging is the caller's to fix."""
        for name, tensor in self.tensors.items():
            if name == "output_norm_max":
                torch.maximum(tensor, other.tensors[name], out=tensor)
            else:
                tensor += other.tensors[name]

    def save(self, path: Path) -> None:
        """Writes the sums as safetensors, atomically."""
        write_shard(path, {name: t.cpu() for name, t in self.tensors.items()})

    @classmethod
    def load(cls, layer: MoELayer, path: Path) -> LayerStatistics:
        """Reads what `save` wrote."""
        statistics = cls.__new__(cls)
        statistics.layer = layer
        statistics.tensors = load_file(path)
        statistics.full = {"up_input_gram", "down_input_gram"} <= set(statistics.tensors)
        return statistics


def _add_gram(gram_NN: Tensor, rows_SN: Tensor) -> None:
    gram_NN.addmm_(rows_SN.T, rows_SN)


def _segments(lengths: Tensor, num_experts: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Groups of (expert, sequence) segments of similar length, padded to one length.

    Args:
        lengths: (E * sequences,) rows of each segment; segments lie one after the other.

    Yields:
        (G,) expert of each segment, (G, L) row indices, (G, L, 1) fp32 mask of the real rows. Lengths are padded
        to powers of two, so at most half of the work is padding, and each group has few enough rows to be cheap.
    """
    starts = lengths.cumsum(0) - lengths
    padded = torch.pow(2, torch.ceil(torch.log2(lengths.clamp_min(1).double()))).long()
    for length in torch.unique(padded[lengths > 0]).tolist():
        members = torch.nonzero((padded == length) & (lengths > 0)).flatten()
        for group in members.split(max(1, _SEGMENT_ROWS // length)):
            steps = torch.arange(length, device=lengths.device)
            mask = steps < lengths[group, None]
            rows = torch.where(mask, starts[group, None] + steps, 0)
            yield group // (len(lengths) // num_experts), rows, mask[..., None].float()

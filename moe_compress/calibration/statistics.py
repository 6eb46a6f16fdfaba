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
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.writer import write_shard
from ..errors import CalibrationError
from ..model.discovery import MoELayer
from ..model.observer import RoutedTokens

Side = Literal["input", "output"]

_GROUP_ELEMENTS = 2**20
"""Elements of padded sequences that the Fisher sums hold in fp32 at a time: few enough to stay in a CPU's cache."""

_STRIP_COLUMNS = 256
"""Width of the strips that a Gram grows by: wide enough for a fast product, few elements above the diagonal."""


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
        """Adds one micro-batch of `num_sequences` sequences, flattened to num_sequences * sequence_length tokens.

        Raises:
            CalibrationError: activations or gradients are not finite.
        """
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
        segment_S = by_expert * num_sequences + seen.token_S // sequence_length
        lengths = torch.bincount(segment_S, minlength=len(seen.counts) * num_sequences)
        for name, z_SN, out_SM, d_SM in (
            ("up", seen.x_SD, seen.up_SM, seen.d_up_SM),
            ("down", seen.h_SF, seen.y_SD, seen.d_y_SD),
        ):
            loss_weight_S1 = self._add_fisher(name, z_SN, d_SM, lengths)
            self._add_grams(name, z_SN, out_SM, d_SM, loss_weight_S1, seen.counts)
        if not all(bool(sums[name].isfinite().all()) for name in ("saliency_sum", "up_fisher", "down_fisher")):
            raise CalibrationError(
                f"{self.layer.path}: activations or gradients hold NaN or Inf on the calibration text;"
                " check the checkpoint for NaN weights, or set calibration.dtype: float32"
            )

    def _add_grams(
        self, name: str, z_SN: Tensor, out_SM: Tensor, d_SM: Tensor, loss_weight_S1: Tensor, counts: list[int]
    ) -> None:
        summed = {"input": z_SN, "output": out_SM, "grad": d_SM}
        summed = {side: rows_SN for side, rows_SN in summed.items() if f"{name}_{side}_gram" in self.tensors}
        for side, rows_SN in summed.items():
            gram_ENN = self.tensors[f"{name}_{side}_gram"]
            loss_gram_ENN = self.tensors.get(f"{name}_{side}_loss_gram")
            parts = zip(rows_SN.split(counts), loss_weight_S1.split(counts), strict=True)
            for expert, (part, loss_weight) in enumerate(parts):
                rows = part.float()
                with _half_products(part):
                    _add_gram(gram_ENN[expert], rows)
                if loss_gram_ENN is not None:
                    _add_gram(loss_gram_ENN[expert], rows * loss_weight)

    def _add_fisher(self, name: str, z_SN: Tensor, d_SM: Tensor, lengths: Tensor) -> Tensor:
        """Adds what is summed sequence by sequence; (S, 1) fp32 norms of the rows of d."""
        sums, num_experts = self.tensors, self.layer.num_experts
        power_S = torch.zeros(len(d_SM) + 1, device=d_SM.device)  # one more for the padding
        for experts_G, rows_GL, mask_GL1 in _segments(lengths, num_experts, z_SN.shape[1] + d_SM.shape[1]):
            z = z_SN[rows_GL].float()
            d = d_SM[rows_GL].float().mul_(mask_GL1)
            with _half_products(d_SM):
                gram_GLL = d @ d.mT
            power_S[torch.where(mask_GL1[..., 0], rows_GL, len(d_SM))] = gram_GLL.diagonal(dim1=1, dim2=2)
            columns_GN = (gram_GLL @ z).mul_(z).sum(1)
            # one-hot product instead of index_add_: the same order of summation on every device
            member_EG = torch.nn.functional.one_hot(experts_G, num_experts).T
            sums[f"{name}_fisher_columns"] += member_EG.float() @ columns_GN
            sums[f"{name}_fisher"] += member_EG.double() @ columns_GN.double().sum(1)
            if f"{name}_grad_diagonal" in sums:
                sums[f"{name}_grad_diagonal"] += member_EG.float() @ d.square_().sum(1)
        return power_S[:-1, None].sqrt()

    def merge(self, other: LayerStatistics) -> None:
        """Adds the sums of other text; the order of merging is the caller's to fix."""
        for name, tensor in self.tensors.items():
            if name == "output_norm_max":
                torch.maximum(tensor, other.tensors[name], out=tensor)
            else:
                tensor += other.tensors[name]

    def complete(self) -> None:
        """Mirrors the Grams, which grow as lower triangles."""
        for name in gram_shapes(self.layer, self.full):
            if name.endswith("_gram"):
                for gram_NN in self.tensors[name]:
                    gram_NN.copy_(gram_NN.tril() + gram_NN.tril(-1).T)

    def save(self, path: Path) -> None:
        """Completes the sums and writes them as safetensors, atomically."""
        self.complete()
        write_shard(path, {name: t.cpu() for name, t in self.tensors.items()})

    @classmethod
    def load(cls, layer: MoELayer, path: Path) -> LayerStatistics:
        """Reads what `save` wrote."""
        statistics = cls.__new__(cls)
        statistics.layer = layer
        statistics.tensors = load_file(path)
        statistics.full = {"up_input_gram", "down_input_gram"} <= set(statistics.tensors)
        return statistics


@contextmanager
def _half_products(source: Tensor) -> Iterator[None]:
    """Multiplies fp32 casts of `source` on the units for its own dtype: several times as fast.

    Where every value is a bf16 value (on a GPU: a TF32 value, which fp16 is too) products are exact and sums fp32.
    """
    if source.dtype not in ((torch.bfloat16, torch.float16) if source.is_cuda else (torch.bfloat16,)):
        yield
        return
    backend = torch.backends.cuda.matmul if source.is_cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "tf32" if source.is_cuda else "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def _add_gram(gram_NN: Tensor, rows_SN: Tensor) -> None:
    """Adds rows^T rows to the strips left of and on the diagonal; `complete` mirrors them."""
    for start in range(0, len(gram_NN), _STRIP_COLUMNS):
        stop = start + _STRIP_COLUMNS
        gram_NN[start:stop, :stop].addmm_(rows_SN[:, start:stop].T, rows_SN[:, :stop])


def _segments(lengths: Tensor, num_experts: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Groups of (expert, sequence) segments of similar length, padded to one length.

    Args:
        lengths: (E * sequences,) rows of each segment; segments lie one after the other.
        num_experts: E.
        width: elements a row; a group holds about _GROUP_ELEMENTS of them.

    Yields:
        (G,) expert of each segment, (G, L) row indices, (G, L, 1) mask of the real rows. Lengths are padded to the
        next of eight steps between powers of two, so at most an eighth of the rows is padding.
    """
    starts = lengths.cumsum(0) - lengths
    unit = 2 ** (lengths.clamp_min(1).double().log2().floor().long() - 3).clamp_min(0)
    padded = (lengths + unit - 1) // unit * unit
    for length in padded.unique().tolist():
        if length == 0:
            continue
        members = (padded == length).nonzero().flatten()
        for group in members.split(max(1, _GROUP_ELEMENTS // (width * length))):
            steps = torch.arange(length, device=lengths.device)
            mask = steps < lengths[group, None]
            rows = torch.where(mask, starts[group, None] + steps, 0)
            yield group // (len(lengths) // num_experts), rows, mask[..., None]

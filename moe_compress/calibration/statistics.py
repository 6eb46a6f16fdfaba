"""What one MoE layer saw of the calibration text: every sum that a compression method needs.

For the tokens t routed to expert e, x input of gate and up, u their output `[gate; up]`, h input of down, y output of
down, g router weight, d_u and d_y gradients of the summed log-likelihood (METHODS: Statistics):

    num_tokens          n_e
    weight_sum          sum g                            saliency_sum     sum g ||expert_e(x)||   (REAP)
    output_norm_max     max ||expert_e(x)||              router_gram      H H^T, H router logits (E, T)
    input_sum           sum x                            taylor_sum       sum (d_y . y)^2
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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..checkpoint.shard import open_tensors
from ..checkpoint.writer import write_shard
from ..errors import CalibrationError
from ..linalg.packed import packed_size, strips, unpack
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS, Group, matrix_shape
from ..model.grouped import TILE_ROWS
from ..model.observer import RoutedTokens

Side = Literal["input", "output"]

_GROUP_ELEMENTS = 2**20
"""Elements of padded sequences that the Fisher sums hold in fp32 at a time: few enough to stay in a CPU's cache."""

_CACHED_ROWS = 128
"""Rows at a time of what is done between two products."""

_STRIP_ROWS = 128
"""Tokens of the strips that the products between the tokens of a sequence are made of."""


SAMPLED = ("sample_hidden", "sample_index", "sample_weights", "sample_logits")
"""What the experts were called with at the sampled tokens, (n, D), (n, top_k) and (n, top_k) as the model had it, and
the router's logits (n, E), where they were seen."""

SAMPLE_TOKENS = 1024
"""About as many tokens of a calibration text are sampled."""


def smaller_side(layer: MoELayer, group: Group) -> Side:
    """The side of a group's matrix that its Gram is taken on."""
    rows, columns = matrix_shape(layer, group)
    return "input" if columns <= rows else "output"


def gram_shapes(layer: MoELayer, full: bool) -> dict[str, tuple[int, int]]:
    """Shapes of the sums that are Grams, packed, or diagonals: what calibration holds for a layer besides vectors."""
    names: list[str] = []
    for name in GROUPS:
        side = smaller_side(layer, name)
        names += [f"{name}_{side}_gram", f"{name}_{side}_loss_gram"]
        if full and side == "output":
            names += [f"{name}_input_gram", f"{name}_input_loss_gram"]
        names.append(f"{name}_grad_gram" if side == "output" else f"{name}_grad_diagonal")
    widths = {name: gram_width(layer, name) for name in names}
    return {name: (layer.num_experts, packed_size(width) if is_gram(name) else width) for name, width in widths.items()}


def is_gram(name: str) -> bool:
    """Whether a sum is a packed Gram of each expert."""
    return name.endswith("_gram") and name != "router_gram"


def group_of(name: str) -> Group:
    """The group that a sum is of."""
    return "up" if name.startswith("up") else "down"


def gram_width(layer: MoELayer, name: str) -> int:
    """N of a Gram, or of the diagonal of one."""
    rows, columns = matrix_shape(layer, group_of(name))
    return columns if "_input_" in name else rows


def is_of_channels(name: str) -> bool:
    """Whether a group's Gram or vector is over hidden channels: outputs of up, inputs of down."""
    is_of_output = "_output_" in name or "_grad_" in name
    return is_of_output == (group_of(name) == "up")


class LayerStatistics:
    """Sums over one layer's routed tokens.

    Args:
        layer: the layer.
        full: also the input Grams on the larger side.
        device: where the sums are kept while they grow.
        sample_stride: every so-many-th token is kept whole, for comparing experts on the same tokens.

    Attributes:
        tensors: the sums by name; see the head of this file. Grams are packed: `gram` gives them whole.
    """

    def __init__(self, layer: MoELayer, full: bool, device: str | torch.device = "cpu", sample_stride: int = 1) -> None:
        self.layer, self.full, self.sample_stride = layer, full, sample_stride
        E, F, D = layer.num_experts, layer.intermediate_size, layer.hidden_size

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tensors: dict[str, Tensor] = {"num_tokens": zeros(E, dtype=torch.int64)}
        for name in ("weight_sum", "saliency_sum", "taylor_sum", "output_norm_max", "up_fisher", "down_fisher"):
            self.tensors[name] = zeros(E, dtype=torch.float64)
        self.tensors["input_sum"] = zeros(E, D)
        self.tensors["router_gram"] = zeros(E, E, dtype=torch.float64)
        self.tensors["up_fisher_columns"] = zeros(E, D)
        self.tensors["down_fisher_columns"] = zeros(E, F)
        self.tensors["num_sequences"] = zeros(1, dtype=torch.int64)
        for name, shape in gram_shapes(layer, full).items():
            self.tensors[name] = zeros(*shape)
        self._sample: dict[str, list[Tensor]] = {name: [] for name in SAMPLED}
        self._num_real_tokens = 0

    @classmethod
    def of(cls, layer: MoELayer, tensors: dict[str, Tensor], full: bool) -> LayerStatistics:
        """Sums that are there already."""
        statistics = cls.__new__(cls)
        statistics.layer, statistics.tensors, statistics.full = layer, tensors, full
        statistics._sample = {}
        return statistics

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def gram(self, name: str, experts: slice = slice(None)) -> Tensor:
        """(n, N, N) fp32 a Gram of some experts, whole."""
        return unpack(self.tensors[name][experts], gram_width(self.layer, name))

    def update(self, seen: RoutedTokens, num_sequences: int, sequence_length: int) -> None:
        """Adds one micro-batch of `num_sequences` sequences, flattened to num_sequences * sequence_length tokens.

        Raises:
            CalibrationError: activations or gradients are not finite.
        """
        sums = self.tensors
        device = sums["num_tokens"].device
        counts_E = torch.tensor(seen.counts, device=device)
        sizes_E = torch.tensor(seen.sizes, device=device)
        sums["num_tokens"] += counts_E
        sums["num_sequences"] += num_sequences
        expert_S = torch.repeat_interleave(torch.arange(len(seen.sizes), device=device), sizes_E)
        norms, weights = seen.output_norm_S.double(), seen.weight_S.double()
        sums["weight_sum"].scatter_add_(0, expert_S, weights)
        sums["saliency_sum"].scatter_add_(0, expert_S, weights * norms)
        sums["output_norm_max"].scatter_reduce_(0, expert_S, norms, "amax")
        tiles = zip(seen.d_y_SD.split(_CACHED_ROWS), seen.y_SD.split(_CACHED_ROWS), strict=True)
        slope_S = torch.cat([(d.float() * y).sum(1) for d, y in tiles]).double()
        sums["taylor_sum"].scatter_add_(0, expert_S, slope_S.square())
        for expert, rows in enumerate(seen.x_SD.split(seen.sizes)):
            sums["input_sum"][expert] += rows.sum(0, dtype=torch.float32)
        self._take_sample(seen)
        if seen.router_logits_TE is not None:
            logits = seen.router_logits_TE.double()
            sums["router_gram"].addmm_(logits.T, logits)
        first_E = sizes_E.cumsum(0) - sizes_E
        is_routed_S = torch.arange(len(expert_S), device=device) - first_E[expert_S] < counts_E[expert_S]
        segment_S = expert_S * num_sequences + seen.token_S // sequence_length
        lengths_EQ = torch.bincount(segment_S[is_routed_S], minlength=len(seen.sizes) * num_sequences)
        lengths_EQ = lengths_EQ.view(-1, num_sequences)
        starts_EQ = first_E[:, None] + lengths_EQ.cumsum(1) - lengths_EQ
        for name, z_SN, out_SM, d_SM in (
            ("up", seen.x_SD, seen.up_SM, seen.d_up_SM),
            ("down", seen.h_SF, seen.y_SD, seen.d_y_SD),
        ):
            power_S1 = self._add_fisher(name, z_SN, d_SM, starts_EQ, lengths_EQ)
            self._add_grams(name, z_SN, out_SM, d_SM, power_S1, seen.sizes)
        if not all(bool(sums[name].isfinite().all()) for name in ("saliency_sum", "up_fisher", "down_fisher")):
            raise CalibrationError(
                f"{self.layer.path}: activations or gradients hold NaN or Inf on the calibration text;"
                " check the checkpoint for NaN weights, or set calibration.dtype: float32"
            )

    def _take_sample(self, seen: RoutedTokens) -> None:
        """Keeps every `sample_stride`-th real token of the text."""
        first = -self._num_real_tokens % self.sample_stride
        self._num_real_tokens += len(seen.hidden_TD)
        called_with = (seen.hidden_TD, seen.index_TK, seen.weights_TK, seen.router_logits_TE)
        for name, rows in zip(SAMPLED, called_with, strict=True):
            if rows is not None:
                self._sample[name].append(rows[first :: self.sample_stride].cpu())

    def _add_grams(
        self, name: str, z_SN: Tensor, out_SM: Tensor, d_SM: Tensor, power_S1: Tensor, sizes: list[int]
    ) -> None:
        summed = {"input": z_SN, "output": out_SM, "grad": d_SM}
        for side, rows_SN in summed.items():
            gram_EP = self.tensors.get(f"{name}_{side}_gram")
            if gram_EP is None:
                continue
            loss_gram_EP = self.tensors.get(f"{name}_{side}_loss_gram")
            half, most = _takes_half(rows_SN), max(1, *sizes)
            num_buffers = 1 if loss_gram_EP is None else 3 if half else 2
            shape = num_buffers, min(most, TILE_ROWS) if rows_SN.is_cpu else most, rows_SN.shape[1]
            buffers = rows_SN.new_empty(shape, dtype=torch.float32)
            experts = zip(rows_SN.split(sizes), power_S1.split(sizes), strict=True)
            for expert, (routed_SN, routed_power) in enumerate(experts):
                tiles = zip(routed_SN.split(buffers.shape[1]), routed_power.split(buffers.shape[1]), strict=True)
                for tile, power in tiles:
                    rows, *weighted = _weighted(tile, power, buffers)
                    with _half_products(tile.is_cuda, half):
                        _add_gram(gram_EP[expert], rows, rows)
                        if loss_gram_EP is not None:
                            for part in weighted:
                                _add_gram(loss_gram_EP[expert], part, rows)

    def _add_fisher(self, name: str, z_SN: Tensor, d_SM: Tensor, starts_EQ: Tensor, lengths_EQ: Tensor) -> Tensor:
        """Adds what is summed sequence by sequence; (S, 1) fp32 squared norms of the rows of d."""
        sums, num_experts = self.tensors, self.layer.num_experts
        power_S = torch.zeros(len(d_SM) + 1, device=d_SM.device)  # one more for the padding
        half = d_SM.is_cuda and _takes_half(d_SM)  # lengths are many, and a CPU compiles a product for each
        for experts_G, rows_GL, mask_GL in _segments(starts_EQ, lengths_EQ, z_SN.shape[1] + d_SM.shape[1]):
            z_GLN, d_GLM = (
                t.index_select(0, rows_GL.flatten()).unflatten(0, rows_GL.shape).float() for t in (z_SN, d_SM)
            )
            d_GLM.mul_(mask_GL[..., None])
            columns_GN, power_GL = _fisher_columns(z_GLN, d_GLM, half)
            power_S[torch.where(mask_GL, rows_GL, len(d_SM))] = power_GL
            # one-hot product instead of index_add_: the same order of summation on every device
            member_EG = torch.nn.functional.one_hot(experts_G, num_experts).T
            sums[f"{name}_fisher_columns"] += member_EG.float() @ columns_GN
            sums[f"{name}_fisher"] += member_EG.double() @ columns_GN.double().sum(1)
            if f"{name}_grad_diagonal" in sums:
                sums[f"{name}_grad_diagonal"] += member_EG.float() @ d_GLM.square_().sum(1)
        return power_S[:-1, None]

    def merge(self, other: LayerStatistics) -> None:
        """Adds the sums of other text; the order of merging is the caller's to fix."""
        for name, rows in other._sample.items():
            self._sample[name] += rows
        for name, tensor in self.tensors.items():
            if name == "output_norm_max":
                torch.maximum(tensor, other.tensors[name], out=tensor)
            elif name in SAMPLED:
                self.tensors[name] = torch.cat([tensor, other.tensors[name]])
            else:
                tensor += other.tensors[name]

    def save(self, path: Path) -> None:
        """Lays the sampled tokens end to end and writes all sums as safetensors, atomically."""
        self.tensors |= {name: torch.cat(rows) for name, rows in self._sample.items() if rows}
        write_shard(path, {name: t.cpu() for name, t in self.tensors.items()})

    @classmethod
    def load(cls, layer: MoELayer, path: Path, names: Sequence[str] = ()) -> LayerStatistics:
        """Reads what `save` wrote, or of it only the sums of these names."""
        with open_tensors(path) as file:
            stored = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in sorted(stored & set(names or stored))}
        return cls.of(layer, tensors, {"up_input_gram", "down_input_gram"} <= stored)


def _takes_half(source: Tensor) -> bool:
    """Whether fp32 casts of `source` may be multiplied on faster units with exact products and fp32 sums.

    On a CPU every value must be a bf16 value, on a GPU a TF32 value, which fp16 is too.
    """
    return source.dtype in ((torch.bfloat16, torch.float16) if source.is_cuda else (torch.bfloat16,))


@contextmanager
def _half_products(is_cuda: bool, wanted: bool) -> Iterator[None]:
    """Multiplies fp32 tensors as if they were bf16 on a CPU, TF32 on a GPU; sums stay fp32."""
    if not wanted:
        yield
        return
    backend = torch.backends.cuda.matmul if is_cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "tf32" if is_cuda else "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def _weighted(rows_SN: Tensor, weight_S1: Tensor, buffers_BSN: Tensor) -> list[Tensor]:
    """The rows in fp32, and what adds up to the rows times their weight, in as many tensors as there are buffers left.

    Two are what bf16 holds of each element and the rest, so `_half_products` lose at most 2^-17 of it.
    A few rows at a time, which stay in the cache; fresh memory for each tile would cost more than the arithmetic.
    """
    filled = [buffer[: len(rows_SN)] for buffer in buffers_BSN]
    for source, weight, rows, *parts in zip(
        *(t.split(_CACHED_ROWS) for t in (rows_SN, weight_S1, *filled)), strict=True
    ):
        rows.copy_(source)
        if parts:
            torch.mul(rows, weight, out=parts[-1])
        if len(parts) == 2:
            parts[0].copy_(parts[1].bfloat16())
            parts[1].sub_(parts[0])
    return filled


def _add_gram(gram_P: Tensor, left_SN: Tensor, right_SN: Tensor) -> None:
    """Adds left^T right, which is symmetric, to a packed matrix."""
    for rows, strip in strips(gram_P, left_SN.shape[1]):
        strip.addmm_(left_SN[:, rows].T, right_SN[:, : rows.stop])


def _fisher_columns(z_GLN: Tensor, d_GLM: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """(G, N) squared norms of the columns of d^T z, (G, L) squared norms of the rows of d.

    sum_tu (z_t d_t.d_u z_u) by strips of t with u <= t: what is right of the diagonal is the mirror of the rest.
    """
    columns_GN, power = z_GLN.new_zeros(z_GLN.shape[0], z_GLN.shape[2]), []
    for start in range(0, z_GLN.shape[1], _STRIP_ROWS):
        strip, until = slice(start, start + _STRIP_ROWS), slice(0, start + _STRIP_ROWS)
        with _half_products(d_GLM.is_cuda, half):
            gram = d_GLM[:, strip] @ d_GLM[:, until].mT
        power.append(gram[:, :, start:].diagonal(dim1=1, dim2=2).clone())
        gram[:, :, :start] *= 2
        columns_GN += (gram @ z_GLN[:, until]).mul_(z_GLN[:, strip]).sum(1)
    return columns_GN, torch.cat(power, dim=1)


def _segments(starts_EQ: Tensor, lengths_EQ: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Groups of (expert, sequence) segments of similar length, padded to one length.

    Args:
        starts_EQ, lengths_EQ: first row and number of rows of each expert and sequence.
        width: elements a row; a group holds about _GROUP_ELEMENTS of them.

    Yields:
        (G,) expert of each segment, (G, L) row indices, (G, L) mask of the real rows. Lengths are padded to the next
        of eight steps between powers of two, so at most an eighth of the rows is padding.
    """
    starts, lengths = starts_EQ.flatten(), lengths_EQ.flatten()
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
            yield group // lengths_EQ.shape[1], rows, mask

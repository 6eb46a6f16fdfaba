"""What an error in the weights of a group of projections costs: the covariances that a truncation is weighted with.

    loss        ||(D - X) A_w^1/2||^2           A_w = sum_t ||d_t||^2 x_t x_t^T
    input       ||(D - X) A^1/2||^2             A = sum_t x_t x_t^T
    two_sided   ||B^1/2 (D - X) A^1/2||^2 / n   B = sum_t d_t d_t^T, on the larger side its diagonal
    none        ||D - X||^2

x_t input and d_t gradient at the output of a projection, n tokens. METHODS step 2. On the larger side of a projection
no covariance of it is needed: of the input's only D A D^T enters, which without a base is the covariance of the outputs
themselves. Covariances of experts that saw few tokens are shrunk: of inputs and gradients towards the layer's mean, of
outputs towards what white inputs would put out, since what other experts put out says nothing of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..calibration.statistics import LayerStatistics, is_of_channels, smaller_side
from ..errors import CompressionError
from ..linalg.factorisation import (
    Factors,
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
from ..model.expert_bank import Group, matrix_shape

# Shape suffixes: E experts, M and N rows and columns of a matrix, K the smaller, n experts of a block.

_GRAMS = {"loss": "loss_gram", "input": "gram", "two_sided": "gram"}

_BLOCK_ELEMENTS = 2**29
"""Of a tensor of all experts of a block: several are there at once."""

Weights = Callable[[slice], Tensor]
"""(n, M, N) fp32 weights of a block of experts, channels in aligned order."""


def input_gram(group: Group, options: D2MoE) -> str | None:
    """Name of the covariance of the group's inputs that the options weigh errors with; None where they do not."""
    gram = _GRAMS.get(options.weighting)
    return gram and f"{group}_input_{gram}"


def sums_used(layer: MoELayer, group: Group, options: D2MoE) -> list[str]:
    """Names of the statistics that a group's problem may read: the rest need not be loaded."""
    names = ["num_tokens", "router_gram", f"{group}_fisher", f"{group}_fisher_columns"]
    if gram := _GRAMS.get(options.weighting):
        has_others = options.base != "none" or options.share != "none"
        names += [f"{group}_{smaller_side(layer, group)}_{gram}"] + [f"{group}_input_{gram}"] * has_others
    if options.weighting == "two_sided":
        names += [f"{group}_grad_gram", f"{group}_grad_diagonal"]
    return names


def experts_at_once(layer: MoELayer, group: Group, on_gpu: bool) -> int:
    """Experts of a block."""
    num_columns = matrix_shape(layer, group)[1]
    largest = max(num_columns, layer.up_shape[0]) * num_columns
    return min(layer.num_experts, max(1, _BLOCK_ELEMENTS // largest)) if on_gpu else 1


class ErrorMetric:
    """The weighting of one group of projections of one layer.

    Args:
        layer, group: which.
        statistics: what the layer saw.
        options: the recipe's method.
        order_EC: channels' order (`channel_index`) where experts are aligned, or None.
        weight: the experts' weights.
        has_bases: deltas are weighted, not the experts themselves.
        device: where the arithmetic is done.

    Raises:
        CompressionError: the statistics lack a covariance that this weighting needs.
    """

    def __init__(
        self,
        layer: MoELayer,
        group: Group,
        statistics: LayerStatistics,
        options: D2MoE,
        order_EC: Tensor | None,
        weight: Weights,
        has_bases: bool,
        device: torch.device,
    ) -> None:
        self.layer, self.group, self.statistics, self.options = layer, group, statistics, options
        self.device, self._order_EC, self._weight = device, order_EC, weight
        self._means: dict[str, Tensor] = {}
        self.num_columns = matrix_shape(layer, group)[1]
        self.is_two_sided = options.weighting == "two_sided"
        self.of_output = smaller_side(layer, group) == "output" and not has_bases and options.weighting != "none"
        gram = _GRAMS.get(options.weighting)
        self._gram_name = gram and f"{group}_{'output' if self.of_output else 'input'}_{gram}"
        if self._gram_name is not None and self._gram_name not in statistics:
            raise CompressionError(
                f"{layer.path}: statistics lack {self._gram_name}; run with calibration.full_covariance: always"
            )

    def blocks(self) -> Iterator[slice]:
        """Experts to work on at once: LAPACK gains nothing from a batch, a GPU does."""
        num_experts = self.layer.num_experts
        size = experts_at_once(self.layer, self.group, on_gpu=self.device.type != "cpu")
        for start in range(0, num_experts, size):
            yield slice(start, min(start + size, num_experts))

    def gram(self, block: slice) -> Tensor:
        """(n, K, K) fp32 covariances of the inputs, or of the outputs, those of rare experts shrunk."""
        if self._gram_name is None:
            return torch.eye(self.num_columns, device=self.device).expand(block.stop - block.start, -1, -1)
        return self._shrunk(self._seen(self._gram_name, block), block, lambda: self._expected(block))

    def root(self, gram_nKK: Tensor) -> InputRoot:
        """Of what `gram` gives, or of sums of it, damped."""
        if self._gram_name is None:  # a multiple of the identity
            return InputRoot.of_diagonal(damp(gram_nKK, self.options.damping).diagonal(dim1=1, dim2=2).sqrt())
        return InputRoot.from_gram(gram_nKK, self.options.damping)

    def gradient_weight(self, block: slice) -> Tensor:
        """(n, M, M) fp32 covariances of the gradients at the outputs, or (n, M) their diagonals, likewise."""
        name = f"{self.group}_grad_gram"
        if name in self.statistics:
            return self._shrunk(self._seen(name, block), block, lambda: self._mean(name))
        diagonal_EM = self._diagonals
        mean_M = diagonal_EM.sum(0) / self.num_tokens.sum().clamp_min(1)
        return self._shrunk(diagonal_EM[block, None], block, lambda: mean_M)[:, 0]

    def vectors(self, name: str) -> Tensor:
        """(E, N) a sum by columns or rows of the group's matrices, channels in aligned order."""
        sums = self.statistics[name].to(self.device)
        return sums if self._order_EC is None or not is_of_channels(name) else sums.gather(1, self._order_EC)

    @cached_property
    def num_tokens(self) -> Tensor:
        """(E,) tokens of each expert."""
        return self.statistics["num_tokens"].to(self.device)

    # --- internals -----------------------------------------------------------------------------------------

    def _seen(self, name: str, block: slice) -> Tensor:
        """(n, K, K) covariances as they were summed, channels in aligned order."""
        gram = self.statistics.gram(name, block).to(self.device)
        if self._order_EC is not None and is_of_channels(name):
            order = self._order_EC[block]
            gram = gram.gather(1, order[:, :, None].expand_as(gram)).gather(2, order[:, None, :].expand_as(gram))
        return gram

    @cached_property
    def _diagonals(self) -> Tensor:
        """(E, M) of the covariances of the gradients, where they are not there whole."""
        return self.vectors(f"{self.group}_grad_diagonal")

    def _shrunk(self, sums: Tensor, block: slice, prior: Callable[[], Tensor]) -> Tensor:
        """The sums of a block, those of rare experts shrunk towards what is expected of a token."""
        num_tokens = self.num_tokens[block]
        is_rare = num_tokens < self.options.min_tokens
        return shrink_rare(sums, num_tokens, self.options.min_tokens, prior()) if bool(is_rare.any()) else sums

    def _expected(self, block: slice) -> Tensor:
        """(K, K), or (n, K, K) where experts have their own: what `gram` expects of a token."""
        assert self._gram_name is not None
        if not self.of_output:
            return self._mean(self._gram_name)
        weight = self._weight(block)
        return self._white_energy * symmetric_product(weight.mT, weight.mT)

    def _mean(self, name: str) -> Tensor:
        """(K, K) covariance of one token of the layer; the identity where there was none."""
        if name not in self._means:
            total = torch.stack([self._seen(name, block).sum(0) for block in self.blocks()]).sum(0)
            num_tokens = int(self.num_tokens.sum())
            self._means[name] = total / num_tokens if num_tokens else torch.eye(len(total), device=self.device)
        return self._means[name]

    @cached_property
    def _white_energy(self) -> float:
        """s for which white inputs, of outputs s W_e W_e^T a token, would put out the energy that the layer's did."""
        assert self._gram_name is not None
        energy = white = 0.0
        for block in self.blocks():
            energy += float(self._seen(self._gram_name, block).diagonal(dim1=1, dim2=2).sum())
            white += float((self.num_tokens[block] * self._weight(block).square().sum((1, 2))).sum())
        return energy / white if white > 0 else 1.0


class BlockMetric:
    """The weighting of a block of experts, for slots of one shape; what they share is computed once.

    Args:
        metric: of the whole group.
        block: which experts.
        num_rows: M of the slots.
    """

    def __init__(self, metric: ErrorMetric, block: slice, num_rows: int) -> None:
        self.metric, self.block = metric, block
        self._output_roots: dict[int, InputRoot] = {}
        self.is_right = num_rows >= metric.num_columns

    @cached_property
    def gram(self) -> Tensor:
        """As `ErrorMetric.gram`."""
        return self.metric.gram(self.block)

    @cached_property
    def root(self) -> InputRoot:
        """Of the damped covariances of the inputs."""
        return self.metric.root(self.gram)

    def energies(self, delta_nMN: Tensor, rows: slice) -> Tensor:
        """(n, K) squared singular values of the weighted problem of some rows of the group's matrices, descending."""
        problem = (
            right_gram(self.weighted(delta_nMN, rows), self.root) if self.is_right else self._left(delta_nMN, rows)
        )
        return spectrum(problem).energy_EK / self.scale[:, None]

    def factorise(self, delta_nMN: Tensor, rows: slice, ranks: Sequence[int]) -> list[Factors]:
        """Best factors of each expert (linalg/factorisation.py)."""
        if self.is_right:
            return factorise_right(delta_nMN, self.root, ranks, self.weighted(delta_nMN, rows))
        root = self._output_root(rows) if self.metric.is_two_sided else None
        return factorise_left(delta_nMN, self._left(delta_nMN, rows), ranks, root)

    def errors(self, residual_nMN: Tensor, rows: slice) -> Tensor:
        """(n,) what leaving `residual` out of the weights costs; needs the covariance of the inputs.

        With the damping that `factorise` solves its problem with.
        """
        assert not self.metric.of_output
        weighted = self.weighted(residual_nMN, rows)
        gram = damp(self.gram, self.metric.options.damping) if self.is_right else self.gram
        return (weighted @ gram * weighted).sum((1, 2)) / self.scale

    def weighted(self, delta_nMN: Tensor, rows: slice) -> Tensor:
        """T^T D, T T^T = B the weight on the output side; D itself where there is none."""
        if not self.metric.is_two_sided:
            return delta_nMN
        if self._gradient.dim() == 2:
            return self._diagonal_root(rows)[:, :, None] * delta_nMN
        return self._output_root(rows).root_ENN.mT @ delta_nMN

    @cached_property
    def scale(self) -> Tensor:
        """(n,) what energies are divided by: both sums of a two-sided weight run over the tokens."""
        num_tokens = self.metric.num_tokens[self.block]
        return (num_tokens if self.metric.is_two_sided else torch.ones_like(num_tokens)).clamp_min(1)

    # --- internals -----------------------------------------------------------------------------------------

    @cached_property
    def _gradient(self) -> Tensor:
        return self.metric.gradient_weight(self.block)

    def _output_root(self, rows: slice) -> InputRoot:
        if self._gradient.dim() == 2:
            return InputRoot.of_diagonal(self._diagonal_root(rows))
        if rows.start not in self._output_roots:
            gram = self._gradient[:, rows, rows]
            self._output_roots[rows.start] = InputRoot.from_gram(gram, self.metric.options.damping)
        return self._output_roots[rows.start]

    def _diagonal_root(self, rows: slice) -> Tensor:
        """(n, M) square roots of a diagonal weight, damped as a whole one is."""
        weight = self._gradient[:, rows]
        mean = weight.mean(1, keepdim=True)
        floor = max(self.metric.options.damping, torch.finfo(weight.dtype).eps)
        return (weight + floor * torch.where(mean > 0, mean, 1)).sqrt()

    def _left(self, delta_nMN: Tensor, rows: slice) -> Tensor:
        """(n, M, M) T^T D A D^T T."""
        if not self.metric.of_output:
            return left_gram(self.weighted(delta_nMN, rows), self.gram)
        gram = self.gram[:, rows, rows]
        if not self.metric.is_two_sided:
            return gram
        root = self._output_root(rows).root_ENN
        return symmetric_product(root, gram @ root)

"""What a student is trained on: the text's next token, and the teacher's distribution over it.

For one token that counts, z the student's V logits, y the token to be predicted, T the temperature:

    q = softmax(z / T)        p = softmax(teacher's logits / T)
    loss  =  ce (-log softmax(z)_y)  +  kd T^2 KL(p || q)
    dloss/dz  =  ce (softmax(z) - onehot(y))  +  kd T (q - p)

T^2 keeps the proportion of both gradients whatever T is. Source: METHODS, "Knowledge distillation"; arXiv 2310.01334
(ce 1, kd 0.2, T 2). We sum over tokens where others average over a batch: whoever calls divides by the tokens of the
whole step, so that neither padding nor the size of a micro-batch weighs tokens.

A cached teacher keeps the K largest logits of a token and the mass of all others together, the tail r:

    KL  =  sum_topk p (log p - log q)  +  p_r (log p_r - log q_r)        p_r, q_r: mass of the tails
    dKL/dz  =  (q - p) / T  in the top K        (q_r - p_r) softmax(z / T over the tail alone) / T  beyond

That bounds the full KL from below, since the tail's inner shape is not known, and equals it for K = V. The student's
tail is normalised by itself, with its own largest logit subtracted: nothing is a difference of nearly equal numbers,
nothing is divided by a mass that may underflow, and p_r = 0 and q_r -> 0 are ordinary cases. No teacher is K = 0: all
tokens are the tail, p_r = q_r = 1, KL and its gradient are 0.

Memory: with V = 150,000 the logits of a micro-batch are gigabytes, so they exist once. Rows are taken in chunks; a
chunk's softmax serves both loss and gradient, and the gradient takes the logits' place *in the forward pass* (it needs
nothing that comes later; the backward pass scales it). That is safe as long as nobody reads the logits afterwards, and
the output of a model's head has no other reader. Autograd watches: the writes raise the version of the logits, so an
operation that had kept them for its own backward pass raises an error there, and so does a second backward pass
through the loss. Logits of which no gradient is asked stay what they are.

Cost: V exponentials a token, 2 V for T != 1, V or 2 V more beside a live teacher; in float32 at least.

Shape suffixes: R rows (positions), C rows that count, N rows of a chunk, V vocabulary, K tokens the teacher keeps,
B sequences, S positions, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..calibration.text import IGNORED

_CHUNK_BYTES = {"cpu": 2**19, "cuda": 2**25}
"""Logits worked on at once, in the precision that is computed in: what the CPU's cache holds, what fills a GPU."""

_NEVER = -1e30
"""Logarithm of no mass at all; finite, so that no mass times it is 0."""


@dataclass(frozen=True, slots=True)
class FullTargets:
    """A live teacher's answer.

    Attributes:
        logits: (R, V) of any floating dtype, rows as the student's.
    """

    logits: Tensor


@dataclass(frozen=True, slots=True)
class CachedTargets:
    """What a cache keeps of a teacher's answer, for the rows that count alone, in their order.

    Attributes:
        ids: (C, K) of any integer dtype, the teacher's most likely tokens; none twice in a row.
        logits: (C, K) of any floating dtype, their logits before the temperature, up to one number a row.
        log_tail: (C,) log of the sum of exp(logit / T) over all other tokens, logits up to the same number;
            -inf where there are no others.
    """

    ids: Tensor
    logits: Tensor
    log_tail: Tensor

    def to(self, device: torch.device | str) -> CachedTargets:
        """The same on a device."""
        return CachedTargets(self.ids.to(device), self.logits.to(device), self.log_tail.to(device))


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Sums over the rows that count, () float32.

    Attributes:
        total: weighted, with a gradient.
        ce: negative log-likelihood of the targets, nats; without a gradient, as the next.
        kl: divergence from the teacher at the temperature, nats; 0 where there is no teacher.
        num_counted: rows.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor
    num_counted: int


def token_loss(
    logits_RV: Tensor,
    targets_R: Tensor,
    teacher: FullTargets | CachedTargets | None,
    ce: float,
    kd: float,
    temperature: float,
) -> TokenLoss:
    """Sums ce CE + kd T^2 KL(teacher || student); logits that require a gradient **are overwritten** by it.

    Args:
        logits_RV: (R, V) finite, of any floating dtype; not to be read afterwards, see the top of the file.
        targets_R: (R,) int64 tokens to be predicted, IGNORED where none counts.
        teacher: what the student is to answer; None for the text alone.
        ce, kd: weights.
        temperature: T, the one that a cache was made for.

    Raises:
        ValueError: the teacher's rows are not the student's.
    """
    rows_C = (targets_R != IGNORED).nonzero()[:, 0]
    if teacher is None:
        none = logits_RV.new_zeros(len(rows_C), 0)
        teacher, temperature = CachedTargets(none.long(), none, none.sum(-1)), 1.0  # T = 1 spares a softmax
    expected = tuple(logits_RV.shape) if isinstance(teacher, FullTargets) else (len(rows_C), teacher.ids.shape[1])
    if tuple(teacher.logits.shape) != expected:
        found = tuple(teacher.logits.shape)
        raise ValueError(f"teacher: logits of shape {found}, must be {expected} as the student's; give the same rows")
    weights = _Weights(ce, kd, temperature)
    consume = torch.is_grad_enabled() and logits_RV.requires_grad
    total, ce_sum, kl_sum = (_Consumed.apply if consume else _sums)(logits_RV, targets_R, rows_C, teacher, weights)
    return TokenLoss(total, ce_sum, kl_sum, len(rows_C))


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Sum over layers and tokens that count of ||s - t||^2 / ||t||^2, () float32.

    Relative token by token, not over all tokens of a layer: some tokens' hidden states are a thousand times as long
    as the others', and what a token weighs must not depend on which tokens share its micro-batch.

    Args:
        student, teacher: for each layer, its output (B, S, D).
        mask: (B, S) bool, the tokens that count.
    """
    total = torch.zeros((), device=mask.device)
    for ours, theirs in zip(student, teacher, strict=True):
        s_CD, t_CD = ours[mask].float(), theirs[mask].float()
        distance_C = (s_CD - t_CD).square().sum(-1)
        total = total + (distance_C / t_CD.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).sum()
    return total


def router_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Sum over layers and tokens that count of KL(softmax(teacher's) || softmax(student's router logits)), () float32.

    Layers whose router has lost experts say nothing comparable and are left out.

    Args:
        student, teacher: for each layer, its router's logits (B S, E).
        mask: (B S,) bool, the tokens that count.
    """
    total = torch.zeros((), device=mask.device)
    for ours, theirs in zip(student, teacher, strict=True):
        if ours.shape == theirs.shape:
            log_q_CE, log_p_CE = (logits[mask].float().log_softmax(-1) for logits in (ours, theirs))
            total = total + (log_p_CE.exp() * (log_p_CE - log_q_CE)).sum()
    return total


class _Weights(NamedTuple):
    ce: float
    kd: float
    temperature: float


class _Consumed(torch.autograd.Function):
    """The sums, with the gradient of the total in the place of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_RV: Tensor,
        targets_R: Tensor,
        rows_C: Tensor,
        teacher: FullTargets | CachedTargets,
        weights: _Weights,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, ce_sum, kl_sum = _sums(logits_RV, targets_R, rows_C, teacher, weights, consume=True)
        ctx.save_for_backward(logits_RV)
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        return total, ce_sum, kl_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_RV,) = ctx.saved_tensors
        return gradient_RV.detach().mul_(grad), None, None, None, None


@torch.no_grad()
def _sums(
    logits_RV: Tensor,
    targets_R: Tensor,
    rows_C: Tensor,
    teacher: FullTargets | CachedTargets,
    weights: _Weights,
    consume: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, CE, KL), each (); if `consume`, the logits become the gradient of the total."""
    dtype = torch.promote_types(logits_RV.dtype, torch.float32)
    chunk_bytes = _CHUNK_BYTES["cpu" if logits_RV.device.type == "cpu" else "cuda"]
    num_rows = max(1, chunk_bytes // (logits_RV.shape[1] * dtype.itemsize))
    sums = logits_RV.new_zeros(2, dtype=dtype)
    for start in range(0, len(rows_C), num_rows):
        part = slice(start, start + num_rows)
        rows_N = rows_C[part]
        z_NV, y_N1 = logits_RV[rows_N].to(dtype), targets_R[rows_N, None]
        if isinstance(teacher, FullTargets):
            found, gradient_NV = _against_all(z_NV, y_N1, teacher.logits[rows_N].to(dtype), weights, consume)
        else:
            answer = teacher.ids[part].long(), teacher.logits[part].to(dtype), teacher.log_tail[part, None].to(dtype)
            found, gradient_NV = _against_top(z_NV, y_N1, *answer, weights, consume)
        sums += found
        if gradient_NV is not None:
            logits_RV.index_copy_(0, rows_N, gradient_NV.to(logits_RV.dtype))
    if consume:
        logits_RV.index_fill_(0, (targets_R == IGNORED).nonzero()[:, 0], 0)
    ce_sum, kl_sum = sums.unbind()
    return weights.ce * ce_sum + weights.kd * weights.temperature**2 * kl_sum, ce_sum.clone(), kl_sum.clone()


def _against_all(
    z_NV: Tensor, y_N1: Tensor, t_NV: Tensor, weights: _Weights, consume: bool
) -> tuple[Tensor, Tensor | None]:
    """((2,) sums of CE and KL, gradient (N, V) if wanted) beside the teacher's logits; may overwrite its inputs."""
    ce, kd, temperature = weights
    log_q1_NV = z_NV.log_softmax(-1)
    log_q_NV = log_q1_NV if temperature == 1 else z_NV.div_(temperature).log_softmax(-1)
    log_p_NV = t_NV.div_(temperature).log_softmax(-1)
    p_NV = log_p_NV.exp()
    sums = torch.stack([-log_q1_NV.gather(1, y_N1).sum(), (p_NV * log_p_NV.sub_(log_q_NV)).sum()])
    if not consume:
        return sums, None
    q_NV = log_q_NV.exp_()
    q1_NV = q_NV if temperature == 1 else log_q1_NV.exp_()
    gradient_NV = p_NV.sub_(q_NV).mul_(-kd * temperature).add_(q1_NV, alpha=ce)
    return sums, gradient_NV.scatter_add_(1, y_N1, torch.full_like(y_N1, -ce, dtype=z_NV.dtype))


def _against_top(
    z_NV: Tensor,
    y_N1: Tensor,
    ids_NK: Tensor,
    t_NK: Tensor,
    log_tail_N1: Tensor,
    weights: _Weights,
    consume: bool,
) -> tuple[Tensor, Tensor | None]:
    """((2,) sums of CE and KL, gradient (N, V) if wanted) beside the teacher's top K; overwrites the logits."""
    ce, kd, temperature = weights
    z_y_N1, z_NK = z_NV.gather(1, y_N1), z_NV.gather(1, ids_NK)
    z_NV.scatter_(1, ids_NK, _NEVER)
    q1 = q = _normalise(z_NV, z_NK)
    if temperature != 1:
        q = _normalise(z_NV.div_(temperature), z_NK / temperature)
    t_NK = t_NK / temperature
    log_p_N1 = torch.logaddexp(t_NK.logsumexp(-1, keepdim=True), log_tail_N1)
    log_p_NK, log_p_N1 = t_NK - log_p_N1, (log_tail_N1 - log_p_N1).clamp_min(_NEVER)
    p_NK, p_N1 = log_p_NK.exp(), log_p_N1.exp()
    kl = (p_NK * (log_p_NK - q.log_NK)).sum() + (p_N1 * (log_p_N1 - q.log_N1)).sum()
    sums = torch.stack([(q1.normaliser_N1 - z_y_N1).sum(), kl])
    if not consume:
        return sums, None
    ce_NK, ce_N1 = ce * q1.log_NK.exp(), ce * q1.log_N1.exp()
    kd_NK, kd_N1 = kd * temperature * (q.log_NK.exp() - p_NK), kd * temperature * (q.log_N1.exp() - p_N1)
    if temperature == 1:
        gradient_NV = q.tail_NV.mul_(kd_N1 + ce_N1)
    else:
        gradient_NV = q.tail_NV.mul_(kd_N1).addcmul_(q1.tail_NV, ce_N1)
    gradient_NV.scatter_(1, ids_NK, kd_NK + ce_NK)
    return sums, gradient_NV.scatter_add_(1, y_N1, torch.full_like(z_y_N1, -ce))


class _Split(NamedTuple):
    """A distribution by its top K and its tail.

    tail_NV: softmax over the tail alone, 0 elsewhere. log_NK: log probabilities of the top K; log_N1: of the whole
    tail. normaliser_N1: log of the sum of exp over everything.
    """

    tail_NV: Tensor
    log_NK: Tensor
    log_N1: Tensor
    normaliser_N1: Tensor


def _normalise(rest_NV: Tensor, top_NK: Tensor) -> _Split:
    """The distribution of logits, the top K of which were taken out of `rest` and _NEVER put there."""
    tail_NV = rest_NV.softmax(-1)
    # softmax is exp(z - max z) / sum: its own largest value is 1 / sum
    log_rest_N1 = rest_NV.amax(-1, keepdim=True) - tail_NV.amax(-1, keepdim=True).log()
    normaliser_N1 = torch.logaddexp(top_NK.logsumexp(-1, keepdim=True), log_rest_N1)
    return _Split(tail_NV, top_NK - normaliser_N1, log_rest_N1 - normaliser_N1, normaliser_N1)

"""The losses against plain torch in float64, at the edges of their numbers, and what they do to memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_compress.calibration.text import IGNORED
from moe_compress.distillation import losses
from moe_compress.distillation.losses import CachedTargets, FullTargets, TokenLoss, hidden_loss, router_loss, token_loss

VOCAB = 24
ROWS = 11


@pytest.fixture(autouse=True, scope="module")
def _chunks_of_a_few_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_CHUNK_BYTES", {"cpu": 3 * VOCAB * 4, "cuda": 3 * VOCAB * 4})
        yield


def batch(seed: int, spread: float = 3.0, counted: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """(student's logits (R, V), the teacher's, targets (R,)) in float64; a fraction of the rows counts."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(2, ROWS, VOCAB, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    targets[torch.rand(ROWS, generator=generator) >= counted] = IGNORED
    return student, teacher, targets


def cached(teacher: Tensor, targets: Tensor, top_k: int, temperature: float) -> CachedTargets:
    """What a cache keeps of logits (R, V)."""
    logits, ids = teacher[targets != IGNORED].topk(top_k, -1)
    tail = teacher[targets != IGNORED].scatter(1, ids, -torch.inf)
    return CachedTargets(ids.int(), logits, (tail / temperature).logsumexp(-1))


def divergence(student: Tensor, teacher: Tensor, top_k: int | None, temperature: float) -> Tensor:
    """Summed KL by its definition; beyond the teacher's top K all tokens are one."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    if top_k is not None and top_k < p.shape[1]:
        ids = p.argsort(-1, descending=True)
        (p, p_tail), (q, q_tail) = (values.gather(1, ids).tensor_split([top_k], -1) for values in (p, q))
        p, q = torch.cat([p, p_tail.sum(-1, True)], -1), torch.cat([q, q_tail.sum(-1, True)], -1)
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum()


def expected(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    top_k: int | None,
    ce: float,
    kd: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, CE, KL, gradient) by plain torch."""
    student = student.double().clone().requires_grad_()
    nll = nn.functional.cross_entropy(student, targets, ignore_index=IGNORED, reduction="sum")
    kl = torch.zeros(())
    if teacher is not None:
        rows = targets != IGNORED
        kl = divergence(student[rows], teacher[rows].double(), top_k, temperature)
    total = ce * nll + kd * temperature**2 * kl
    (gradient,) = torch.autograd.grad(total, student)
    return total.detach(), nll.detach(), kl.detach(), gradient


def check(found: TokenLoss, logits: Tensor, reference: tuple[Tensor, ...], **tolerance: float) -> None:
    """Compares the sums, and after a backward pass the gradient of the leaf `logits`."""
    found.total.backward()
    for value, other in zip((found.total, found.ce, found.kl, logits.grad), reference, strict=True):
        assert value is not None
        torch.testing.assert_close(value.double(), other.double(), **tolerance)


weights = st.sampled_from([0.0, 0.2, 1.0])
temperatures = st.sampled_from([0.5, 1.0, 2.0, 7.3])


@given(
    seed=st.integers(0, 2**32),
    top_k=st.sampled_from([None, 1, 5, VOCAB - 1, VOCAB]),
    ce=weights,
    kd=weights,
    temperature=temperatures,
    counted=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_sums_and_gradients_are_those_of_plain_torch(
    seed: int, top_k: int | None, ce: float, kd: float, temperature: float, counted: float
) -> None:
    student, teacher, targets = batch(seed, counted=counted)
    answer = FullTargets(teacher) if top_k is None else cached(teacher, targets, top_k, temperature)
    logits = student.clone().requires_grad_()
    found = token_loss(logits.clone(), targets, answer, ce, kd, temperature)
    assert found.num_counted == int((targets != IGNORED).sum())
    assert not found.ce.requires_grad
    assert not found.kl.requires_grad
    check(found, logits, expected(student, teacher, targets, top_k, ce, kd, temperature), rtol=1e-9, atol=1e-9)
    assert logits.grad is not None
    assert not logits.grad[targets == IGNORED].any()


@given(seed=st.integers(0, 2**32), ce=weights, temperature=temperatures)
def test_without_a_teacher_it_is_the_cross_entropy(seed: int, ce: float, temperature: float) -> None:
    student, _, targets = batch(seed)
    logits = student.clone().requires_grad_()
    found = token_loss(logits.clone(), targets, None, ce, 1.0, temperature)
    check(found, logits, expected(student, None, targets, None, ce, 0.0, 1.0), rtol=1e-9, atol=1e-9)


def test_a_scaled_loss_reaches_the_weights_of_the_head() -> None:
    _, teacher, targets = batch(1)
    head = nn.Linear(VOCAB, VOCAB).double()
    hidden = torch.randn(ROWS, VOCAB, dtype=torch.float64)
    *_, gradient = expected(head(hidden).detach(), teacher, targets, None, 1.0, 0.5, 2.0)
    found = token_loss(head(hidden), targets, FullTargets(teacher), 1.0, 0.5, 2.0)
    (found.total / 7).backward()
    torch.testing.assert_close(head.weight.grad, gradient.T @ hidden / 7)


@given(seed=st.integers(0, 2**32), temperature=temperatures)
def test_a_cache_bounds_the_divergence_from_below_the_better_the_more_it_keeps(seed: int, temperature: float) -> None:
    student, teacher, targets = batch(seed)
    bounds = [
        token_loss(student, targets, cached(teacher, targets, top_k, temperature), 0.0, 1.0, temperature).kl
        for top_k in range(1, VOCAB + 1)
    ]
    full = token_loss(student, targets, FullTargets(teacher), 0.0, 1.0, temperature).kl
    assert all(lower <= upper + 1e-12 for lower, upper in itertools.pairwise(bounds))
    torch.testing.assert_close(bounds[-1], full)


SURE, UNSURE = 300.0, 0.0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("student_lead", "teacher_lead"), [(SURE, UNSURE), (UNSURE, SURE), (SURE, SURE), (-SURE, UNSURE), (-SURE, SURE)]
)
@pytest.mark.parametrize("top_k", [4, None])
def test_tails_without_mass_are_ordinary(
    student_lead: float, teacher_lead: float, top_k: int | None, temperature: float
) -> None:
    """Tails of e^-300: float32 knows no such number, float64 does."""
    student, teacher, targets = batch(2)
    top = teacher.topk(4, -1).indices
    student.scatter_add_(1, top, torch.full(top.shape, student_lead, dtype=torch.float64))
    teacher.scatter_add_(1, top, torch.full(top.shape, teacher_lead, dtype=torch.float64))
    student, teacher = student.float(), teacher.float()
    answer = FullTargets(teacher) if top_k is None else cached(teacher, targets, top_k, temperature)
    logits = student.clone().requires_grad_()
    found = token_loss(logits.clone(), targets, answer, 1.0, 1.0, temperature)
    check(found, logits, expected(student, teacher, targets, top_k, 1.0, 1.0, temperature), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [None, 4])
def test_half_precision_costs_the_rounding_of_the_gradient_alone(top_k: int | None) -> None:
    student, teacher, targets = (values.bfloat16() if values.is_floating_point() else values for values in batch(3))
    answer = FullTargets(teacher) if top_k is None else cached(teacher.float(), targets, top_k, 2.0)
    logits = student.clone().requires_grad_()
    found = token_loss(logits.clone(), targets, answer, 1.0, 0.2, 2.0)
    assert found.total.dtype == found.ce.dtype == found.kl.dtype == torch.float32
    total, nll, kl, gradient = expected(student, teacher, targets, top_k, 1.0, 0.2, 2.0)
    found.total.backward()
    torch.testing.assert_close(
        torch.stack([found.total.detach(), found.ce, found.kl]), torch.stack([total, nll, kl]).float()
    )
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=2**-8, atol=1e-6)


def test_ids_and_logits_may_be_as_small_as_they_lie_on_disk() -> None:
    student, teacher, targets = batch(4)
    teacher = teacher.half().double()
    answer = cached(teacher, targets, 6, 2.0)
    small = CachedTargets(answer.ids.to(torch.uint16), answer.logits.half(), answer.log_tail)
    losses_ = [token_loss(student, targets, each, 1.0, 1.0, 2.0).total for each in (answer, small)]
    torch.testing.assert_close(*losses_)


@pytest.mark.parametrize("asks", [True, False], ids=["in validation", "where none is asked for"])
def test_without_a_gradient_the_logits_stay(asks: bool) -> None:
    student, teacher, targets = batch(5)
    logits = student.clone().requires_grad_(asks)
    with torch.set_grad_enabled(not asks):
        found = token_loss(logits, targets, FullTargets(teacher), 1.0, 0.5, 2.0)
    assert not found.total.requires_grad
    assert torch.equal(logits.detach(), student)
    total, *_ = expected(student, teacher, targets, None, 1.0, 0.5, 2.0)
    torch.testing.assert_close(found.total, total)


class Largest(TorchDispatchMode):
    """Watches for the largest tensor that is made; views of others are none."""

    num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = function(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.num_bytes = max(self.num_bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("top_k", [None, 4])
def test_logits_exist_once(top_k: int | None) -> None:
    _, teacher, targets = batch(6)
    answer = FullTargets(teacher.float()) if top_k is None else cached(teacher, targets, top_k, 2.0)
    hidden = torch.ones(ROWS, 1)
    head = nn.Parameter(torch.ones(1, VOCAB))
    logits = hidden @ head
    where = logits.data_ptr()
    seen: list[int] = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    with Largest() as largest:
        token_loss(logits, targets, answer, 1.0, 0.5, 2.0).total.backward()
    assert seen == [where]
    assert largest.num_bytes <= 3 * VOCAB * 4


def test_logits_that_somebody_kept_are_not_overwritten_unnoticed() -> None:
    student, teacher, targets = batch(7)
    logits = student.requires_grad_() * 1
    kept = logits.square().sum()  # keeps the logits for its backward pass
    total = token_loss(logits, targets, FullTargets(teacher), 1.0, 0.5, 2.0).total
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total + kept).backward()


def test_a_second_backward_pass_is_refused() -> None:
    student, teacher, targets = batch(8)
    total = token_loss(student.requires_grad_() * 1, targets, FullTargets(teacher), 1.0, 0.5, 2.0).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_teacher_of_other_rows_is_refused() -> None:
    student, teacher, targets = batch(9)
    answer = cached(teacher, targets, 4, 1.0)
    for wrong in (FullTargets(teacher[1:]), CachedTargets(answer.ids[1:], answer.logits[1:], answer.log_tail[1:])):
        with pytest.raises(ValueError, match="give the same rows"):
            token_loss(student, targets, wrong, 1.0, 0.5, 1.0)


def test_hidden_states_are_compared_token_by_token() -> None:
    ours, theirs = torch.randn(2, 2, 3, 4, 5).unbind()  # two layers, (3, 4) tokens, D = 5
    theirs[0, 0, 0] *= 1e3
    mask = torch.rand(3, 4) < 0.6
    found = hidden_loss(ours, theirs, mask)
    by_hand = sum(
        float((ours[layer, b, s] - theirs[layer, b, s]).norm() ** 2 / theirs[layer, b, s].norm() ** 2)
        for layer in range(2)
        for b, s in mask.nonzero().tolist()
    )
    assert float(found) == pytest.approx(by_hand, rel=1e-4)
    alone = sum(float(hidden_loss(ours[:, b : b + 1], theirs[:, b : b + 1], mask[b : b + 1])) for b in range(3))
    assert float(found) == pytest.approx(alone, rel=1e-5)
    (gradient,) = torch.autograd.grad(hidden_loss(ours.requires_grad_(), theirs, mask), ours)
    assert gradient[:, mask].any()
    assert not gradient[:, ~mask].any()


def test_routers_are_compared_where_they_have_as_many_experts() -> None:
    ours, theirs = torch.randn(2, 3, 6, 8).unbind()  # three layers, 6 tokens, 8 experts
    mask = torch.tensor([True, True, False, True, False, True])
    student = [ours[0], ours[1, :, :5], ours[2]]
    found = router_loss(student, list(theirs), mask)
    by_hand = sum(
        float(divergence(ours[layer][mask].double(), theirs[layer][mask].double(), None, 1.0)) for layer in (0, 2)
    )
    assert float(found) == pytest.approx(by_hand, rel=1e-5)

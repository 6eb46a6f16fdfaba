"""D2-MoE beyond one base and one-sided weights: clusters, shared right factors, two-sided weights, alternation."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from moe_compress.linalg.packed import pack
from moe_compress.linalg.symmetric import damp
from moe_compress.methods.bases import prune_columns
from moe_compress.methods.d2moe import GroupProblem
from moe_compress.methods.forms import PLAIN, Form, candidates, cluster_counts
from moe_compress.methods.limits import share_out
from moe_compress.model.expert_bank import GROUPS, Group
from tests.methods.d2moe_cases import SHAPES, Case, Shape, make_case, method, rebuilt, same_ranks, weighted_energy


def with_gradients(case: Case, seed: int) -> tuple[Any, dict[Group, Tensor]]:
    """Statistics with covariances of gradients, and those covariances (E, M, M), of diagonals the diagonal matrices."""
    statistics, generator, found = case.statistics(), torch.Generator().manual_seed(seed), {}
    for group in GROUPS:
        num_experts, num_rows, _ = case.weight[group].shape
        rows = torch.randn(num_experts, 3 * num_rows, num_rows, generator=generator)
        gram = rows.mT @ rows
        if f"{group}_grad_gram" in statistics:
            statistics.tensors[f"{group}_grad_gram"] = pack(gram)
        else:
            gram = gram.diagonal(dim1=1, dim2=2).diag_embed()
            statistics.tensors[f"{group}_grad_diagonal"] = gram.diagonal(dim1=1, dim2=2).clone()
        found[group] = gram.double()
    return statistics, found


def two_sided_energy(difference: Tensor, inputs: Tensor, gradients: Tensor) -> float:
    difference = difference.double()
    return float((gradients @ difference @ inputs.double() @ difference.T).trace())


@pytest.mark.parametrize("gate_up", ["joint", "separate"])
@pytest.mark.parametrize("base", ["none", "mean"])
@settings(deadline=None, max_examples=8)
@given(st.sampled_from(SHAPES), st.integers(0, 10**6), st.floats(0, 1))
def test_two_sided_energies_are_the_error_and_its_optimum(
    base: str, gate_up: str, shape: Shape, seed: int, share: float
) -> None:
    case = make_case(shape, seed=seed)
    statistics, gradients = with_gradients(case, seed)
    options = method(base=base, weighting="two_sided", gate_up=gate_up, damping=1e-6)
    for group in GROUPS:
        problem = case.problem(group, options, statistics=statistics)
        energies = problem.energies()
        for slot in problem.slots:
            rank = round(share * min(slot.num_rows, slot.num_columns))
            found = rebuilt(problem, same_ranks(problem, rank))[slot.name]
            for expert, energy in enumerate(energies[slot.name].double()):
                inputs = damp(case.covariances(group, "input")[expert], 1e-6)
                weight = damp(gradients[group][expert, slot.rows, slot.rows], 1e-6)
                num_tokens = len(case.inputs[group][expert])
                delta = case.weight[group][expert, slot.rows].double()
                if problem.bases_BMN is not None:
                    delta = delta - problem.bases_BMN[0, slot.rows].double()
                left, right = (torch.linalg.cholesky(a) for a in (weight, inputs))
                best = torch.linalg.svdvals(left.T @ delta @ right)[rank:].square().sum() / num_tokens
                whole = float(energy.sum())
                assert float(energy[rank:].sum()) == pytest.approx(float(best), rel=1e-3, abs=1e-4 * whole)
                difference = case.weight[group][expert, slot.rows] - found[expert]
                measured = two_sided_energy(difference, inputs, weight) / num_tokens
                assert measured == pytest.approx(float(best), rel=1e-3, abs=1e-4 * whole)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("base", ["mean", "fisher", "fisher_columns", "closed_form"])
def test_bases_of_equal_experts_leave_nothing(base: str, group: Group) -> None:
    case = make_case((12, 8, True), (40, 25, 33, 60))
    weight = {g: w[[0, 1, 0, 1]] for g, w in case.weight.items()}
    case = replace(case, weight=weight)
    problem = case.problem(group, method(base=base), form=Form((0, 1, 0, 1)))
    assert problem.bases_BMN is not None
    for slot in problem.slots:
        found = rebuilt(problem, same_ranks(problem, 0))[slot.name]
        torch.testing.assert_close(found, weight[group][:, slot.rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighting", ["loss", "input", "none"])
@pytest.mark.parametrize("share_of", [(0, 0, 0, 0), (0, 1, 0, 1)])
def test_shared_right_factors_find_the_common_row_space(weighting: str, share_of: tuple[int, ...]) -> None:
    case = make_case((12, 8, True), (60, 70, 80, 90), decay=0.3)
    generator = torch.Generator().manual_seed(1)
    space = torch.randn(3, 12, generator=generator)
    low = torch.randn(4, 16, 3, generator=generator) @ space
    case = replace(case, weight={**case.weight, "up": low})
    problem = case.problem("up", method(weighting=weighting), form=Form(share_of=share_of))
    found = rebuilt(problem, {"gate_up": [3] * 4})["gate_up"]
    torch.testing.assert_close(found, low, rtol=0, atol=2e-3 * float(low.abs().max()))


@pytest.mark.parametrize("weighting", ["loss", "input", "two_sided"])
@pytest.mark.parametrize("rank", [0, 2, 5, 12])
def test_shared_energies_are_what_directions_remove(weighting: str, rank: int) -> None:
    case = make_case((12, 8, True), (60, 70, 80, 90), decay=0.2)
    statistics, gradients = with_gradients(case, 3)
    form = Form(share_of=(0, 1, 0, 0))
    problem = case.problem("up", method(weighting=weighting), form=form, statistics=statistics)
    energies = problem.energies()["gate_up"].double()
    assert problem.items == [(0, 2, 3), (1,)]
    assert energies.shape == (2, 12)
    found = rebuilt(problem, {"gate_up": [rank] * 4})["gate_up"]
    for item, members in enumerate(problem.items):
        left = 0.0
        for expert in members:
            difference = case.weight["up"][expert] - found[expert]
            inputs = case.covariances("up", "input" if weighting == "two_sided" else weighting)
            if weighting == "two_sided":
                num_tokens = len(case.inputs["up"][expert])
                left += two_sided_energy(difference, inputs[expert], gradients["up"][expert]) / num_tokens
            else:
                left += weighted_energy(difference, inputs[expert])
        assert left == pytest.approx(
            float(energies[item, rank:].sum()), rel=2e-2, abs=2e-3 * float(energies[item].sum())
        )


@pytest.mark.parametrize("weighting", ["loss", "input", "none"])
@settings(deadline=None, max_examples=6)
@given(st.sampled_from(SHAPES), st.integers(0, 10**6), st.integers(0, 3))
def test_alternation_never_raises_the_error(weighting: str, shape: Shape, seed: int, rank: int) -> None:
    case = make_case(shape, seed=seed)
    form = Form((0, 1, 1, 0))
    for group in GROUPS:
        covariances = case.covariances(group, weighting)
        errors = []
        for rounds in (0, 1, 2, 6):
            options = method(base="mean", weighting=weighting, alternate=rounds)
            problem = case.problem(group, options, form=form)
            found = torch.cat(list(rebuilt(problem, same_ranks(problem, rank)).values()), dim=1)
            differences = zip(case.weight[group] - found, covariances, strict=True)
            errors.append(sum(weighted_energy(difference, gram) for difference, gram in differences))
        scale = sum(weighted_energy(w, a) for w, a in zip(case.weight[group], covariances, strict=True))
        for before, after in pairwise(errors):
            assert after <= before + 1e-4 * scale
        assert rank > 0 or weighting == "none" or errors[1] < errors[0]  # the mean is not what least squares gives


def blocks_of(case: Case, group: Group) -> Any:
    return lambda: iter(case.weight[group].split(1))


def test_clusters_join_experts_that_are_alike() -> None:
    case = make_case((12, 8, True), (30,) * 8)
    weight = {g: w[[0, 1, 2, 3, 0, 1, 2, 3]] + 0.01 * w for g, w in case.weight.items()}
    case = replace(case, weight=weight)
    statistics = case.statistics()
    options = method(base="mean", num_bases="budget", share="budget")
    forms = candidates(case.layer, "up", options, statistics, blocks_of(case, "up"))
    assert forms[0] == PLAIN
    assert [form.num_bases for form in forms] == [0, 1, 2, 4, 0, 0, 0]
    assert forms[3] == Form((0, 1, 2, 3, 0, 1, 2, 3))
    assert forms[6] == Form(share_of=(0, 1, 2, 3, 0, 1, 2, 3))
    by_routing = method(base="mean", num_bases=4, cluster_by="routing")
    statistics.tensors["router_gram"] = torch.eye(4).double().repeat_interleave(2, 0).repeat_interleave(2, 1)
    (form,) = candidates(case.layer, "up", by_routing, statistics, blocks_of(case, "up"))
    assert form == Form((0, 0, 1, 1, 2, 2, 3, 3))


def test_without_the_inputs_covariance_no_other_form_is_offered() -> None:
    case = make_case((6, 10, True), (30,) * 8)
    statistics = case.statistics()
    del statistics.tensors["down_input_loss_gram"]
    options = method(base="mean", num_bases="budget", share="budget")
    assert candidates(case.layer, "down", options, statistics, blocks_of(case, "down")) == [PLAIN]


def test_counts_of_clusters_grow_with_the_experts() -> None:
    assert [cluster_counts(n) for n in (1, 2, 8, 64)] == [[], [1], [1, 2, 4], [1, 8, 16, 32]]


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=9),
    st.integers(0, 60),
    st.integers(1, 12),
)
def test_ranks_are_shared_out_whole(weights: list[float], total: int, most: int) -> None:
    weight_E = torch.tensor(weights).double().numpy()
    ranks = share_out(total, weight_E, most)
    open_to_more = len(weights) if weight_E.sum() == 0 else int((weight_E > 0).sum())
    assert sum(ranks) >= min(total, most * open_to_more)
    assert sum(ranks) <= total
    assert max(ranks) <= most
    order = weight_E.argsort()
    assert all(ranks[a] <= ranks[b] + 1 for a, b in pairwise(order))


@pytest.mark.parametrize("form", [Form((0, 1, 0, 1)), Form(share_of=(0, 0, 2, 2)), Form((0, 0, 0, 1), (0, 1, 1, 0))])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_of_every_form_is_the_identity(shape: Shape, form: Form) -> None:
    case = make_case(shape, (60, 50, 40, 30))
    options = method(base="mean", gate_up="separate")
    for group in GROUPS:
        problem: GroupProblem = case.problem(group, options, form=form)
        ranks = same_ranks(problem, 0) | {slot.name: [slot.num_columns] * 4 for slot in problem.slots}
        if form.share_of is None:
            ranks = {slot.name: [min(slot.num_rows, slot.num_columns)] * 4 for slot in problem.slots}
        whole = torch.cat(list(rebuilt(problem, ranks).values()), dim=1)
        torch.testing.assert_close(whole, case.weight[group], rtol=0, atol=2e-3)


# --- columns of bases --------------------------------------------------------------------------------------


def covariance_and_bases(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(60, 9, generator=generator) @ torch.randn(9, 9, generator=generator)
    return rows.mT @ rows, torch.randn(2, 5, 9, generator=generator)


def put_out(difference_BMN: Tensor, gram_NN: Tensor) -> float:
    return float((difference_BMN @ gram_NN * difference_BMN).sum())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 9))
def test_pruned_bases_are_the_fit_to_all_columns(seed: int, num_kept: int) -> None:
    gram_NN, bases_BMN = covariance_and_bases(seed)
    columns, pruned = prune_columns(bases_BMN, gram_NN, "error", num_kept)
    assert columns.tolist() == sorted(set(columns.tolist()))
    assert len(columns) == num_kept
    gone = [j for j in range(9) if j not in columns.tolist()]
    assert not pruned[:, :, gone].any()
    error, whole = put_out(bases_BMN - pruned, gram_NN), put_out(bases_BMN, gram_NN)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        step = torch.zeros_like(pruned)
        step[:, :, columns] = 1e-2 * torch.randn(2, 5, num_kept, generator=generator)
        assert error <= put_out(bases_BMN - pruned - step, gram_NN) + 1e-5 * whole
    _, plain = prune_columns(bases_BMN, gram_NN, "norm", num_kept)
    assert num_kept < 9 or (torch.equal(plain, bases_BMN) and error <= 1e-4 * whole)


def test_columns_go_by_norm_times_norm_of_their_inputs() -> None:
    bases_BMN = torch.tensor([[[3.0, 1.0, 2.0]]])
    columns, pruned = prune_columns(bases_BMN, torch.diag(torch.tensor([1.0, 100.0, 1.0])), "norm", 2)
    assert columns.tolist() == [0, 1]
    assert pruned.tolist() == [[[3.0, 1.0, 0.0]]]


@pytest.mark.parametrize("shape", SHAPES)
def test_deltas_make_up_for_columns_that_are_gone(shape: Shape) -> None:
    case = make_case(shape)
    options = method(base="mean", base_sparsity=0.5, base_dynamic=0.2, ranks="full")
    for group in GROUPS:
        problem = case.problem(group, options)
        assert problem.columns_C is not None
        ranks = same_ranks(problem, 0) | {s.name: [min(s.num_rows, s.num_columns)] * 4 for s in problem.slots}
        tensors = problem.factors(ranks, torch.float32)
        for slot, layout in zip(problem.slots, problem.layouts(ranks), strict=True):
            num_kept = options.num_base_columns(slot.num_columns)
            assert tensors[f"{slot.name}_base"].shape == (1, slot.num_rows, num_kept)
            assert {name: tuple(tensors[name].shape) for name in layout.shapes()} == layout.shapes()
            base = torch.zeros(slot.num_rows, slot.num_columns)
            base[:, tensors[f"{slot.name}_base_columns"].long()] = tensors[f"{slot.name}_base"][0]
            u, v = (tensors[f"{slot.name}_{part}"] for part in "uv")
            for expert in range(4):
                found = base + u[layout.factor_rows(expert)].T @ v[layout.right_rows(expert)]
                torch.testing.assert_close(found, case.weight[group][expert, slot.rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_bases": 2},
        {"num_bases": "budget", "base": "mean", "ranks": "uniform"},
        {"alternate": 2},
        {"alternate": 2, "base": "mean", "weighting": "two_sided"},
        {"base_sparsity": 0.5},
        {"share": 2, "ranks": "frequency"},
        {"share": 2, "ranks": "full"},
        {"share": 2, "levels": [0.6]},
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"num_bases|alternate|base_sparsity|ranks|levels"):
        method(**options)


def test_shared_factors_stay_small_in_half_precision() -> None:
    case = make_case((12, 8, True), (60, 70, 80, 90))
    small = {group: [x * 1e-4 for x in rows] for group, rows in case.inputs.items()}
    case = replace(case, inputs=small)
    problem = case.problem("up", method(weighting="input"), form=Form(share_of=(0, 0, 0, 0)))
    found = rebuilt(problem, {"gate_up": [12] * 4}, torch.float16)["gate_up"]
    torch.testing.assert_close(found, case.weight["up"], rtol=0, atol=2e-2)

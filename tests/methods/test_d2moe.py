"""D2-MoE on small random layers against its formulas, computed plainly in fp64."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from moe_compress.budget import DENSE, Item, allocate
from moe_compress.errors import CompressionError, RecipeError
from moe_compress.linalg.symmetric import damp
from moe_compress.method_options import D2MoE
from moe_compress.methods.d2moe import (
    GroupProblem,
    channel_alignment,
)
from moe_compress.methods.forms import Form
from moe_compress.methods.limits import budget_parameters, check_ratio, fixed_ranks
from moe_compress.methods.slots import slots
from moe_compress.model.discovery import MoELayer
from moe_compress.model.expert_bank import GROUPS, Group
from tests.methods.d2moe_cases import (
    BASES,
    SHAPES,
    WEIGHTINGS,
    Case,
    Shape,
    make_case,
    method,
    rebuilt,
    same_ranks,
    weighted_energy,
)

# --- predicted error ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_up", ["joint", "separate"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("base", ["none", "fisher"])
@settings(deadline=None, max_examples=6)
@given(st.sampled_from(SHAPES), st.integers(0, 10**6), st.floats(0, 1))
def test_energies_are_the_error_that_each_rank_leaves(
    base: str, weighting: str, gate_up: str, shape: Shape, seed: int, share: float
) -> None:
    case = make_case(shape, (30, 4, 1), seed)
    options = method(base=base, weighting=weighting, gate_up=gate_up)
    for group in GROUPS:
        problem = case.problem(group, options)
        covariance = case.covariances(group, weighting)
        energies = problem.energies()
        for slot in problem.slots:
            if slot.num_columns <= slot.num_rows:  # where a root is inverted the problem is the damped one
                covariance = damp(case.covariances(group, weighting), options.damping)
            top = min(slot.num_rows, slot.num_columns)
            assert energies[slot.name].shape == (3, top)
            rank = round(share * top)
            found = rebuilt(problem, same_ranks(problem, rank))[slot.name]
            for expert, energy in enumerate(energies[slot.name].double()):
                difference = case.weight[group][expert, slot.rows] - found[expert]
                predicted = float(energy[rank:].sum())
                measured = weighted_energy(difference, covariance[expert])
                # a base that is nearly the expert itself leaves a delta of few digits
                rounding = 1e-9 * weighted_energy(case.weight[group][expert, slot.rows], covariance[expert])
                assert measured == pytest.approx(predicted, rel=1e-4, abs=rounding + 2e-6 * float(energy.sum()))


def test_energies_descend_and_are_the_squared_singular_values() -> None:
    case = make_case((6, 10, True))
    energies = case.problem("up", method()).energies()["gate_up"]
    covariance = damp(case.covariances("up", "loss"), method().damping)
    values, vectors = torch.linalg.eigh(covariance)
    singular = torch.linalg.svdvals(case.weight["up"].double() @ (vectors * values.sqrt()[:, None, :]))
    torch.testing.assert_close(energies.double(), singular.square(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2]])
def test_gate_and_up_share_the_right_factor(shape: Shape) -> None:
    case = make_case(shape)
    joint = case.problem("up", method()).energies()["gate_up"].double()
    apart = case.problem("up", method(gate_up="separate")).energies()
    gate, up = apart["gate"].double(), apart["up"].double()
    tensors = case.problem("up", method()).factors({"gate_up": [3] * 4}, torch.float32)
    assert (tensors["gate_up_u"].shape, tensors["gate_up_v"].shape) == ((12, 2 * shape[1]), (12, shape[0]))
    whole = joint.sum(1)
    torch.testing.assert_close(whole, gate.sum(1) + up.sum(1), rtol=1e-3, atol=0)
    for rank in range(min(shape[0], shape[1])):
        two = gate[:, rank:].sum(1) + up[:, rank:].sum(1)
        assert (joint[:, rank:].sum(1) >= two - 1e-3 * whole).all()  # one factor for both is the harder problem
        assert (joint[:, 2 * rank :].sum(1) <= two + 1e-3 * whole).all()  # which twice the rank makes up for


# --- bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("base", BASES)
def test_base_is_its_formula(base: str, shape: Shape, group: Group) -> None:
    case = make_case(shape)
    options = method(base=base, damping=1e-3)
    found = case.problem(group, options).bases_BMN
    weights = case.weight[group].double()
    if base == "none":
        assert found is None
        return
    assert found is not None
    num_tokens, fisher = [len(x) for x in case.inputs[group]], case.fisher[group].tolist()
    factors = {
        "mean": [1.0] * 4,
        "frequency": [n / sum(num_tokens) for n in num_tokens],
        "fisher": fisher,
        "fisher_frequency": [f * n / sum(num_tokens) for f, n in zip(fisher, num_tokens, strict=True)],
        "fisher_columns": list(case.fisher_columns(group)),
    }
    if base == "closed_form":
        covariances = case.covariances(group, "loss")
        total = sum(covariances)
        ridge = 1e-3 * total.diagonal().mean() * torch.eye(len(total))
        mean = weights.mean(0)
        moment = sum((w - mean) @ a for w, a in zip(weights, covariances, strict=True))
        expected = mean + moment @ torch.linalg.inv(total + ridge)
    else:
        expected = sum(f * w for f, w in zip(factors[base], weights, strict=True)) / sum(factors[base])
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@settings(deadline=None, max_examples=10)
@given(st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_nothing_is_better_than_the_closed_form_base(weighting: str, group: Group, shape: Shape, seed: int) -> None:
    case = make_case(shape, seed=seed)
    covariances = case.covariances(group, weighting)
    ridge = 1e-2 * covariances.sum(0).diagonal().mean()

    def objective(base_MN: Tensor) -> float:
        errors = [weighted_energy(w - base_MN, a) for w, a in zip(case.weight[group], covariances, strict=True)]
        return sum(errors) + float(ridge * (base_MN - case.weight[group].double().mean(0)).square().sum())

    def found(base: str) -> Tensor:
        bases_BMN = case.problem(group, method(base=base, weighting=weighting, damping=1e-2)).bases_BMN
        assert bases_BMN is not None
        return bases_BMN[0].double()

    best, generator = found("closed_form"), torch.Generator().manual_seed(seed)
    for _ in range(5):
        step = 0.01 * torch.randn(best.shape, generator=generator)
        assert objective(best) < min(objective(best + step), objective(best - step))
    for other in ("mean", "frequency", "fisher", "fisher_frequency"):
        assert objective(best) <= objective(found(other)) * (1 + 1e-6)


@pytest.mark.parametrize("base", ["frequency", "fisher", "fisher_frequency"])
def test_a_layer_without_tokens_weighs_all_experts_alike(base: str) -> None:
    case = make_case((6, 10, True), (0, 0, 0))
    case = replace(case, fisher=dict.fromkeys(GROUPS, torch.zeros(3).double()))
    for group in GROUPS:
        mean = case.weight[group].mean(0)
        torch.testing.assert_close(case.problem(group, method(base=base)).bases_BMN, mean[None])


def test_a_base_without_the_full_covariance_is_refused() -> None:
    case = make_case((6, 10, True))
    statistics = case.statistics()
    del statistics.tensors["down_input_loss_gram"]
    with pytest.raises(CompressionError, match="full_covariance: always"):
        GroupProblem(case.layer, "down", case.weight["down"], statistics, method(base="mean"), form=Form((0,) * 4))


# --- identity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_up", ["joint", "separate"])
@pytest.mark.parametrize("base", ["none", "fisher", "closed_form"])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_the_identity_however_bad_the_covariance(shape: Shape, base: str, gate_up: str) -> None:
    case = make_case(shape, (30, 2, 1, 0), decay=4)
    options = method(base=base, gate_up=gate_up, ranks="full")
    for group in GROUPS:
        problem = case.problem(group, options)
        ranks = {slot.name: fixed_ranks(case.layer, slot, options) for slot in problem.slots}
        whole = torch.cat(list(rebuilt(problem, ranks).values()), dim=1)
        largest = 1 if problem.bases_BMN is None else 1 + float(problem.bases_BMN.abs().max())
        torch.testing.assert_close(whole, case.weight[group], rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["none", "mean", "closed_form"])
def test_a_budget_for_everything_keeps_every_bit(base: str, dtype: torch.dtype) -> None:
    case = make_case((6, 10, True))
    case = replace(case, weight={g: w.to(dtype) for g, w in case.weight.items()})
    for group in GROUPS:
        statistics = make_case((6, 10, True)).statistics()
        problem = case.problem(group, method(base=base), statistics=statistics)
        for slot in problem.slots:
            items = [Item(slot.num_rows, slot.num_columns, e.numpy()) for e in problem.energies()[slot.name]]
            ranks = allocate(items, sum(item.dense_parameters for item in items))
            assert ranks == [DENSE] * 4
            assert torch.equal(rebuilt(problem, {slot.name: ranks}, dtype)[slot.name], case.weight[group])


def test_whole_matrices_and_factors_stand_side_by_side() -> None:
    case = make_case((12, 8, True))
    problem = case.problem("up", method(base="mean", gate_up="separate"))
    ranks = {"gate": [DENSE, 2, 0, DENSE], "up": [1, DENSE, DENSE, 0]}
    mixed = rebuilt(problem, ranks)
    for slot in problem.slots:
        for expert, rank in enumerate(ranks[slot.name]):
            alone = rebuilt(problem, same_ranks(problem, rank))[slot.name]
            assert torch.equal(mixed[slot.name][expert], alone[expert])
    assert problem.bases_BMN is not None
    assert torch.equal(mixed["gate"][2], problem.bases_BMN[0, :8])


# --- alignment ---------------------------------------------------------------------------------------------


def scrambled(case: Case, seed: int = 0) -> tuple[Case, Tensor]:
    """The same experts with their channels in another order, and the order (E, F) that undoes it."""
    generator = torch.Generator().manual_seed(seed)
    inner = case.layer.intermediate_size
    order = torch.stack([torch.randperm(inner, generator=generator) for _ in range(case.layer.num_experts)])
    gated = case.layer.has_gate
    weight: dict[Group, Tensor] = {
        "up": torch.stack(
            [w[torch.cat([o, o + inner]) if gated else o] for w, o in zip(case.weight["up"], order, strict=True)]
        ),
        "down": torch.stack([w[:, o] for w, o in zip(case.weight["down"], order, strict=True)]),
    }
    hidden = [h[:, o] for h, o in zip(case.inputs["down"], order, strict=True)]
    return replace(case, weight=weight, inputs={**case.inputs, "down": hidden}), order.argsort(dim=1)


@pytest.mark.parametrize("base", ["none", "mean", "closed_form"])
@pytest.mark.parametrize("shape", SHAPES)
def test_aligned_channels_give_what_channels_in_order_give(shape: Shape, base: str) -> None:
    case = make_case(shape, (40, 3, 0, 60))
    other, order = scrambled(case)
    options = method(base=base, min_tokens=10)
    for group in GROUPS:
        expected, found = case.problem(group, options), other.problem(group, options, order)
        for name, energy in expected.energies().items():
            torch.testing.assert_close(found.energies()[name], energy, rtol=1e-3, atol=1e-4 * float(energy.max()))
        for name, weights in rebuilt(expected, same_ranks(expected, 2)).items():
            torch.testing.assert_close(rebuilt(found, same_ranks(found, 2))[name], weights, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_alignment_preserves_every_expert(shape: Shape) -> None:
    case = make_case(shape)
    order = channel_alignment(case.layer, case.weight["up"], case.weight["down"], case.statistics())
    assert torch.equal(order[3], torch.arange(shape[1]))  # the most used expert sets the order
    assert not torch.equal(order[0], order[3])
    options = method(base="mean", ranks="full", align=True)
    aligned = {}
    for group in GROUPS:
        problem = case.problem(group, options, order)
        ranks = {slot.name: fixed_ranks(case.layer, slot, options) for slot in problem.slots}
        aligned[group] = torch.cat(list(rebuilt(problem, ranks).values()), dim=1)
    x = case.inputs["up"][0]

    def outputs(up: Tensor, down: Tensor) -> Tensor:
        first = x @ up.mT
        hidden = silu(first[..., : shape[1]]) * first[..., shape[1] :] if shape[2] else silu(first)
        return hidden @ down.mT

    expected = outputs(case.weight["up"], case.weight["down"])
    torch.testing.assert_close(outputs(aligned["up"], aligned["down"]), expected, rtol=1e-5, atol=1e-5)


def test_alignment_undoes_a_permutation_so_that_the_base_explains_everything() -> None:
    case = make_case((12, 8, True))
    alike = replace(case, weight={g: w[:1].expand_as(w) for g, w in case.weight.items()})
    other, _ = scrambled(alike)
    order = channel_alignment(other.layer, other.weight["up"], other.weight["down"], other.statistics())
    for group in GROUPS:
        (crooked,) = other.problem(group, method(base="mean")).energies().values()
        (straight,) = other.problem(group, method(base="mean"), order).energies().values()
        assert float(straight.sum()) < 1e-8 * float(crooked.sum())


# --- rare experts, order of experts ------------------------------------------------------------------------


@pytest.mark.parametrize("min_tokens", [0, 16])
@pytest.mark.parametrize("num_tokens", [(40, 1, 0, 2), (0, 0, 0, 0), (1, 0, 0, 0)])
@pytest.mark.parametrize("base", BASES)
def test_experts_that_saw_nearly_nothing_stay_finite(base: str, num_tokens: tuple[int, ...], min_tokens: int) -> None:
    for shape, weighting in product(SHAPES, WEIGHTINGS):
        case = make_case(shape, num_tokens)
        options = method(base=base, weighting=weighting, min_tokens=min_tokens)
        for group in GROUPS:
            problem = case.problem(group, options)
            for energy in problem.energies().values():
                assert energy.isfinite().all()
                assert (energy >= 0).all()
            for tensor in problem.factors(same_ranks(problem, 3), torch.float32).values():
                assert tensor.isfinite().all()


def test_an_unseen_expert_is_cut_along_its_own_directions() -> None:
    case = make_case((6, 10, True), (40, 50, 0))
    problem = case.problem("down", method(min_tokens=16))  # by its output
    weights = case.weight["down"].double()
    norm = weights.square().sum((1, 2))
    output = [w @ a @ w.T for w, a in zip(weights, case.covariances("down", "loss"), strict=True)]
    scale = sum(o.trace() for o in output) / (40 * norm[0] + 50 * norm[1])
    singular = torch.linalg.svdvals(weights[2])
    expected = scale * singular.square()
    torch.testing.assert_close(problem.energies()["down"][2].double(), expected, rtol=1e-4, atol=1e-6)
    found = rebuilt(problem, same_ranks(problem, 2))["down"][2]
    assert float((found - weights[2]).norm()) == pytest.approx(float(singular[2:].norm()), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rare_expert_weighs_as_much_as_its_tokens(shape: Shape) -> None:
    case = make_case(shape, (200, 200, 4, 0))
    for group in GROUPS:
        (energies,) = case.problem(group, method(min_tokens=64)).energies().values()
        common = float(energies[:2].sum(1).mean()) / 200
        for expert, num_tokens in ((2, 4), (3, 1)):
            assert common / 4 < float(energies[expert].sum()) / num_tokens < common * 4


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_experts_does_not_matter(shape: Shape, base: str) -> None:
    case, order = make_case(shape), [2, 0, 3, 1]
    other = replace(
        case,
        weight={g: w[order] for g, w in case.weight.items()},
        inputs={g: [x[i] for i in order] for g, x in case.inputs.items()},
        norms={g: [n[i] for i in order] for g, n in case.norms.items()},
        fisher={g: f[order] for g, f in case.fisher.items()},
    )
    options = method(base=base)
    for group in GROUPS:
        first, second = case.problem(group, options), other.problem(group, options)
        for name, energy in first.energies().items():
            torch.testing.assert_close(
                second.energies()[name], energy[order], rtol=1e-3, atol=1e-5 * float(energy.max())
            )
        (weights,) = rebuilt(first, {s.name: [1, 2, DENSE, 4] for s in first.slots}).values()
        (permuted,) = rebuilt(second, {s.name: [DENSE, 1, 4, 2] for s in second.slots}).values()
        torch.testing.assert_close(permuted, weights[order], rtol=0, atol=1e-3)


# --- budgets -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@example(2, 2, 20, False, "joint", "none", "uniform")  # 0.45, but for the last bit
@given(
    st.integers(2, 9), st.integers(2, 40), st.integers(2, 40), st.booleans(), st.sampled_from(["joint", "separate"]),
    st.sampled_from(["none", "mean"]), st.sampled_from(["allocated", "uniform"]),
)  # fmt: skip
def test_the_ratio_that_a_refusal_names_is_possible_and_hardly_more(
    num_experts: int, hidden: int, inner: int, gated: bool, gate_up: str, base: str, ranks: str
) -> None:
    layer = MoELayer("experts", num_experts, hidden, inner, gated, False, False, True)

    def ask(ratio: float) -> D2MoE:
        options = method(gate_up=gate_up, base=base, ranks=ranks, ratio=ratio)
        check_ratio([layer], options)
        return options

    try:
        assert ask(0.9999).base == "none"
        assert ranks == "allocated"
        return
    except RecipeError as refusal:
        (named,) = re.findall(r"highest possible is (?:below )?([\d.]+);", str(refusal))
    step = 1e-4
    if float(named) > step:
        options = ask(float(named) - (step if ranks == "allocated" else 0))
        assert budget_parameters([layer], options) >= 0
        for slot in (slot for group in GROUPS for slot in slots(layer, group, options)):
            assert ranks == "allocated" or min(fixed_ranks(layer, slot, options)) >= 1
    with pytest.raises(RecipeError, match=r"method\.ratio"):
        ask(float(named) + 1.01 * step)


def test_the_budget_is_what_the_ratio_leaves() -> None:
    layers = [make_case(shape).layer for shape in SHAPES[:2]]
    # 4 experts of 3 * 6 * 10 and of 3 * 12 * 8 parameters: 1872 in all
    assert budget_parameters(layers, method(ratio=0.25)) == 1404

"""Sparse columns pruned in training: schedule, threshold, masks that hold, resume, compact form, several processes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_compress.checkpoint import CheckpointReader
from moe_compress.checkpoint.manifest import Manifest
from moe_compress.distillation.sparsity import ColumnPruner, keep_best, keep_ratio
from moe_compress.distillation_options import Sparsity
from moe_compress.errors import CheckpointError, RecipeError
from moe_compress.model.experts import FactorisedExperts
from tests.conftest import Checkpoint, Compress
from tests.model.handmade import load, logits_of

from .sparsity_cases import (
    NUM_STEPS,
    RATIO,
    Training,
    loss_of,
    pruner_of,
    save_compact,
    sparsity,
    tables_of,
    without_filters,
)


@pytest.fixture(scope="session")
def trained(student: Path) -> Training:
    """A training that is done; no test changes it."""
    training = Training(student)
    training.run(0, NUM_STEPS)
    return training


# --- schedule and threshold --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1), (10, 1), (25, 0.5375), (40, 0.3), (55, 0.2125), (70, 0.2), (100, 0.2)]
)
def test_the_schedule_is_cubic_between_the_warm_ups(step: int, expected: float) -> None:
    assert keep_ratio(step, 100, 0.2, initial_warmup=0.1, final_warmup=0.3) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0, 0.5, exclude_max=True), st.floats(0, 0.5, exclude_max=True))
def test_the_schedule_falls_from_one_to_its_end(num_steps: int, final: float, initial: float, last: float) -> None:
    kept = [keep_ratio(step, num_steps, final, initial, last) for step in range(num_steps + 1)]
    assert kept[0] == pytest.approx(1)
    assert kept[-1] == pytest.approx(final)
    assert all(later <= earlier for earlier, later in pairwise(kept))
    assert all(final - 1e-12 <= keep <= 1 + 1e-12 for keep in kept)


@st.composite
def columns(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Scores (many equal), costs, which are kept, a budget."""
    each = st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.integers(1, 9), st.booleans())
    score, cost, is_kept = zip(*draw(st.lists(each, min_size=1, max_size=12)), strict=True)
    return torch.tensor(score), torch.tensor(cost), torch.tensor(is_kept), draw(st.integers(0, 60))


@given(columns())
def test_columns_are_kept_by_score_within_the_budget(case: tuple[Tensor, Tensor, Tensor, int]) -> None:
    score, cost, is_kept, budget = case
    expected = [False] * len(score)
    for _, column in sorted((-float(score[c]), c) for c in range(len(score)) if is_kept[c]):
        budget -= int(cost[column])
        if budget < 0:
            break
        expected[column] = True
    assert keep_best(score, cost, is_kept, case[3]).tolist() == expected


# --- importance --------------------------------------------------------------------------------------------


def column_means(model: nn.Module, batch: int) -> Tensor:
    """(C,) mean |s dL/ds|, from the gradients of the parameters themselves; takes them away again."""
    loss_of(model, batch).backward()
    means = [(p * p.grad).abs().mean(1).detach() for p in tables_of(model).values() if p.grad is not None]
    model.zero_grad()
    return torch.cat(means)


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize("route", ["loop", "every", "grouped", "gathered"])
def test_importance_is_that_of_the_parameters_own_gradients(route: str, checkpointing: str, student: Path) -> None:
    reference = column_means(load("mixtral", student), batch=0)
    model = load("mixtral", student)
    pruner = pruner_of(model, student)
    for module in model.modules():
        if isinstance(module, FactorisedExperts):
            module.route = route  # type: ignore[assignment]
    if checkpointing != "none":
        how = {"use_reentrant": checkpointing == "reentrant"}
        model.activation_checkpointing_enable(how)
        model.train()
        model.enable_input_require_grads()
    loss_of(model, 0).backward()
    pruner.step(1)
    torch.testing.assert_close(pruner.state_dict()["score"], 0.15 * reference, rtol=1e-3, atol=1e-9)


def test_importance_is_added_up_over_micro_batches_and_smoothed_over_steps(student: Path) -> None:
    model = load("mixtral", student)
    first, second, third = (column_means(model, batch) for batch in range(3))
    pruner = pruner_of(model, student, sparsity(beta=0.75), num_steps=100)
    for batch in (0, 1):
        (loss_of(model, batch) / 2).backward()
    pruner.step(1)
    loss_of(model, 2).backward()
    pruner.step(2)
    expected = 0.75 * 0.25 * (first + second) / 2 + 0.25 * third
    torch.testing.assert_close(pruner.state_dict()["score"], expected, rtol=1e-4, atol=1e-9)
    assert bool(pruner.state_dict()["is_kept"].all())  # the initial warm-up


# --- masks -------------------------------------------------------------------------------------------------


def test_what_is_pruned_stays_pruned_whatever_the_optimizer_does(student: Path) -> None:
    training = Training(student)
    kept, moved = [training.pruner.state_dict()["is_kept"]], 0.0
    for step in range(NUM_STEPS):
        before = torch.cat([p.detach().square().sum(1) for p in tables_of(training.model).values()])
        training.run(step, step + 1)
        after = torch.cat([p.detach().square().sum(1) for p in tables_of(training.model).values()])
        moved += float((after - before)[~kept[-1]].abs().sum())
        kept.append(training.pruner.state_dict()["is_kept"])
    assert all(bool((later <= earlier).all()) for earlier, later in pairwise(kept))
    assert len({int(each.sum()) for each in kept}) > 4  # in steps
    assert training.pruner.is_done
    assert moved > 0  # momentum does move pruned parameters
    logits, dense = logits_of(training.model), dense_of(training.model)
    gradients = gradients_of(training.model)
    without_filters(training.model)
    assert float((logits_of(training.model) - logits).abs().max()) > 1e-3
    with torch.no_grad():
        start = 0
        for parameter in tables_of(training.model).values():
            parameter *= kept[-1][start : start + len(parameter), None]
            start += len(parameter)
    torch.testing.assert_close(logits_of(training.model), logits, atol=1e-6, rtol=0)
    expected = gradients_of(training.model)
    assert float(expected[~kept[-1]].abs().max()) > 0
    expected[~kept[-1]] = 0
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(dense_of(training.model), dense, atol=0, rtol=0)


def gradients_of(model: nn.Module) -> Tensor:
    """(C, most rows) of the packed sparse columns, filled up with zeros."""
    loss_of(model, 0).backward()
    found = [p.grad for p in tables_of(model).values() if p.grad is not None]
    model.zero_grad()
    width = max(grad.shape[1] for grad in found)
    return torch.cat([nn.functional.pad(grad, (0, width - grad.shape[1])) for grad in found])


def dense_of(model: nn.Module) -> list[dict[str, Tensor]]:
    return [module.dense_weights() for module in model.modules() if isinstance(module, FactorisedExperts)]


def test_pruned_columns_are_those_of_least_score_over_all_layers(student: Path) -> None:
    training = Training(student)
    training.run(0, 5)
    before = training.pruner.state_dict()
    training.run(5, 6)
    after = training.pruner.state_dict()
    gone, kept = before["is_kept"] & ~after["is_kept"], after["is_kept"]
    assert int(gone.sum()) > 0
    assert float(after["score"][gone].max()) <= float(after["score"][kept].min())
    assert training.pruner.progress["smallest_score"] == float(after["score"][kept].min())
    assert training.pruner.progress["num_columns"] == int(kept.sum())
    last = keep_ratio(6, NUM_STEPS, training.pruner._final / training.pruner._all, 0.1, 0.3)
    widest = 81 / training.pruner._all
    assert last - widest < training.pruner.progress["keep_ratio"] <= last


def test_columns_of_equal_score_go_from_the_end(student: Path) -> None:
    pruner = pruner_of(load("mixtral", student), student)
    pruner.step(NUM_STEPS)
    is_kept = pruner.state_dict()["is_kept"]
    assert 0 < int(is_kept.sum()) < len(is_kept)
    assert bool((is_kept[:-1] >= is_kept[1:]).all())


def test_training_in_half_precision_reaches_the_ratio(student: Path) -> None:
    training = Training(student, dtype=torch.bfloat16)
    training.run(0, NUM_STEPS)
    assert training.pruner.is_done
    assert training.pruner.state_dict()["score"].dtype == torch.float32
    state, _ = training.pruner.compact(training.model.state_dict())
    assert {tensor.dtype for name, tensor in state.items() if name.endswith("_s")} == {torch.bfloat16}


# --- resume ------------------------------------------------------------------------------------------------


def test_a_resumed_training_prunes_the_same(student: Path, trained: Training, tmp_path: Path) -> None:
    half = Training(student)
    half.run(0, 5)
    save_file(half.pruner.state_dict(), tmp_path / "pruner.safetensors")
    resumed = Training(student)
    resumed.model.load_state_dict(half.model.state_dict())
    resumed.optimizer.load_state_dict(half.optimizer.state_dict())
    resumed.pruner.load_state_dict(load_file(tmp_path / "pruner.safetensors"))
    assert resumed.pruner.progress == half.pruner.progress
    resumed.run(5, NUM_STEPS)
    expected, found = trained.pruner.state_dict(), resumed.pruner.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logits_of(resumed.model), logits_of(trained.model))


def test_the_state_of_another_student_is_refused(student: Path) -> None:
    pruner = pruner_of(load("mixtral", student), student)
    state = {name: tensor[1:] for name, tensor in pruner.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"has \d+ columns, the student \d+"):
        pruner.load_state_dict(state)


# --- compact form ------------------------------------------------------------------------------------------


def bytes_of(folder: Path) -> int:
    return sum(entry.num_bytes for entry in CheckpointReader(folder).entries.values())


@pytest.mark.parametrize("has_numbers", [True, False])
def test_the_compact_model_is_the_masked_one_and_smaller(
    has_numbers: bool, student: Path, trained: Training, tmp_path: Path
) -> None:
    state = trained.model.state_dict()
    given = {name: tensor for name, tensor in state.items() if has_numbers or not name.endswith("_columns")}
    folder = save_compact(trained, given, tmp_path / "compact")
    compact = load("mixtral", folder)
    torch.testing.assert_close(logits_of(compact), logits_of(trained.model), atol=1e-6, rtol=0)
    is_kept, rows = trained.pruner.state_dict()["is_kept"], {}
    start = 0
    for name, parameter in tables_of(trained.model).items():
        rows[name] = is_kept[start : start + len(parameter)]
        start += len(parameter)
    pruned = sum(4 * int((~own).sum()) * (state[name].shape[1] + 1) for name, own in rows.items())
    assert pruned > 0
    assert bytes_of(student) - bytes_of(folder) == pruned
    assert state.keys() == trained.model.state_dict().keys()  # the model itself stays as it is
    own = compact.state_dict()
    for name, is_own in rows.items():
        assert torch.equal(own.get(name, state[name][:0]), state[name][is_own])
    compact.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load("mixtral", tmp_path / "again")), logits_of(load("mixtral", folder)))


def test_a_slot_may_lose_all_its_columns(student: Path, tmp_path: Path) -> None:
    training = Training(student)
    pruner = training.pruner
    place = next(packed.place for packed in pruner._packed if packed.slot.name == "down")
    state = pruner.state_dict()
    state["is_kept"][place] = False
    pruner.load_state_dict(state)
    compact = load("mixtral", save_compact(training, training.model.state_dict(), tmp_path / "compact"))
    experts = compact.get_submodule(pruner._packed[0].path)
    assert not hasattr(experts, "down_s")
    assert not hasattr(experts, "down_columns")
    torch.testing.assert_close(logits_of(compact), logits_of(training.model), atol=1e-6, rtol=0)


def test_trained_and_one_shot_are_of_one_size(
    compressed: Compress, student: Path, trained: Training, tmp_path: Path
) -> None:
    one_shot = compressed("mixtral", name="mcsmoe", ratio=RATIO)
    folder = save_compact(trained, trained.model.state_dict(), tmp_path / "compact")
    original = Manifest.load(student).parameters["experts_original"]
    assert bytes_of(student) > bytes_of(folder)
    assert abs(bytes_of(folder) - bytes_of(one_shot)) < 4 * 81  # a column of gate and up together, and its number
    kept = sum(int(p.numel()) for m in load("mixtral", folder).modules() for p in own_tensors(m))
    assert (1 - RATIO) * original - 81 < kept <= (1 - RATIO) * original


def own_tensors(module: nn.Module) -> list[Tensor]:
    if not isinstance(module, FactorisedExperts):
        return []
    return [getattr(module, name) for slot in module.slots for name in slot.shapes()]


def test_a_student_that_keeps_the_whole_residual_is_the_merged_model(compressed: Compress) -> None:
    """Where the paper starts."""
    folder = compressed("mixtral", name="mcsmoe", ratio=RATIO, start="residual")
    merged = compressed("mixtral", name="msmoe", ratio=0.25)
    model = load("mixtral", folder)
    torch.testing.assert_close(logits_of(model), logits_of(load("mixtral", merged)), atol=1e-5, rtol=0)
    one_shot = load("mixtral", compressed("mixtral", name="mcsmoe", ratio=RATIO))
    for experts, other in zip(own_experts(model), own_experts(one_shot), strict=True):
        assert [slot.ranks for slot in experts.slots] == [slot.ranks for slot in other.slots]
    pruner = pruner_of(model, folder)
    pruner.step(NUM_STEPS)
    assert pruner.is_done


def own_experts(model: nn.Module) -> list[FactorisedExperts]:
    return [module for module in model.modules() if isinstance(module, FactorisedExperts)]


# --- what cannot be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.9, r"^distillation\.sparsity\.ratio: 0\.9 is more than .* 0\.8\d*; lower it, or .*$"),
        (0.4, r"^distillation\.sparsity\.ratio: 0\.4 needs no column pruned, .* 0\.5\d* already; raise it, or .*$"),
    ],
)
def test_a_ratio_that_columns_cannot_meet_is_refused(ratio: float, message: str, student: Path) -> None:
    model = load("mixtral", student)
    with pytest.raises(RecipeError, match=message):
        pruner_of(model, student, Sparsity(ratio=ratio))
    assert not any(experts.column_filters for experts in own_experts(model))


def test_the_highest_ratio_that_is_named_is_possible(student: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        pruner_of(load("mixtral", student), student, Sparsity(ratio=0.9))
    highest = float(str(caught.value).split(", ")[1].split(";")[0])
    pruner = pruner_of(load("mixtral", student), student, Sparsity(ratio=highest))
    pruner.step(NUM_STEPS)
    assert pruner.is_done


def test_a_student_without_columns_is_refused(tiny: Checkpoint, compressed: Compress) -> None:
    for folder in (tiny("mixtral"), compressed("mixtral", ratio=0.5)):
        with pytest.raises(RecipeError, match=r"^distillation\.sparsity: prunes sparse columns, .*; compress with .*$"):
            ColumnPruner(load("mixtral", folder), sparsity(), NUM_STEPS, 1)


def test_columns_that_do_not_train_are_refused(student: Path) -> None:
    model = load("mixtral", student)
    next(iter(tables_of(model).values())).requires_grad_(False)
    with pytest.raises(RecipeError, match=r"^distillation\.train: .*experts\.gate_up_s does not train, .*; set train:"):
        pruner_of(model, student)

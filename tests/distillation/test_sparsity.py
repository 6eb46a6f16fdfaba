"""Sparse columns pruned in training: schedule, threshold, masks that hold, resume, compact form, several processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing, nn

from moe_compress.checkpoint import CheckpointReader
from moe_compress.checkpoint.manifest import Manifest
from moe_compress.distillation.sparsity import ColumnPruner, keep_best, keep_ratio
from moe_compress.distillation_options import Sparsity
from moe_compress.errors import CheckpointError, RecipeError
from moe_compress.model.experts import FactorisedExperts
from tests.conftest import Checkpoint, Compress
from tests.model.handmade import load, logits_of
from tests.tiny_models import token_ids

RATIO, NUM_STEPS = 0.8, 10
STUDENT: dict[str, Any] = {"name": "mcsmoe", "ratio": RATIO, "start": 0.5}


@pytest.fixture(scope="session")
def student(compressed: Compress) -> Path:
    """A Mixtral with more sparse columns than training is to leave it."""
    return compressed("mixtral", **STUDENT)


def sparsity(**options: Any) -> Sparsity:
    return Sparsity(ratio=RATIO, **options)


def pruner_of(model: Any, folder: Path, options: Sparsity | None = None, num_steps: int = NUM_STEPS) -> ColumnPruner:
    original = Manifest.load(folder).parameters["experts_original"]
    return ColumnPruner(model, options or sparsity(), num_steps, original)


def loss_of(model: Any, batch: int) -> Tensor:
    ids = token_ids(2, 12, seed=batch)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


class Training:
    """Plain AdamW with momentum and weight decay, some micro-batches a step."""

    def __init__(self, folder: Path, micro_batches: int = 1, **options: Any) -> None:
        self.model = load("mixtral", folder, **options)
        self.pruner = pruner_of(self.model, folder)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.1)
        self.micro_batches = micro_batches

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            for micro in range(self.micro_batches):
                (loss_of(self.model, step * self.micro_batches + micro) / self.micro_batches).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.pruner.step(step + 1)


@pytest.fixture(scope="session")
def trained(student: Path) -> Training:
    """A training that is done; no test changes it."""
    training = Training(student)
    training.run(0, NUM_STEPS)
    return training


def tables_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The packed sparse columns, in the order of the pruner's."""
    return {name: p for name, p in model.named_parameters() if name.endswith("_s")}


def without_filters(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FactorisedExperts):
            module.column_filters.clear()


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


def save_compact(training: Training, state: dict[str, Tensor], folder: Path) -> Path:
    """What training leaves, as a checkpoint."""
    model, config = training.model, training.model.config.quantization_config
    compact, layers = training.pruner.compact(state)
    quantizer, before = model.hf_quantizer, config.layers
    model.hf_quantizer, config.layers = None, layers  # with a quantizer transformers takes no other state
    model.save_pretrained(folder, state_dict=compact)
    model.hf_quantizer, config.layers = quantizer, before
    return folder


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


# --- several processes, DeepSpeed --------------------------------------------------------------------------


def start(work: Callable[..., None], num_processes: int, *arguments: Any) -> None:
    """Runs `work(rank, *arguments)` in processes of their own."""
    multiprocessing.spawn(work, arguments, nprocs=num_processes)


def train_one_of_two(rank: int, folder: Path, out: Path) -> None:
    """Half of the micro-batches of each step; gradients are averaged by hand."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    training = Training(folder)
    for step in range(NUM_STEPS):
        loss_of(training.model, 2 * step + rank).backward()
        for parameter in training.model.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.pruner.step(step + 1)
    save_file(training.pruner.state_dict(), out / f"{rank}.safetensors")
    distributed.destroy_process_group()


def test_two_processes_decide_as_one(student: Path, tmp_path: Path) -> None:
    start(train_one_of_two, 2, student, tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    one = Training(student, micro_batches=2)
    one.run(0, NUM_STEPS)
    expected = one.pruner.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(first["score"], expected["score"], rtol=1e-2, atol=1e-8)
    assert torch.equal(first["is_kept"], expected["is_kept"])


ZERO = [(3, torch.float32), (3, torch.bfloat16), (1, torch.bfloat16)]


def train_with_zero(rank: int, folder: Path, out: Path) -> None:
    """Two micro-batches a step, activations recomputed; what comes of it lies in a folder a case."""
    os.environ.update(DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error", LOCAL_RANK="0")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    meet = f"file://{out}/meet"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=meet, rank=0, world_size=1)
    for number, (stage, dtype) in enumerate(ZERO):
        training = Training(folder, micro_batches=2, dtype=dtype)
        model, pruner = training.model, training.pruner
        model.activation_checkpointing_enable()
        model.train()
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=training.optimizer, config=config)
        for micro in range(2 * NUM_STEPS):
            engine.backward(loss_of(engine, micro))
            engine.step()
            if micro % 2:
                pruner.step(micro // 2 + 1)
        assert stage < 3 or not any(parameter.numel() for parameter in model.parameters())
        engine.eval()
        logits = logits_of(engine)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            save_compact(training, model.state_dict(), out / str(number))
        without_filters(model)
        save_file(
            {"logits": logits, "unmasked": logits_of(engine), **pruner.state_dict()}, out / f"{number}.safetensors"
        )
        engine.destroy()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_masks_hold_wherever_zero_keeps_the_parameters(student: Path, tmp_path: Path) -> None:
    start(train_with_zero, 1, student, tmp_path)
    plain = Training(student, micro_batches=2)
    plain.run(0, NUM_STEPS)
    expected = plain.pruner.state_dict()
    for number, (_, dtype) in enumerate(ZERO):
        found = load_file(tmp_path / f"{number}.safetensors")
        compact = logits_of(load("mixtral", tmp_path / str(number), dtype=dtype))
        tolerance = 1e-6 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(compact, found["logits"], atol=tolerance, rtol=0)
        assert float((found["unmasked"] - found["logits"]).abs().max()) > 0.2  # pruned columns would tell
        if dtype == torch.float32:
            torch.testing.assert_close(found["score"], expected["score"], rtol=1e-4, atol=1e-9)
            assert torch.equal(found["is_kept"], expected["is_kept"])

"""What `plan` says of a training: against models that are really compressed, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

from moe_compress.distillation.examples import Examples
from moe_compress.distillation.parameters import choose_trained
from moe_compress.distillation.student import load_model
from moe_compress.distillation.teacher import TeacherSetup, write_teacher_shards
from moe_compress.errors import RecipeError
from moe_compress.plan import Plan, make_plan
from moe_compress.plan.machine import machine_of
from moe_compress.plan.training import TrainingPlan
from tests.conftest import Checkpoint, Compress
from tests.plan.published_models import recipe_for


def plan_of(model: str, method: dict[str, Any] | None = None, **distillation: Any) -> Plan:
    deepspeed = {"processes": 1, **distillation.pop("deepspeed", {})}
    changes = {"distillation": {"text": "text.txt", "deepspeed": deepspeed, **distillation}, "evaluation": None}
    return make_plan(recipe_for(model, **changes, **({"method": method} if method else {})), machine_of("h100", 8))


def training_of(plan: Plan) -> TrainingPlan:
    assert plan.training is not None
    return plan.training


METHODS: list[dict[str, Any]] = [
    {"name": "d2moe", "ratio": 0.5},
    {"name": "d2moe", "ratio": 0.5, "base": "mean", "ranks": "uniform"},
    {"name": "msmoe", "ratio": 0.5},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_as_many_parameters_train_as_planned(
    model_type: str, method: dict[str, Any], tiny: Checkpoint, compressed: Compress
) -> None:
    student = load_model(compressed(model_type, **method), torch.float32)
    for train in ("all", "routers", "experts", "factors", "wholes", ["*.q_proj.weight"]):
        names = set() if (train, method["name"]) == ("factors", "msmoe") else {*choose_trained(student, train)}
        if not names:
            continue
        planned = training_of(plan_of(str(tiny(model_type)), method, train=train))
        sizes = {name: parameter.numel() for name, parameter in student.named_parameters()}
        assert planned.parameters == pytest.approx(sum(sizes.values()), rel=0.02)
        if planned.note and train in ("factors", "wholes"):  # whole matrices instead of factors are calibration's
            continue
        assert planned.trained_parameters == pytest.approx(sum(sizes[name] for name in names), rel=0.02), train


def test_nothing_to_train_is_refused(tiny: Checkpoint) -> None:
    for train in ("factors", ["nothing.*"]):
        with pytest.raises(RecipeError, match=r"is none of the parameters of this model"):
            plan_of(str(tiny("mixtral")), {"name": "msmoe", "ratio": 0.5}, train=train)


def test_memory_by_stage_by_hand() -> None:
    def memory(stage: int, **more: Any) -> dict[str, int]:
        how = {"zero_stage": stage, "processes": 8, **more.pop("deepspeed", {})}
        return training_of(plan_of("Mixtral-8x7B-v0.1", deepspeed=how, **more)).memory_bytes

    small = training_of(plan_of("Mixtral-8x7B-v0.1"))
    n, t = small.parameters, small.trained_parameters
    assert n == pytest.approx(46.7e9 - 0.4 * 45.1e9, rel=1e-3)
    assert n - t == 32 * 8 * 4096  # the routers
    shares = {0: (1, 1, 8), 1: (1, 1, 8), 2: (1, 8, 8), 3: (8, 8, 8)}  # bf16 spreads the optimizer at any stage
    for stage, (student, gradients, optimizer) in shares.items():
        found = memory(stage)
        assert found["student"] == pytest.approx(2 * n / student)
        assert found["gradients"] == pytest.approx(4 * t / gradients)
        assert found["optimizer"] == pytest.approx(12 * t / optimizer)
    assert memory(0, dtype="float32")["optimizer"] == 8 * t
    assert memory(1, dtype="float32")["optimizer"] == pytest.approx(12 * t / 8)
    assert memory(3, teacher="live")["teacher"] == pytest.approx(2 * 46.7e9 / 8, rel=1e-3)
    assert memory(1, teacher="live")["teacher"] == pytest.approx(2 * 46.7e9, rel=1e-3)
    name = "activations of a micro-batch"
    assert memory(3, deepspeed={"gradient_checkpointing": True})[name] < memory(3)[name] / 5
    assert memory(3, micro_batch_size=8)[name] == 2 * memory(3)[name]
    offloaded = training_of(plan_of("Mixtral-8x7B-v0.1", deepspeed={"zero_stage": 3, "offload": True}))
    assert offloaded.host_bytes == sum(offloaded.memory_bytes[part] for part in ("libraries", "student", "optimizer"))
    assert small.host_bytes == small.memory_bytes["libraries"]


def test_steps_and_operations_by_hand() -> None:
    training = training_of(plan_of("Mixtral-8x7B-v0.1", num_sequences=1000, batch_size=16, epochs=2))
    assert (training.steps, training.tokens) == (2 * 63, 2 * 1000 * 1024)
    short = training_of(plan_of("Mixtral-8x7B-v0.1", num_sequences=1000, max_steps=10))
    assert (short.steps, short.tokens) == (10, 10 * 16 * 1024)
    active = 12.88e9 - 32000 * 4096 - 0.4 * 2 / 8 * 45.1e9
    assert training.flops["train"] == pytest.approx(training.tokens * 6 * active, rel=0.05)  # and attention
    assert training.flops["teach"] == pytest.approx(1032 * 1024 * 2 * 12.75e9, rel=0.03)
    assert training.flops["validate"] == pytest.approx(3 * 32 * 1024 * 2 * active, rel=0.05)  # steps 0, 100 and 126
    routers = training_of(plan_of("Mixtral-8x7B-v0.1", num_sequences=1000, epochs=2, train="routers"))
    assert routers.flops["train"] == pytest.approx(training.flops["train"] * 2 / 3, rel=0.02)
    again = training_of(
        plan_of("Mixtral-8x7B-v0.1", num_sequences=1000, epochs=2, deepspeed={"gradient_checkpointing": True})
    )
    assert again.flops["train"] == pytest.approx(training.flops["train"] * 4 / 3, rel=0.02)
    assert training_of(plan_of("Mixtral-8x7B-v0.1", teacher="none")).flops["teach"] == 0


def test_network_by_stage_by_hand() -> None:
    def network(stage: int, processes: int = 4) -> float:
        how = {"zero_stage": stage, "processes": processes}
        return training_of(plan_of("Mixtral-8x7B-v0.1", deepspeed=how, max_steps=1, batch_size=32)).network_bytes

    plain = training_of(plan_of("Mixtral-8x7B-v0.1"))
    n, t, micro = plain.parameters, plain.trained_parameters, 2
    assert network(1, processes=1) == 0
    assert network(1) == 3 * 2 * 4 * t
    assert network(2) == 3 * (micro * 4 * t + 2 * t)
    assert network(3) == 3 * micro * (4 * t + 2 * 2 * n)


def test_answers_take_the_disk_that_is_planned(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, model = tmp_path_factory.mktemp("answers"), tiny("mixtral")
    sequences = 64
    ids = torch.randint(0, 128, (sequences, 32), generator=torch.Generator().manual_seed(0))
    examples = folder / "examples.safetensors"
    Examples(ids, torch.ones_like(ids), ids.clone()).save(examples)
    setup = TeacherSetup(model, examples, folder, 64, 1.0, 8, "float32", "cpu")
    write_teacher_shards(setup, [(0, sequences)])
    planned = training_of(
        plan_of(str(model), num_sequences=48, validation_sequences=16, sequence_length=32, teacher_top_k=64)
    )
    written = setup.shard((0, sequences)).stat().st_size
    assert planned.disk_bytes["teacher's answers"] == pytest.approx(written, rel=0.1)


def test_a_training_on_a_cluster_is_told() -> None:
    recipe = recipe_for(
        "DeepSeek-V3", distillation={"text": "text.txt", "train": "routers", "deepspeed": {"zero_stage": 3}}
    )
    plan = make_plan(recipe, machine_of("h200", 64))
    training = training_of(plan)
    assert training.num_processes == 64
    assert training.trained_parameters == 58 * 256 * 7168
    teach, train = training.stages
    assert teach.storage_bytes > 64 * plan.to_dict()["total"]["num_bytes"]
    assert train.bound == "network"  # all weights are gathered for every micro-batch, once a node
    assert train.network_bytes == training.network_bytes * 7 // 63
    assert any(warning.startswith("training process: 149 GB are more than 90%") for warning in training.warnings)
    assert training.hours == pytest.approx((teach.seconds + train.seconds) / 3600)
    assert training.gpu_hours == pytest.approx(64 * (training.hours or 0))
    console = Console(record=True, width=200)
    plan.show(console)
    assert f"{training.trained_parameters:,} of {training.parameters:,} parameters" in console.export_text()
    assert make_plan(recipe_for("DeepSeek-V3")).training is None

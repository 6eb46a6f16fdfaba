"""Plans of five published models on 1, 8 and 64 GPUs, from nothing but their config.json."""

from __future__ import annotations

import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from moe_compress.errors import RecipeError
from moe_compress.plan import Plan, make_plan
from moe_compress.plan.machine import GPUS, Machine, machine_of
from moe_compress.plan.sizes import OUTSIDE
from moe_compress.plan.timeline import StageTime, Timeline, pipeline_units
from tests.plan.published_models import FOLDER, MODELS, recipe_for


def cluster_of(plan: Plan) -> Timeline:
    assert plan.cluster is not None
    return plan.cluster


def stage_of(plan: Plan, name: str) -> StageTime:
    return next(stage for stage in cluster_of(plan).stages if stage.name == name)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_the_published_ones(name: str) -> None:
    published, plan = MODELS[name], make_plan(recipe_for(name))
    inside = [part for part in plan.parts if part.name != OUTSIDE]
    assert sum(part.parameters for part in inside) == pytest.approx(published.total, rel=0.01)
    assert plan.active_parameters == pytest.approx(published.active, rel=0.04)  # theirs count the embedding in
    assert plan.parts[0].parameters == published.experts
    assert any("fp8" in problem for problem in plan.problems) == published.is_fp8


def test_layers_that_predict_further_tokens_are_counted() -> None:
    *_, outside = make_plan(recipe_for("DeepSeek-V3")).parts
    assert outside.name == OUTSIDE
    assert outside.parameters == outside.parameters_after == pytest.approx(11.5e9, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_more_gpus_take_less_time_and_more_gpu_hours(name: str) -> None:
    recipe, started = recipe_for(name), time.process_time()
    plans = [make_plan(recipe, machine_of("h200", count)) for count in (1, 8, 64)]
    assert time.process_time() - started < 3 * 2
    one, eight, many = map(cluster_of, plans)
    assert one.hours > eight.hours > many.hours > 0
    assert one.gpu_hours < eight.gpu_hours < many.gpu_hours
    assert [timeline.num_nodes for timeline in (one, eight, many)] == [1, 1, 8]
    for timeline in (one, eight, many):
        assert timeline.gpu_hours == pytest.approx(timeline.hours * timeline.num_gpus)
        assert timeline.hours == pytest.approx(sum(stage.seconds for stage in timeline.stages) / 3600)
        for stage in timeline.stages:
            assert stage.seconds == max(stage.resources.values()) == stage.resources[stage.bound]
            assert 0 <= stage.busy <= 1 + 1e-9
    assert plans[0].network_bytes == one.stages[1].network_bytes == eight.stages[1].network_bytes == 0
    assert plans[2].network_bytes == many.stages[1].network_bytes > 0
    console = Console(record=True, width=200)
    plans[2].show(console)
    assert f"{many.gpu_hours:,.1f} GPU-hours" in console.export_text()
    assert json.loads(json.dumps(plans[2].to_dict()))["cluster"]["num_gpus"] == 64


def test_figures_of_deepseek_by_hand() -> None:
    plan = make_plan(recipe_for("DeepSeek-V3"), machine_of("h200", 64))
    worker, tokens = plan.memory_bytes["calibration worker"], 128 * 2048
    up, down = 4096 * (4096 + 256) // 2, 2048 * (2048 + 256) // 2  # packed: the smaller sides are 2 F and F
    grams = 4 * 256 * (3 * up + 2 * down + 7168)
    assert worker["statistics"] == pytest.approx(grams, rel=0.01)
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * (512 + 64) + 512 * 128 * 256 + 128 * 128 * 7168
    layer = 257 * 3 * 7168 * 2048 + 256 * 7168 + attention
    assert worker["resident layers"] == pytest.approx(2 * layer, rel=1e-4)
    assert plan.network_bytes == 2 * 60 * tokens * 7168 * 2
    calibrate, before = stage_of(plan, "calibrate"), plan.to_dict()["total"]["num_bytes"]
    assert calibrate.storage_bytes == before + plan.disk_bytes["statistics"]  # 61 layers stay with 64 workers
    assert calibrate.resources["storage"] == pytest.approx(calibrate.storage_bytes / 8 / 2.5e9)
    busy = sum(plan.seconds[f"calibrate: {part}"] for part in ("model", "statistics"))
    assert calibrate.resources["compute"] == pytest.approx(busy * 64 / 61 * (60 + 16) / 16)
    flops = plan.flops["calibrate: statistics"]
    assert plan.seconds["calibrate: statistics"] == pytest.approx(flops / (494e12 * 0.5) / 64)  # TF32, for bf16 inputs
    task = plan.memory_bytes["factorisation task"]
    at_once = {"up": 2**29 // (7168 * 7168), "down": 2**29 // (4096 * 2048)}  # experts of a block (methods/metric.py)
    assert task["arithmetic"] == 16 * max(at_once["up"] * 4096 * 7168, at_once["down"] * 7168 * 2048)
    assert stage_of(plan, "prepare").seconds == pytest.approx(before / 2.5e9)
    processes = 64 // 8  # micro-batches of the windows
    evaluate = stage_of(plan, "evaluate")
    assert evaluate.storage_bytes == processes * (before + plan.to_dict()["total"]["bytes_after"])


def test_few_micro_batches_and_little_memory_are_told() -> None:
    def warnings(**changes: object) -> list[str]:
        return cluster_of(make_plan(recipe_for("Kimi-K2-Instruct", **changes), machine_of("h100", 64))).warnings

    plain = warnings()
    assert any("16 micro-batches keep at most 16 of 64" in warning for warning in plain)
    assert any(warning.startswith("calibration worker: 103 GB are more than 90%") for warning in plain)
    fine = {"text": "text.txt", "batch_size": 2}
    assert not any("micro-batches" in warning for warning in warnings(calibration=fine))


def test_assumptions_change_what_they_are_about() -> None:
    recipe = recipe_for("Mixtral-8x7B-v0.1")

    def seconds(stage: str, resource: str, machine: Machine) -> float:
        return stage_of(make_plan(recipe, machine), stage).resources[resource]

    usual = machine_of("h100", 8)
    twice = machine_of("h100", 8, ["storage=5e9", "half=0.6", "single=1", "eigen=0.04"])
    for stage, resource in (("calibrate", "storage"), ("calibrate", "compute"), ("compress", "compute")):
        assert seconds(stage, resource, usual) == pytest.approx(2 * seconds(stage, resource, twice))
    spread = machine_of("h100", 8, ["node_gpus=1", "network=1e9"])
    assert spread.num_nodes == 8
    assert seconds("calibrate", "network", spread) > seconds("calibrate", "network", usual) == 0
    assert seconds("calibrate", "compute", machine_of("h200", 8)) == seconds("calibrate", "compute", usual)
    assert seconds("calibrate", "compute", machine_of("a100", 8)) > seconds("calibrate", "compute", usual)


@pytest.mark.parametrize(
    ("gpu", "assume", "reason"),
    [
        ("v100", [], "--gpu 'v100': not in the table; known: a100, h100"),
        ("h100", ["storag=1"], "--assume 'storag=1': not of the form name=value; the names are: node_gpus"),
        ("h100", ["storage"], "--assume 'storage': not of the form"),
        ("h100", ["storage=fast"], "'fast' is no number above 0; give one, such as 2.5e"),
        ("h100", ["node_gpus=0"], "'0' is no number above 0"),
        ("h100", ["network=inf"], "'inf' is no number above 0"),
        ("h100", ["disk=nan"], "'nan' is no number above 0"),
    ],
)
def test_unknown_machines_are_refused_in_a_line(gpu: str, assume: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason.replace("(", r"\(")) as refused:
        machine_of(gpu, 8, assume)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpus_of_a_cluster_are_planned_for_where_there_are_none() -> None:
    recipe = recipe_for("Mixtral-8x7B-v0.1", cluster={"address": "auto", "device": "cuda"})
    assert make_plan(recipe, machine_of("h100", 8)).problems == []
    with pytest.raises(RecipeError, match=r"cluster.device: 'cuda' is not to be had here; give --gpus and --gpu"):
        make_plan(recipe)


def test_more_workers_than_gpus_are_a_problem() -> None:
    recipe = recipe_for("Mixtral-8x7B-v0.1", cluster={"layer_workers": 16})
    plan = make_plan(recipe, machine_of("h100", 8))
    assert plan.num_workers == 8
    assert plan.problems == ["cluster.layer_workers: 16 workers need a GPU each and there are 8; lower it"]
    assert make_plan(recipe, machine_of("h100", 16)).problems == []


def test_the_command_prints_the_plan_and_then_what_a_job_refuses(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("command")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe_for("DeepSeek-V3").to_yaml())
    command = ["plan", str(recipe), "--gpus", "64", "--gpu", "b200", "--assume", "storage=1e10", "--json"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, RecipeError)
    assert str(done.exception).startswith("quantization_config.quant_method: 'fp8' with scales of blocks of 128 x 128")
    cluster = json.loads(done.stdout)["cluster"]
    assert (cluster["gpu"], cluster["num_gpus"], cluster["assumed"]["storage"]) == ("b200", 64, 1e10)
    (folder / "config.json").write_text((FOLDER / "Mixtral-8x7B-v0.1" / "config.json").read_text())
    done = CliRunner().invoke(app, ["plan", str(recipe), "--set", f"model={folder}", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["cluster"] is None


def test_peaks_are_ordered() -> None:
    for gpu in GPUS.values():
        assert gpu.half > gpu.tf32 > gpu.single


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 20))
def test_pipeline_by_playing_it_through(num_chunks: int, num_batches: int, num_workers: int) -> None:
    free = [0] * num_workers
    handed = [0] * num_batches
    for chunk in range(num_chunks):
        for batch in range(num_batches):
            worker = chunk % num_workers
            free[worker] = handed[batch] = max(free[worker], handed[batch]) + 1
    assert pipeline_units(num_chunks, num_batches, num_workers) == max(handed)

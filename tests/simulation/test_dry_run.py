"""The real stages over clusters that are not there: what they take, what they do again, and that they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_compress.errors import CompressionError, RecipeError
from moe_compress.plan import make_plan
from moe_compress.plan.machine import machine_of
from moe_compress.plan.timeline import pipeline_units
from moe_compress.recipe import Recipe
from moe_compress.simulation.clock import Faults
from moe_compress.simulation.costs import Cost, Costs
from moe_compress.simulation.job import DryRun, dry_run
from tests.plan.published_models import recipe_for

NUM_LAYERS = 12
TEXT = {"text": "text.txt", "num_sequences": 32, "sequence_length": 16, "batch_size": 4}
PRUNE = {"name": "prune", "ratio": 0.5}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of a small model of many layers."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 128, "num_hidden_layers": NUM_LAYERS}
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "bfloat16", **sizes, **experts}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recipe_on(model: Path, **changes: Any) -> Recipe:
    return recipe_for(str(model), **{"calibration": TEXT, "method": PRUNE, "evaluation": None, **changes})


def recorded(**changes: Any) -> Costs:
    """Steps that take seconds, and nothing to be read."""
    costs: dict[str, Any] = {
        "steps": {"forward": 1.0, "loss": 0.0, "backward": 2.0, "gradient": 2.0, "finish": 0.0, "merge": 0.0},
        "units": dict.fromkeys(("decompose_group", "factorise_group", "prune_layer", "evaluate_windows"), Cost(5.0)),
        "chunk_bytes": 0,
        "sums_bytes": 0,
        "root_bytes": 0,
        "working_bytes": 0,
        "start_s": 3.0,
    }
    return Costs(**costs | changes)


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 8, 16])
def test_the_scheduler_takes_as_long_as_the_pipeline_formula_says(small: Path, num_gpus: int) -> None:
    run = dry_run(recipe_on(small), machine_of("h100", num_gpus), costs=recorded())
    units = pipeline_units(NUM_LAYERS, 8, num_gpus)
    assert run.stages["calibrate"] == pytest.approx(3 * units + 3.0, rel=0.05)
    assert run.num_steps == NUM_LAYERS * 8 * 2 + 8 + NUM_LAYERS
    assert sum(run.busy) * run.seconds == pytest.approx(NUM_LAYERS * (8 * 3 + 5))
    assert run.num_units == NUM_LAYERS
    assert run.num_again == run.num_deaths == 0


def test_replicas_share_the_micro_batches(small: Path) -> None:
    one = dry_run(recipe_on(small), machine_of("h100", 16), costs=recorded())
    both = dry_run(recipe_on(small, cluster={"replicas": 2}), machine_of("h100", 16), costs=recorded())
    assert both.num_steps == one.num_steps + 2 * NUM_LAYERS  # twice finished, then merged
    assert both.stages["calibrate"] < one.stages["calibrate"]
    assert both.experts_kept == one.experts_kept == NUM_LAYERS * 4 * 3 * 64 * 32


def test_workers_hold_as_many_layers_as_fit(small: Path) -> None:
    machine = machine_of("h100", 4)
    run = dry_run(recipe_on(small, cluster={"resident_layers": "auto"}), machine, costs=recorded())
    whole = dry_run(recipe_on(small, cluster={"resident_layers": NUM_LAYERS // 4}), machine, costs=recorded())
    assert run.num_steps == whole.num_steps == 4 * 8 * 2 + 8 + 4
    assert run.stages["calibrate"] == whole.stages["calibrate"]


def test_bytes_are_counted_where_they_go(small: Path) -> None:
    def run(node_gpus: int, placement: str = "spread", **costs: Any) -> DryRun:
        machine = machine_of("h100", 4, [f"node_gpus={node_gpus}"])
        return dry_run(recipe_on(small, cluster={"placement": placement}), machine, costs=recorded(**costs))

    assert run(4).traffic.network == 0
    apart, packed = run(2).traffic.network, run(2, "pack").traffic.network
    value = 4 * 16 * 64 * 2
    assert apart == pytest.approx(2 * (NUM_LAYERS - 1) * 8 * value, rel=0.1)  # states forward, gradients back
    assert packed == pytest.approx(apart / 2, rel=0.2)  # the neighbour is on the same node every other time
    assert run(4, chunk_bytes=10).traffic.storage == 10 * (2 * NUM_LAYERS - 4)
    assert run(4, sums_bytes=7).traffic.storage == 7 * NUM_LAYERS
    held = run(4, chunk_bytes=10, sums_bytes=7, root_bytes=100, working_bytes=1000).traffic.device
    assert held == 1000 + 100 + 10 + 7
    assert run(4).traffic.values >= NUM_LAYERS * 8 * value


def test_flight_stays_under_the_limit(small: Path) -> None:
    value = 4 * 16 * 64 * 2
    tight = dry_run(
        recipe_on(small, cluster={"in_flight_gb": 4 * value / 2**30}), machine_of("h100", 8), costs=recorded()
    )
    free = dry_run(recipe_on(small), machine_of("h100", 8), costs=recorded())
    assert tight.traffic.in_flight <= 4 * value < free.traffic.in_flight
    assert tight.stages["calibrate"] > free.stages["calibrate"]


def test_reading_ahead_hides_reading(small: Path) -> None:
    """While a worker runs one chunk it reads its next; only the first chunks are waited for."""
    storage = 1_000_000
    machine = machine_of("h100", 2, [f"storage={storage}"])
    plain = dry_run(recipe_on(small), machine, costs=recorded())
    short = dry_run(recipe_on(small), machine, costs=recorded(chunk_bytes=storage))
    assert plain.stages["calibrate"] < short.stages["calibrate"] < plain.stages["calibrate"] + 6
    long = dry_run(recipe_on(small), machine, costs=recorded(chunk_bytes=100 * storage))
    assert long.stages["calibrate"] > (2 * NUM_LAYERS - 2) * 100  # two share the link


@pytest.mark.parametrize("seed", range(4))
def test_random_losses_end_well(small: Path, seed: int) -> None:
    recipe = recipe_on(small, method={"name": "d2moe", "ratio": 0.5}, cluster={"replicas": 1 + seed % 2})
    machine = machine_of("h100", 8, ["node_gpus=2"])
    calm = dry_run(recipe, machine, costs=recorded())
    faults = Faults(every_s=20.0, node_share=0.3, absent_s=60.0, seed=seed)
    run = dry_run(recipe, machine, faults, recorded())
    assert run.num_deaths > 0
    assert run.num_again > 0
    assert run.num_steps >= calm.num_steps
    assert run.num_units == calm.num_units
    assert run.seconds > calm.seconds
    assert run.experts_kept == calm.experts_kept


def test_the_same_seed_gives_the_same_run(small: Path) -> None:
    def run(seed: int) -> dict[str, Any]:
        found = dry_run(recipe_on(small), machine_of("h100", 4), Faults(every_s=30.0, seed=seed), recorded())
        return {key: value for key, value in found.to_dict().items() if key != "driver_s"}

    assert run(1) == run(1) != run(2)


def test_a_job_gives_up_when_all_dies_at_once(small: Path) -> None:
    costs = recorded(units={"prune_layer": Cost(1000.0)})
    with pytest.raises(CompressionError, match="its process died 4 times"):
        dry_run(recipe_on(small), machine_of("h100", 2), Faults(every_s=100.0, node_share=0.0), costs)


def test_methods_without_stand_ins_are_refused(small: Path) -> None:
    with pytest.raises(RecipeError, match=r"method.name: 'msmoe' has no dry run; give one of d2moe, prune"):
        dry_run(recipe_on(small, method={"name": "msmoe", "ratio": 0.5}), machine_of("h100", 2))


D2MOE = {"name": "d2moe", "ratio": 0.4}


@pytest.mark.parametrize(
    ("num_gpus", "method", "faults"),
    [(1, PRUNE, None), (8, PRUNE, None), (64, PRUNE, None), (64, D2MOE, Faults(every_s=60.0))],
)
def test_deepseek_on_a_cluster(num_gpus: int, method: dict[str, Any], faults: Faults | None) -> None:
    """61 layers of 256 experts: the real scheduler, budget and decision, at the plan's costs."""
    recipe, machine = recipe_for("DeepSeek-V3", method=method), machine_of("h200", num_gpus)
    run, plan = dry_run(recipe, machine, faults), make_plan(recipe, machine)
    assert plan.cluster is not None
    assert (run.num_layers, run.num_moe_layers, run.num_experts) == (61, 58, 256)
    assert run.num_steps >= 61 * 16 * 2 + 16 + 61
    assert run.num_units == 58 * (1 if method is PRUNE else 4) + min(8, num_gpus)
    assert sum(run.driver_s.values()) < 60
    assert run.traffic.device <= plan.cluster.device_bytes["calibration worker"] * 1.02
    planned = {stage.name: stage.seconds for stage in plan.cluster.stages}
    found = run.stages | {"compress": run.stages["allocate"] + run.stages["compress"]}
    for stage in ("calibrate", "compress", "evaluate"):
        assert found[stage] > 0.98 * planned[stage]  # the plan is a lower bound
    if faults is None:
        # workers that hold one chunk each read them one after the other, as the first micro-batch comes by
        assert found["calibrate"] < (1.2 if num_gpus <= 8 else 6) * planned["calibrate"]
        assert found["evaluate"] < 1.8 * planned["evaluate"]  # a process reads, then computes
    else:
        assert run.traffic.num_lost > 0
        assert run.num_again > 0

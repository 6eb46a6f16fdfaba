"""Sequential jobs: the statistics of the second pass are those of the original's layers above compressed ones."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from moe_compress.calibration.statistics import LayerStatistics
from moe_compress.calibration.text import TokenBatch
from moe_compress.calibration.worker import statistics_path
from moe_compress.checkpoint.manifest import Manifest
from moe_compress.errors import RecipeError
from moe_compress.executor import InProcess
from moe_compress.job import Job
from moe_compress.model.discovery import MoELayer, find_moe_layers
from moe_compress.model.observer import ExpertObserver
from moe_compress.model.streamer import model_inputs, summed_nll
from moe_compress.pipeline import compress
from moe_compress.plan import make_plan
from moe_compress.progress import Reporter
from moe_compress.recipe import Recipe, parse_recipe
from moe_compress.report.tables import show_job
from moe_compress.stages.prepare import check, prepare
from tests.cluster_cases import finish, hashes, start, write_recipe
from tests.conftest import Checkpoint
from tests.switch_models import random_switch, save_switch
from tests.tiny_models import auto_class

Sums = dict[str, Tensor]
RecipeFor = Callable[..., Recipe]


class Stopped(Exception):
    """What a job is stopped by."""


class StoppedAfter(InProcess):
    """Runs so many calls and then stops."""

    def __init__(self, calls_left: int) -> None:
        super().__init__(1)
        self.calls_left = calls_left

    def results(self, refs: list[Any]) -> Iterator[tuple[int, Any]]:
        for result in super().results(refs):
            if self.calls_left == 0:
                raise Stopped
            self.calls_left -= 1
            yield result


@dataclass
class Done:
    """A finished sequential job.

    Attributes:
        recipe: of it.
        tokens: the calibration text.
        first, second: folders of the statistics.
        below: the checkpoint of the first pass.
    """

    recipe: Recipe
    tokens: TokenBatch
    first: Path
    second: Path
    below: Path


def run(recipe: Recipe, executor: InProcess | None = None) -> Done:
    job = Job(recipe)
    with job.locked():
        prepared = prepare(job, *check(recipe))
        compress(job, prepared, executor or InProcess(1), Reporter(job, Console(quiet=True)))
    second = max({*job.folder.glob("statistics-*")} - {prepared.statistics}, key=lambda path: path.stat().st_mtime_ns)
    below = max(job.folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
    return Done(recipe, TokenBatch.load(prepared.calibration_tokens), prepared.statistics, second, below)


@pytest.fixture
def recipe_for(tiny: Checkpoint, text_file: Path, tmp_path: Path) -> RecipeFor:
    """`recipe_for(model_type, **method)`: a sequential job without evaluation, in-process."""

    def make(model_type: str, output: str = "small", job: str | None = None, **method: Any) -> Recipe:
        return parse_recipe(
            {
                "model": str(tiny(model_type)),
                "output": str(tmp_path / output),
                "job_dir": str(tmp_path / (job or f"{output}.job")),
                "calibration": {"text": str(text_file), "num_sequences": 4, "sequence_length": 16, "batch_size": 2},
                "method": {"name": "d2moe", "sequential": True, **method},
                "cluster": {"local": True},
            }
        )

    return make


def assert_same_sums(found: Sums, wanted: Sums) -> None:
    """Up to what the order of fp32 operations changes."""
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.abs().max()), msg=name)


def load(layers: list[MoELayer], folder: Path) -> dict[str, Sums]:
    return {layer.path: LayerStatistics.load(layer, statistics_path(folder, layer.path)).tensors for layer in layers}


def mixed(own: Callable[..., Tensor], other: nn.Module) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = own(hidden, *args, **kwargs)
        with torch.no_grad():
            shift = other(hidden, *args, **kwargs) - out
        return out + shift

    return forward


def brute_force(done: Done, model_type: str) -> tuple[list[MoELayer], dict[str, Sums]]:
    """Statistics of the whole original, each layer of which hands up what its compressed counterpart makes."""
    original: Any = auto_class(model_type).from_pretrained(done.recipe.model).eval()
    compressed: Any = auto_class(model_type).from_pretrained(done.below).eval()
    layers = find_moe_layers(original)
    for own, other in zip(original.model.layers, compressed.model.layers, strict=True):
        own.forward = mixed(own.forward, other)
    sums = {layer.path: LayerStatistics(layer, full=False) for layer in layers}
    for batch in done.tokens.batches(done.recipe.calibration.batch_size):
        inputs = model_inputs(batch.input_ids, batch.attention_mask)
        observers = [
            ExpertObserver(
                layer, original.get_submodule(layer.path), original.get_submodule(layer.path.rpartition(".")[0])
            )
            for layer in layers
        ]
        with ExitStack() as stack:
            for observer in observers:
                stack.enter_context(observer.watching())
            summed_nll(original(use_cache=False, **inputs).logits, inputs).backward()
        for observer in observers:
            seen = observer.take(batch.attention_mask.flatten())
            assert seen is not None
            sums[observer.layer.path].update(seen, *batch.input_ids.shape)
    return layers, {path: found.tensors for path, found in sums.items()}


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_the_original_is_observed_above_compressed_layers(model_type: str, recipe_for: RecipeFor) -> None:
    done = run(recipe_for(model_type, ratio=0.6))
    layers, wanted = brute_force(done, model_type)
    first, second = load(layers, done.first), load(layers, done.second)
    assert len(layers) > 1
    for path, sums in wanted.items():
        assert_same_sums(second[path], sums)
    lowest, *others = (layer.path for layer in layers)
    for name in ("num_tokens", "input_sum", "router_gram", "up_input_gram"):  # its inputs are the same
        assert torch.equal(first[lowest][name], second[lowest][name])
    assert not torch.allclose(first[lowest]["up_input_loss_gram"], second[lowest]["up_input_loss_gram"], rtol=1e-2)
    for path in others:
        assert not torch.allclose(first[path]["input_sum"], second[path]["input_sum"], rtol=1e-2)


def test_where_nothing_is_lost_the_second_pass_sees_what_the_first_did(recipe_for: RecipeFor) -> None:
    done = run(recipe_for("mixtral", ranks="full"))
    layers = check(done.recipe)[2]
    second = load(layers, done.second)
    for path, sums in load(layers, done.first).items():
        assert_same_sums(second[path], sums)


def test_the_first_pass_is_the_job_that_is_not_sequential(recipe_for: RecipeFor) -> None:
    done = run(recipe_for("mixtral", ratio=0.6))
    with_both = Manifest.load(done.recipe.output_path)
    plain = recipe_for("mixtral", "plain", ratio=0.6, sequential=False)
    job = Job(plain)
    with job.locked():
        compress(job, prepare(job, *check(plain)), InProcess(1), Reporter(job, Console(quiet=True)))
    assert hashes(done.below) == hashes(plain.output_path)
    assert with_both.recipe["method"]["sequential"]
    assert with_both.layers != Manifest.load(plain.output_path).layers
    assert with_both.parameters == pytest.approx(Manifest.load(plain.output_path).parameters, rel=0.01)


def test_stopped_anywhere_it_ends_with_the_same_bytes(recipe_for: RecipeFor) -> None:
    counting = StoppedAfter(-1)
    wanted = hashes(run(recipe_for("mixtral", "undisturbed", ratio=0.6), counting).recipe.output_path)
    num_calls = -1 - counting.calls_left
    for moment in range(1, 6):
        recipe = recipe_for("mixtral", f"stopped-{moment}", ratio=0.6)
        with pytest.raises(Stopped):
            run(recipe, StoppedAfter(num_calls * moment // 6))
        assert not recipe.output_path.exists()
        assert hashes(run(recipe).recipe.output_path) == wanted


def test_ratios_share_the_first_calibration_and_nothing_else(recipe_for: RecipeFor) -> None:
    outputs = [recipe_for("mixtral", f"shared-{ratio}", "shared.job", ratio=ratio) for ratio in (0.6, 0.3)]
    done = [run(recipe) for recipe in outputs]
    assert done[0].first == done[1].first
    assert len({done[0].first, *(each.second for each in done)}) == 3
    alone = run(recipe_for("mixtral", "alone", ratio=0.3))
    assert hashes(alone.recipe.output_path) == hashes(outputs[1].output_path)


def test_a_finished_first_pass_is_not_made_again(recipe_for: RecipeFor) -> None:
    recipe = recipe_for("mixtral", ratio=0.6)
    run(recipe)
    job = Job(recipe)
    with job.locked():
        reporter = Reporter(job, Console(quiet=True))
        compress(job, prepare(job, *check(recipe)), InProcess(1), reporter)
    assert [*reporter.stages] == ["allocate again", "compress again", "assemble again"]


def test_stages_of_both_passes_are_told_apart(recipe_for: RecipeFor) -> None:
    recipe = recipe_for("mixtral", ratio=0.6)
    run(recipe)
    console = Console(file=io.StringIO(), record=True, width=120)
    show_job(recipe.job_path, console)
    lines = [line.strip(" │").partition("│")[0].strip() for line in console.export_text().splitlines()]
    stages = ["calibrate", "allocate", "compress", "assemble"]
    assert [line for line in lines if line.partition(" ")[0] in stages] == stages + [f"{name} again" for name in stages]


@pytest.mark.parametrize("model_type", ["zaya", "hy_v4"])
def test_layers_that_hand_on_more_than_hidden_states_are_refused(model_type: str, recipe_for: RecipeFor) -> None:
    recipe = recipe_for(model_type, ratio=0.4)
    with pytest.raises(RecipeError, match=r"^method.sequential: true .*; leave sequential out$"):
        run(recipe)
    assert not [*recipe.job_path.glob("statistics-*/*")]


def test_encoder_decoder_models_are_refused_before_work_starts(recipe_for: RecipeFor, tmp_path: Path) -> None:
    save_switch(random_switch(), tmp_path / "switch")
    recipe = recipe_for("mixtral", ratio=0.4)
    recipe = recipe.model_copy(update={"model": str(tmp_path / "switch")})
    for look in (check, make_plan):
        with pytest.raises(RecipeError, match=r"^method.sequential: true .*; leave sequential out$"):
            look(recipe)


def test_other_methods_have_no_such_option(recipe_for: RecipeFor) -> None:
    with pytest.raises(RecipeError, match=r"^method\.sequential: unknown key"):
        recipe_for("mixtral", name="msmoe", ratio=0.5)


def test_the_plan_counts_both_passes(recipe_for: RecipeFor) -> None:
    plain = make_plan(recipe_for("mixtral", ratio=0.4, sequential=False))
    both = make_plan(recipe_for("mixtral", ratio=0.4))
    for stage, count in plain.flops.items():
        assert both.flops[stage] == (count if stage == "evaluate" else 2 * count)
    assert both.disk_bytes["statistics"] == 2 * plain.disk_bytes["statistics"]
    assert both.disk_bytes["spectra"] == 2 * plain.disk_bytes["spectra"]
    assert (plain.disk_bytes["first pass"], both.disk_bytes["first pass"]) == (0, plain.disk_bytes["output"])
    assert both.memory_bytes == plain.memory_bytes


@pytest.mark.slow
def test_ray_gives_the_bytes_of_the_library(tmp_path: Path, tiny: Checkpoint, text_file: Path) -> None:
    for name, cluster in {"here": {"local": True}, "ray": {"layer_workers": 2}}.items():
        output = tmp_path / name
        recipe = write_recipe(tmp_path / f"{name}.yaml", tiny("mixtral"), text_file, output, cluster, sequential=True)
        code, errors = finish(start(recipe))
        assert code == 0, errors
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "here")

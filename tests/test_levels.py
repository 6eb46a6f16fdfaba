"""One checkpoint, several levels: each reads its own bytes and is the checkpoint that its ratio alone would give."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from jobs import cli
from moe_compress.budget import DENSE, Item, allocate, allocate_levels, parameters
from moe_compress.checkpoint import CheckpointReader, Manifest, TensorEntry, read_shard, verify
from moe_compress.errors import CheckpointError, RecipeError
from moe_compress.materialize import materialize_checkpoint
from moe_compress.model.experts import FactorisedExperts
from moe_compress.model.levels import join_rows, piece_position, pieces_of, split_rows
from moe_compress.model.plugin import MoECompressConfig
from moe_compress.model.skeleton import Skeleton
from moe_compress.recipe import parse_recipe
from tests.conftest import Checkpoint, Compress
from tests.model.handmade import load, logits_of

LEVELS = ["0.4", "0.5", "0.7"]

# --- ranks ---------------------------------------------------------------------------------------------------


@st.composite
def some_items(draw: st.DrawFn) -> list[Item]:
    """Shapes of all proportions; energies with zeros, ties, and anything from flat to steep."""
    items = []
    for rows, columns in draw(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=5)):
        rank = min(rows, columns)
        energy = draw(st.lists(st.sampled_from([0, 0.25, 1, 1.5, 2, 8, 100]), min_size=rank, max_size=rank))
        items.append(Item(rows, columns, np.array(sorted(energy, reverse=True), np.float32)))
    return items


budgets_of = st.lists(st.integers(0, 320), min_size=2, max_size=4).map(lambda each: sorted(each, reverse=True))


def spent(items: list[Item], ranks: list[int]) -> int:
    return sum(parameters(item, rank) for item, rank in zip(items, ranks, strict=True))


@settings(deadline=None)
@given(some_items(), budgets_of)
def test_ranks_of_a_smaller_budget_are_prefixes(items: list[Item], budgets: list[int]) -> None:
    levels = allocate_levels(items, budgets)
    for ranks, budget in zip(levels, budgets, strict=True):
        assert spent(items, ranks) <= budget
        assert all(rank < len(item.energy) for item, rank in zip(items, ranks, strict=True))
    for larger, smaller in pairwise(levels):
        for more, less in zip(larger, smaller, strict=True):
            assert (more == DENSE) == (less == DENSE)
            assert more >= less


@settings(deadline=None)
@given(some_items(), budgets_of)
def test_a_level_leaves_less_than_a_step_unspent(items: list[Item], budgets: list[int]) -> None:
    for ranks, budget in zip(allocate_levels(items, budgets), budgets, strict=True):
        open_ = [i for i, rank in zip(items, ranks, strict=True) if rank != DENSE and rank < len(i.energy) - 1]
        if open_:
            assert budget - spent(items, ranks) < max(item.num_rows + item.num_columns for item in open_)


@settings(deadline=None)
@given(some_items(), st.integers(0, 320))
def test_the_smallest_level_is_what_its_budget_buys_alone(items: list[Item], budget: int) -> None:
    alone, (_, smallest) = allocate(items, budget), allocate_levels(items, [400, budget])
    for ours, theirs in zip(smallest, alone, strict=True):
        assert ours != DENSE or theirs == DENSE  # alone, what is left over may make another one whole


def test_what_only_a_larger_budget_keeps_whole_stays_in_factors() -> None:
    steep, flat = (Item(4, 4, np.array(energy, np.float32)) for energy in ([9, 3, 0, 0], [1, 1, 1, 1]))
    assert allocate([steep, flat], 24) == [DENSE, 0]
    assert allocate_levels([steep, flat], [24, 8]) == [[2, 1], [1, 0]]
    assert allocate_levels([steep, flat], [24, 16]) == [[DENSE, 1], [DENSE, 0]]


# --- pieces --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(DENSE, 5), min_size=3, max_size=3), min_size=3, max_size=3))
def test_the_first_pieces_are_the_prefixes_of_every_expert(columns: list[list[int]]) -> None:
    by_expert = [[DENSE] * 3 if DENSE in ranks else sorted(ranks, reverse=True) for ranks in columns]
    levels = [list(ranks) for ranks in zip(*by_expert, strict=True)]  # the largest first
    rows = [[(expert, row) for expert, rank in enumerate(ranks) for row in range(rank)] for ranks in levels]
    packed = torch.tensor(rows[0]).reshape(-1, 2)
    pieces = pieces_of(levels)
    parts = split_rows(packed, pieces)
    assert torch.cat(parts).shape == packed.shape
    for number, expected in enumerate(reversed(rows), 1):
        assert join_rows(parts[:number], pieces[:number]).tolist() == [list(row) for row in expected]


# --- checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "granitemoe"])
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(model_type: str, compressed: Compress) -> Path:
    return compressed(model_type, ratio=0.4, levels=[0.5, 0.7])


@pytest.fixture(scope="module")
def mixtral(compressed: Compress) -> Path:
    return compressed("mixtral", ratio=0.4, levels=[0.5, 0.7])


def factorised(model: Any) -> dict[str, FactorisedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorisedExperts)}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_a_level_is_the_checkpoint_of_its_ratio(folder: Path, model_type: str, compressed: Compress) -> None:
    model = load(model_type, folder, trim="0.5")
    other = load(model_type, compressed(model_type, ratio=0.5, levels=[0.7]))  # the same experts are whole
    assert model.config.quantization_config.layers == other.config.quantization_config.layers
    assert relative_error(logits_of(model), logits_of(other)) < 1e-6


@pytest.mark.parametrize("level", LEVELS)
def test_with_uniform_ranks_too(level: str, compressed: Compress) -> None:
    leveled = compressed("mixtral", ranks="uniform", ratio=0.4, levels=[0.5, 0.7])
    model = load("mixtral", leveled, trim=level)
    other = load("mixtral", compressed("mixtral", ranks="uniform", ratio=float(level)))
    assert model.config.quantization_config.layers == other.config.quantization_config.layers
    assert relative_error(logits_of(model), logits_of(other)) < 1e-6


def test_ranks_by_frequency_are_nested_too(compressed: Compress) -> None:
    leveled = compressed("mixtral", ranks="frequency", ratio=0.4, levels=[0.5, 0.7])
    ranks = [
        [
            rank
            for module in factorised(load("mixtral", leveled, trim=level)).values()
            for s in module.slots
            for rank in s.ranks
        ]
        for level in LEVELS
    ]
    assert all(more >= less for pair in pairwise(ranks) for more, less in zip(*pair, strict=True))
    assert ranks[0] != ranks[-1]


def test_what_is_loaded_is_what_the_manifest_says(folder: Path, model_type: str) -> None:
    records = Manifest.load(folder).levels
    assert sorted(records, key=lambda name: -records[name].bytes) == LEVELS
    for name in LEVELS:
        model = load(model_type, folder, trim=name)
        stored = {t.data_ptr(): t for t in model.state_dict().values() if t.numel()}
        assert sum(tensor.untyped_storage().nbytes() for tensor in stored.values()) == records[name].bytes
        assert sum(tensor.numel() for tensor in stored.values()) == records[name].parameters
    assert records["0.4"].bytes == CheckpointReader(folder).total_bytes


def test_streaming_reads_the_bytes_of_its_level(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = TensorEntry.read
    counted: list[int] = []

    def counting(entry: TensorEntry) -> Tensor:
        counted.append(entry.num_bytes)
        return read(entry)

    monkeypatch.setattr(TensorEntry, "read", counting)
    for name, record in Manifest.load(mixtral).levels.items():
        skeleton = Skeleton(CheckpointReader(mixtral), level=name)
        counted.clear()
        skeleton.load_root()
        for layer in skeleton.layers:
            skeleton.load(layer)
        assert sum(counted) == record.bytes
        whole = load("mixtral", mixtral, trim=name).state_dict()
        assert all(torch.equal(tensor, whole[key]) for key, tensor in skeleton.model.state_dict().items())


def test_what_a_level_reads_lies_together(mixtral: Path) -> None:
    shards = [read_shard(path) for path in mixtral.glob("*.safetensors")]
    positions = [[piece_position(name) for name, entry in shard.items() if entry.num_bytes] for shard in shards]
    assert sum(max(each) == len(LEVELS) - 1 for each in positions) > 1
    assert all(each == sorted(each) for each in positions)


def test_both_ways_to_ask_and_none(mixtral: Path) -> None:
    by_keyword = load("mixtral", mixtral, trim=0.7)
    with pytest.warns(UserWarning, match=r"loading attributes \(e\.g\. \['trim'\]\)"):
        by_config = load("mixtral", mixtral, quantization_config=MoECompressConfig(trim="0.7"))
    assert torch.equal(logits_of(by_keyword), logits_of(by_config))
    assert factorised(load("mixtral", mixtral)).keys() == factorised(by_config).keys()
    whole = load("mixtral", mixtral)
    assert sum(p.numel() for p in whole.parameters()) == Manifest.load(mixtral).levels["0.4"].parameters
    base = AutoModel.from_pretrained(mixtral, trim="0.7")
    assert torch.equal(base.state_dict()["layers.0.mlp.experts.down_v"], by_config.model.layers[0].mlp.experts.down_v)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_saved_is_an_ordinary_checkpoint_of_the_level(
    level: str, folder: Path, model_type: str, tmp_path: Path
) -> None:
    model = load(model_type, folder, trim=level)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "trim" not in config
    assert "levels" not in json.dumps(config)
    assert not any("_level" in name for name in CheckpointReader(tmp_path).entries)
    again = load(model_type, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_an_expert_without_a_rank_falls_back_to_the_base(compressed: Compress) -> None:
    small = load("mixtral", compressed("mixtral", base="fisher", ratio=0.3, levels=[0.6, 0.74]), trim="0.74")
    experts = next(iter(factorised(small).values()))
    weights = experts.dense_weights()
    trimmed = [(slot.name, expert) for slot in experts.slots for expert, rank in enumerate(slot.ranks) if rank == 0]
    assert trimmed
    assert all(torch.equal(weights[name][expert], getattr(experts, f"{name}_base")[0]) for name, expert in trimmed)
    assert logits_of(small).isfinite().all()


def test_without_the_plugin_no_level_loads(mixtral: Path) -> None:
    code = "from transformers import AutoModelForCausalLM as A; import sys; A.from_pretrained(sys.argv[1], trim='0.7')"
    done = subprocess.run([sys.executable, "-c", code, str(mixtral)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "mismatch" in done.stderr


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"ratio": 0.4, "levels": [0.4]}, r"method\.levels: \[0\.4\] must rise, all above ratio 0\.4"),
        ({"ratio": 0.2, "levels": [0.5, 0.3]}, r"method\.levels: \[0\.5, 0\.3\] must rise"),
        ({"ratio": 0.2, "levels": [1.5]}, r"method\.levels\.0: 1\.5 is not valid"),
        ({"ranks": "full", "levels": [0.5]}, r"method\.levels: \[0\.5\] are prefixes of what a ratio keeps"),
    ],
)
def test_levels_that_cannot_be(method: dict[str, Any], reason: str) -> None:
    recipe = {"model": "m", "output": "o", "calibration": {"text": "t"}, "method": {"name": "d2moe", **method}}
    with pytest.raises(RecipeError, match=reason) as caught:
        parse_recipe(recipe)
    assert "\n" not in str(caught.value)


def test_a_level_that_bases_leave_nothing_of(compressed: Compress, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"0\.9 is more than the shared bases of the experts leave"):
        compressed("mixtral", base="fisher", ratio=0.3, levels=[0.9])


def test_a_level_that_is_not_there(mixtral: Path, tiny: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"level '0\.6': .* it has 0\.4, 0\.5, 0\.7$"):
        AutoModelForCausalLM.from_pretrained(mixtral, trim="0.6")
    with pytest.raises(CheckpointError, match=r"level '0\.6': .* it has 0\.4, 0\.5, 0\.7$"):
        Skeleton(CheckpointReader(mixtral), level="0.6")
    with pytest.raises(CheckpointError, match="has none, so leave it out"):
        Skeleton(CheckpointReader(tiny("mixtral")), level="0.6")


# --- commands ------------------------------------------------------------------------------------------------


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moe-compress", *map(str, arguments)])
        cli.main()


def evaluated(job_dir: Path) -> dict[Path, int]:
    """The evaluations in a job folder, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in job_dir.glob("evaluation-*.parquet")}


def test_a_job_measures_its_levels(
    tiny: Checkpoint, text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "model": str(tiny("mixtral")),
        "output": str(tmp_path / "small"),
        "calibration": {"text": str(text_file), "num_sequences": 4, "sequence_length": 16},
        "method": {"name": "d2moe", "ratio": 0.4, "levels": [0.5, 0.7]},
        "evaluation": {"text": str(text_file), "sequence_length": 16},
        "cluster": {"local": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run("compress", tmp_path / "recipe.yaml")
    shown = capfd.readouterr().out
    scores = json.loads((tmp_path / "small.job" / "evaluation.json").read_text())
    assert list(scores["levels"]) == LEVELS
    assert scores["levels"]["0.4"].items() <= scores.items()
    assert scores["levels"]["0.7"]["kl"] > scores["levels"]["0.4"]["kl"]
    records = Manifest.load(tmp_path / "small").levels
    for name in LEVELS:
        assert records[name].perplexity == scores["levels"][name]["perplexity"]
        assert f"{records[name].perplexity:.3f}" in shown
    assert verify(tmp_path / "small") == []

    files = [tmp_path / "small" / "moe_compress.json", tmp_path / "small.job" / "evaluation.json"]
    before = [path.read_bytes() for path in files]
    stamps = evaluated(tmp_path / "small.job")
    run("compress", tmp_path / "recipe.yaml")
    assert [path.read_bytes() for path in files] == before
    assert len(stamps) == len(LEVELS)
    assert evaluated(tmp_path / "small.job") == stamps
    capfd.readouterr()

    run("inspect", tmp_path / "small")
    assert f"{records['0.7'].perplexity:.3f}" in capfd.readouterr().out
    arguments = ("--text", text_file, "--sequence-length", 16, "--against", tiny("mixtral"))
    run("evaluate", tmp_path / "small", *arguments, "--level", "0.7")
    assert json.loads(capfd.readouterr().out) == pytest.approx(scores["levels"]["0.7"])
    with pytest.raises(SystemExit) as stopped:
        run("evaluate", tmp_path / "small", *arguments, "--level", "0.6")
    assert stopped.value.code == 2
    assert "it has 0.4, 0.5, 0.7" in capfd.readouterr().err


@pytest.mark.parametrize("level", [None, "0.7"])
def test_materialize_writes_the_experts_of_a_level(level: str | None, mixtral: Path, tmp_path: Path) -> None:
    materialize_checkpoint(mixtral, tmp_path / "dense", level)
    assert not any("_level" in name for name in CheckpointReader(tmp_path / "dense").entries)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"trim", "quantization_config"} & config.keys()
    found, expected = load("mixtral", tmp_path / "dense"), load("mixtral", mixtral, trim=level or "0.4")
    torch.testing.assert_close(logits_of(found), logits_of(expected), atol=1e-5, rtol=1e-5)

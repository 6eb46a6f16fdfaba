"""Models that are planned without shards: from config.json alone, and from what a job could not read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_compress.errors import CheckpointError
from moe_compress.plan import Plan, make_plan
from moe_compress.plan.sizes import OUTSIDE
from tests.conftest import Checkpoint
from tests.plan.published_models import FOLDER, recipe_for
from tests.test_plan import MIXTRAL, write_layout

TYPES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "olmoe"]


def plan_of(model: Path) -> Plan:
    return make_plan(recipe_for(str(model), evaluation=None))


def without_weights(model: Path, target: Path) -> Path:
    target.mkdir()
    shutil.copy(model / "config.json", target)
    return target


@pytest.mark.parametrize("model_type", TYPES)
def test_config_alone_tells_what_the_checkpoint_does(model_type: str, tiny: Checkpoint, tmp_path: Path) -> None:
    model = tiny(model_type)
    whole, alone = plan_of(model), plan_of(without_weights(model, tmp_path / "alone"))
    # what its config says of further tokens, the tiny checkpoint has no tensors for
    assert [part for part in alone.parts if part.name != OUTSIDE] == whole.parts
    assert (alone.slots, alone.flops, alone.problems) == (whole.slots, whole.flops, [])


def test_the_index_is_used_where_it_is_there(tmp_path: Path) -> None:
    extra = 10**9
    model = write_layout(tmp_path / "model", MIXTRAL, 93_405_585_408 + extra)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["mtp.weight"] = "model-1.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert plan_of(model).parts[-1].num_bytes == pytest.approx(extra, rel=0.01)
    del index["weight_map"]["lm_head.weight"]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"no tensor for 'lm_head.weight'"):
        plan_of(model)


def test_a_quantised_checkpoint_is_planned_as_what_it_was_made_from(tiny: Checkpoint, tmp_path: Path) -> None:
    model = tiny("deepseek_v3")
    quantised = tmp_path / "quantised"
    shutil.copytree(model, quantised)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (quantised / "config.json").write_text(json.dumps(config))
    plan = plan_of(quantised)
    (problem,) = plan.problems
    assert problem.startswith("quantization_config.quant_method: 'fp8' with scales of blocks of 128 x 128 is not read")
    assert [part for part in plan.parts if part.name != OUTSIDE] == plan_of(model).parts


def test_a_type_known_by_another_name_is_a_problem(tmp_path: Path) -> None:
    config = json.loads((FOLDER / "Kimi-K2-Instruct" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plan_of(tmp_path)
    assert (plan.model_type, plan.num_experts, plan.top_k) == ("deepseek_v3", 384, 8)
    (problem,) = plan.problems
    assert problem.startswith("model_type: 'kimi_k2' is not one of transformers'")
    config["architectures"] = ["NobodyKnows"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json is not usable"):
        plan_of(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_config_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        plan_of(tmp_path)


def test_pickled_weights_are_refused_as_ever(tiny: Checkpoint, tmp_path: Path) -> None:
    model = without_weights(tiny("mixtral"), tmp_path / "pickled")
    (model / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled"):
        plan_of(model)

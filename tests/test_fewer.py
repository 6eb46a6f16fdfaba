"""The methods that keep fewer experts, on every model type: merged, merged and factorised, pruned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console

from moe_compress.checkpoint.manifest import Manifest
from moe_compress.errors import CheckpointError, RecipeError
from moe_compress.model.merged import MappedExperts
from moe_compress.report.layers import show_layers
from tests.conftest import Checkpoint, Compress
from tests.test_breadth import REFUSED, load, stored_bytes
from tests.tiny_models import Unbuildable, auto_class, contract_types, expert_modules, token_ids

MERGED: dict[str, Any] = {"name": "msmoe", "ratio": 0.5}
SPARSE: dict[str, Any] = {"name": "mcsmoe", "ratio": 0.6}
PRUNED: dict[str, Any] = {"name": "prune", "ratio": 0.5}

KEEPS_ROUTER = {"deepseek_v4", "dots3_note", "inkling_mm_model", "inkling_text", "zaya"}
"""Types whose router cannot be made shorter: tables of expert ids, or experts that no one config field counts."""

STOCK = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("model_type", contract_types())
def test_every_type(model_type: str, tiny: Checkpoint, compressed: Compress, tmp_path: Path) -> None:
    try:
        original = tiny(model_type)
    except Unbuildable as error:
        pytest.skip(error.reason)
    if model_type in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[model_type]):
            compressed(model_type, **MERGED)
        return
    for number, method in enumerate((MERGED, SPARSE, PRUNED)):
        if method is PRUNED and model_type in KEEPS_ROUTER:
            with pytest.raises(RecipeError, match=r"method\.(router|ratio)"):
                compressed(model_type, **method)
            continue
        folder = compressed(model_type, **method)
        model, logits = load(model_type, folder)
        assert bool(logits.isfinite().all())
        counts = Manifest.load(folder).parameters
        removed = counts["experts_original"] - counts["experts_compressed"]
        assert removed >= 0.49 * counts["experts_original"]
        assert stored_bytes(original) - stored_bytes(folder) >= 0.95 * removed * torch.float32.itemsize
        assert model.generate(input_ids=token_ids(), max_new_tokens=2, min_new_tokens=2, do_sample=False).shape[1] == 11
        model.save_pretrained(tmp_path / str(number))
        again, logits_again = load(model_type, tmp_path / str(number))
        state, state_again = model.state_dict(), again.state_dict()
        assert state.keys() == state_again.keys()
        assert all(torch.equal(state[name], state_again[name]) for name in state)
        torch.testing.assert_close(logits_again, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
def test_merged_experts_are_few_and_mapped(model_type: str, tiny: Checkpoint, compressed: Compress) -> None:
    folder = compressed(model_type, **MERGED)
    model, logits = load(model_type, folder)
    stock, _ = load(model_type, tiny(model_type))
    manifest = Manifest.load(folder)
    assert sum(each["num_experts"] for each in manifest.layers.values()) < sum(
        experts.num_experts for experts in expert_modules(stock)
    )
    for path, said in manifest.layers.items():
        experts, template = model.get_submodule(path), stock.get_submodule(path)
        assert isinstance(experts, MappedExperts)
        assert len(experts.down_proj) == said["num_experts"] == len(set(said["leader_of"]))
        # the map equals experts that are stored over and over
        with torch.no_grad():
            for name, parameter in template.named_parameters(recurse=False):
                parameter.copy_(getattr(experts, name)[experts.expert_map])
    torch.testing.assert_close(stock(input_ids=token_ids()).logits, logits, atol=2e-5, rtol=1e-4)


def test_stock_checkpoints_need_nothing_of_ours(compressed: Compress, tmp_path: Path) -> None:
    methods = {"merged": MERGED | {"counts": "uniform", "router": "shrink"}, "pruned": PRUNED}
    folders = [(model_type, compressed(model_type, **m)) for model_type in STOCK for m in methods.values()]
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
out = {}
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(3, 27).view(2, 12)
    out[folder] = model(input_ids=ids).logits.detach()
assert not any(name.startswith("moe_compress") for name in sys.modules)
save_file(out, sys.argv[1])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "logits"), *(str(folder) for _, folder in folders)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    from safetensors.torch import load_file

    theirs = load_file(tmp_path / "logits")
    ids = torch.arange(3, 27).view(2, 12)
    for model_type, folder in folders:
        with torch.no_grad():
            ours = auto_class(model_type).from_pretrained(folder)(input_ids=ids).logits
        torch.testing.assert_close(theirs[str(folder)], ours, atol=1e-5, rtol=0)
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_without_the_plugin_other_forms_do_not_load(compressed: Compress) -> None:
    methods = (MERGED, SPARSE, PRUNED | {"counts": "adaptive", "router": "slice", "ratio": 0.3})
    folders = [str(compressed(model_type, **m)) for model_type in ("mixtral", "gpt_oss") for m in methods]
    script = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("loaded", folder)
    except (RuntimeError, ValueError) as error:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused"] * len(folders)


def test_what_merging_did_is_told(compressed: Compress, capsys: pytest.CaptureFixture[str]) -> None:
    folder = compressed("phimoe", **MERGED | {"ratio": 0.4})  # by no other test: the tables are of the last job
    job = folder.parent / "phimoe.job"
    merges, routing = (pq.read_table(job / name).to_pydict() for name in ("merges.parquet", "routing.parquet"))
    said = Manifest.load(folder).layers
    assert [(p, e, said[p]["leader_of"][e]) for p, e in zip(merges["layer"], merges["expert"], strict=True)] == list(
        zip(merges["layer"], merges["expert"], merges["leader"], strict=True)
    )
    gain = zip(merges["distance_before"], merges["distance_after"], strict=True)
    assert all(0 < after < before for before, after in gain)
    assert all(0 < error < 2 for error in merges["merge_error"])
    assert all(0 <= cka <= 1 for cka in merges["cka"])
    assert sum(routing["frequency"]) == pytest.approx(len(set(routing["layer"])))
    show_layers(job, Console(width=200))
    assert all(path in capsys.readouterr().out for path in list(said)[:1])


def test_one_calibration_serves_all_methods(compressed: Compress) -> None:
    folder = compressed("olmoe", ratio=0.5)
    for method in (MERGED, MERGED | {"ratio": 0.25, "similarity": "cka"}, SPARSE, PRUNED, {"ratio": 0.3}):
        compressed("olmoe", **method)
    job = folder.parent / "olmoe.job"
    assert len(list(job.glob("statistics-*"))) == 1
    events = [json.loads(line) for line in (job / "events.jsonl").read_text().splitlines()]
    assert sum((event["event"], event.get("stage")) == ("stage_start", "calibrate") for event in events) == 1
    assert yaml.safe_load((job / "recipe.yaml").read_text())["method"]["ratio"] == 0.3

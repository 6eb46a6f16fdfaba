from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from jobs import demo as demo_module
from jobs.demo import Demo, build_demo, split_documents
from moe_compress.calibration.text import evaluation_windows, read_documents, read_texts

TINY: dict[str, int] = {
    "steps": 60,
    "batch_size": 4,
    "sequence_length": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 512,
}


@pytest.fixture(scope="module", autouse=True)
def small_corpus() -> Iterator[None]:
    training, held_out = split_documents()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "split_documents", lambda: (training[::40], held_out[::4]))
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return build_demo(tmp_path_factory.mktemp("demo"), **TINY)


def refuse(*_: object) -> None:
    raise RuntimeError("training started")


def test_demo_is_an_ordinary_checkpoint_that_has_learnt(demo: Demo) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir)
    assert type(model) is MixtralForCausalLM
    assert model.dtype == torch.bfloat16
    assert not model.config.output_router_logits
    assert tokenizer.eos_token_id == model.config.eos_token_id
    windows = evaluation_windows(read_texts([demo.evaluation_file]), tokenizer, 64, max_windows=32)
    with torch.no_grad():
        loss = model(input_ids=windows.input_ids, labels=windows.input_ids).loss.item()
    assert loss < math.log(TINY["vocab_size"]) - 1


def test_evaluation_text_was_never_trained_on(demo: Demo) -> None:
    training, held_out = split_documents()
    assert not set(training) & set(held_out)
    assert 0.02 < len(held_out) / len(training + held_out) < 0.08
    assert demo.evaluation_file.read_bytes().decode() == "\n\n".join(held_out[::4])
    assert set(read_documents([demo.calibration_file])) < set(training[::40])


def test_corpus_is_sources_and_documentation() -> None:
    documents = dict(demo_module._documents())
    assert documents["json/decoder.py"].startswith('"""Implementation of JSONDecoder')
    assert documents["pydoc_data/topics.py/if"].startswith('The "if" statement')
    assert not any(name.startswith(("test/", "site-packages/")) for name in documents)


def test_second_call_returns_at_once(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "_train_model", refuse)
    assert build_demo(demo.model_dir.parent, **TINY) == demo


def test_other_settings_train_anew(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "_train_model", refuse)
    # The refused run takes the marker away: leave the module's demo to the other tests.
    copy = demo.model_dir.parent / "copy"
    copy.mkdir()
    (copy / "demo.json").write_bytes((demo.model_dir.parent / "demo.json").read_bytes())
    with pytest.raises(RuntimeError, match="training started"):
        build_demo(copy, **TINY | {"seed": 1})
    assert not (copy / "demo.json").exists()


def test_killed_run_leaves_no_half_model_and_the_next_makes_the_same_bytes(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: MixtralForCausalLM, folder: Path, **__: Any) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MixtralForCausalLM, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            build_demo(tmp_path, **TINY)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "demo.json").exists()

    rebuilt = build_demo(tmp_path, **TINY)
    assert not list(tmp_path.glob("*.partial"))
    assert json.loads((tmp_path / "demo.json").read_text())["steps"] == TINY["steps"]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (rebuilt.model_dir / name).read_bytes() == (demo.model_dir / name).read_bytes()


def test_balance_loss_is_taken_layer_by_layer() -> None:
    even_TE = torch.eye(4).repeat(8, 1) * 20
    one_expert_TE = torch.zeros(32, 4).index_fill(1, torch.tensor([0]), 20.0)
    assert demo_module._balance_loss(even_TE[None], top_k=1).item() == pytest.approx(1.0)
    # Pooled, these four layers use every expert alike.
    collapsed_LTE = torch.stack([one_expert_TE.roll(expert, dims=1) for expert in range(4)])
    assert demo_module._balance_loss(collapsed_LTE, top_k=1).item() == pytest.approx(4.0)

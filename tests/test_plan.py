"""Plans of published models from nothing but config.json and an index, and a plan against what a job really wrote."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_compress.checkpoint import CheckpointReader
from moe_compress.errors import RecipeError
from moe_compress.executor import InProcess
from moe_compress.job import Job
from moe_compress.pipeline import compress
from moe_compress.plan import Plan, make_plan
from moe_compress.progress import Reporter
from moe_compress.recipe import Recipe, parse_recipe
from moe_compress.stages.prepare import check, prepare
from tests.conftest import Checkpoint

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "vocab_size": 129280,
}
GATED = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def mixtral_names() -> Iterator[str]:
    for i in range(32):
        yield from (f"layers.{i}.self_attn.{p}_proj" for p in "qkvo")
        yield f"layers.{i}.block_sparse_moe.gate"
        yield from (f"layers.{i}.block_sparse_moe.experts.{e}.{w}" for e in range(8) for w in ("w1", "w2", "w3"))


def qwen3_names() -> Iterator[str]:
    for i in range(48):
        yield from (f"layers.{i}.self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))
        yield f"layers.{i}.mlp.gate"
        yield from (f"layers.{i}.mlp.experts.{e}.{w}" for e in range(128) for w in GATED)


def deepseek_names() -> Iterator[str]:
    latent = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    for i in range(62):  # the last one predicts a second token; the model class has no place for it
        yield from (f"layers.{i}.self_attn.{p}" for p in latent)
        if i < 3:
            yield from (f"layers.{i}.mlp.{w}" for w in GATED)
            continue
        yield f"layers.{i}.mlp.gate"
        yield from (f"layers.{i}.mlp.shared_experts.{w}" for w in GATED)
        yield from (f"layers.{i}.mlp.experts.{e}.{w}" for e in range(256) for w in GATED)


NAMES = {"mixtral": mixtral_names, "qwen3_moe": qwen3_names, "deepseek_v3": deepseek_names}
SECOND_TOKEN_BYTES = 2 * 11_500_000_000


def write_layout(folder: Path, config: dict[str, Any], total_bytes: int) -> Path:
    """A folder of config.json and an index, no shard."""
    num_layers = config["num_hidden_layers"]
    names = [f"model.{name}.weight" for name in NAMES[config["model_type"]]()]
    names += [f"model.layers.{i}.{norm}.weight" for i in range(num_layers) for norm in NORMS]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    if config["model_type"] == "deepseek_v3":
        names += [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(3, num_layers)]
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def recipe_for(model: Path, **changes: Any) -> Recipe:
    recipe: dict[str, Any] = {
        "model": str(model),
        "output": str(model.parent / "small"),
        "calibration": {"text": "text.txt"},
        "method": {"name": "d2moe", "ratio": 0.4},
        "evaluation": {"text": "text.txt", "max_windows": 10},
        "cluster": {"layer_workers": 2},
    }
    return parse_recipe(recipe | changes)


@pytest.mark.parametrize(
    ("config", "billions", "expert_share", "num_moe_layers", "num_experts", "top_k"),
    [
        (MIXTRAL, 46.70, 32 * 8 * 3 * 4096 * 14336, 32, 8, 2),
        (QWEN3, 30.53, 48 * 128 * 3 * 2048 * 768, 48, 128, 8),
        (DEEPSEEK, 671.03, 58 * 256 * 3 * 7168 * 2048, 58, 256, 8),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_published_models_from_config_and_index(
    config: dict[str, Any],
    billions: float,
    expert_share: int,
    num_moe_layers: int,
    num_experts: int,
    top_k: int,
    tmp_path: Path,
) -> None:
    extra = SECOND_TOKEN_BYTES if config is DEEPSEEK else 0
    model = write_layout(tmp_path / "model", config, round(2e9 * billions) + extra)
    started = time.monotonic()
    plan = make_plan(recipe_for(model))
    assert time.monotonic() - started < 10
    parts = {part.name: part for part in plan.parts}
    inside = [part for part in plan.parts if part.name != "outside the model class"]
    assert sum(part.parameters for part in inside) / 1e9 == pytest.approx(billions, abs=0.005)
    assert (plan.num_moe_layers, plan.num_experts, plan.top_k) == (num_moe_layers, num_experts, top_k)
    experts = parts["routed experts"]
    assert experts.parameters == expert_share
    assert experts.num_bytes == 2 * expert_share
    assert experts.bytes_after == pytest.approx(0.6 * experts.num_bytes, rel=1e-9)
    assert all(part.bytes_after == part.num_bytes for part in plan.parts if part is not experts)
    assert parts["embeddings and head"].parameters == 2 * config["hidden_size"] * config["vocab_size"]
    if config is DEEPSEEK:
        assert parts["shared experts"].parameters == 58 * 3 * 7168 * 2048
        assert parts["outside the model class"].num_bytes == pytest.approx(extra, rel=1e-2)
    console = Console(record=True, width=160)
    plan.show(console)
    assert f"{sum(part.parameters for part in plan.parts):,}" in console.export_text()
    json.dumps(plan.to_dict())


@pytest.fixture(scope="module")
def mixtral_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_layout(tmp_path_factory.mktemp("layout") / "model", MIXTRAL, 93_405_585_408)


def test_figures_of_mixtral_by_hand(mixtral_layout: Path) -> None:
    plan = make_plan(recipe_for(mixtral_layout))
    gate_up, down = plan.slots
    assert (gate_up.num_rows, gate_up.num_columns, gate_up.count) == (28672, 4096, 256)
    assert gate_up.break_even_rank == 28672 * 4096 // (28672 + 4096) == 3584
    assert gate_up.uniform_rank == int(0.6 * 3584)
    assert down.break_even_rank == 3185
    num_tokens, hidden, layers = 128 * 2048, 4096, 32
    boundary = layers * num_tokens * hidden * 2
    assert plan.disk_bytes["spilled activations"] == boundary - 2 * 2**24  # two workers keep 16 MiB each
    assert plan.network_bytes == 2 * (layers - 1) * num_tokens * hidden * 2
    worker = plan.memory_bytes["calibration worker"]
    layer = 8 * 3 * 4096 * 14336 + 2 * (4096 * 4096 + 4096 * 1024) + 8 * 4096 + 2 * 4096
    assert worker["resident layers"] == 2 * layer
    assert worker["embeddings and head"] == 2 * (2 * 32000 * 4096 + 4096)
    packed = 4096 * (4096 + 256) // 2
    grams = 4 * 8 * (5 * packed + 28672)  # up by its input, down by its output
    vectors = 4 * 8 * (2 * 4096 + 14336) + 8 * 8**2
    sampled = 1024 * (2 * 4096 + 2 * (2 + 8))
    assert worker["statistics"] == grams + vectors + sampled
    active = 12.88e9 - 32000 * 4096
    attention = 2 * 32 * 2048 * 4096
    assert plan.flops["calibrate: model"] == pytest.approx(3 * num_tokens * (2 * active + attention), rel=2e-3)
    assert plan.flops["evaluate"] == pytest.approx(2 * 10 * 2048 * (2 * active + attention), rel=2e-3)
    assert plan.seconds["calibrate: model"] == pytest.approx(
        plan.flops["calibrate: model"] / plan.speed["bfloat16"] / 2
    )


def test_memory_follows_what_the_recipe_changes(mixtral_layout: Path) -> None:
    def worker(**calibration: Any) -> dict[str, int]:
        text = {"text": "text.txt", **calibration}
        return make_plan(recipe_for(mixtral_layout, calibration=text)).memory_bytes["calibration worker"]

    small, large = worker(batch_size=4), worker(batch_size=8)
    assert large["backward of a micro-batch"] == 2 * small["backward of a micro-batch"]
    assert worker(activation_memory_gb=0)["activations between layers"] == 0
    assert worker(dtype="float32")["resident layers"] == 2 * small["resident layers"]


def test_an_impossible_ratio_is_refused(mixtral_layout: Path) -> None:
    with pytest.raises(RecipeError, match="highest possible"):
        make_plan(recipe_for(mixtral_layout, method={"name": "d2moe", "ratio": 0.9, "base": "mean"}))


METHODS = [
    {"name": "d2moe", "ratio": 0.4},
    {"name": "d2moe", "ratio": 0.5, "base": "mean"},
    {"name": "d2moe", "ratio": 0.4, "preset": "paper"},
    {"name": "d2moe", "ranks": "full"},
    {"name": "d2moe", "ratio": 0.4, "sequential": True},
    {"name": "msmoe", "ratio": 0.3},
    {"name": "msmoe", "ratio": 0.5, "counts": "uniform", "router": "slice"},
    {"name": "mcsmoe", "ratio": 0.5},
    {"name": "mcsmoe", "ratio": 0.8, "start": 0.5},
    {"name": "mcsmoe", "ratio": 0.8, "start": "residual"},
    {"name": "prune", "ratio": 0.5},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_the_output_is_as_large_as_planned(
    model_type: str, method: dict[str, Any], tiny: Checkpoint, text_file: Path, tmp_path: Path
) -> None:
    model = tiny(model_type)
    recipe = recipe_for(
        model,
        output=str(tmp_path / "small"),
        calibration={"text": str(text_file), "num_sequences": 8, "sequence_length": 32},
        method=method,
        evaluation=None,
        cluster={"local": True},
    )
    plan = make_plan(recipe)
    assert total(plan, "num_bytes") == CheckpointReader(model).total_bytes
    job = Job(recipe)
    with job.locked():
        compress(job, prepare(job, *check(recipe)), InProcess(1), Reporter(job, Console(quiet=True)))
    output = CheckpointReader(recipe.output_path)
    assert total(plan, "bytes_after") == pytest.approx(output.total_bytes, rel=0.01)
    assert plan.disk_bytes["output"] == total(plan, "bytes_after")
    statistics = sum(path.stat().st_size for path in recipe.job_path.glob("statistics-*/*.safetensors"))
    assert plan.disk_bytes["statistics"] == pytest.approx(statistics, rel=0.1)  # beside the sums, the headers
    spectra = recipe.job_path.glob("spectra-*/*.parquet")
    assert any(spectra) == (plan.disk_bytes["spectra"] > 0)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
def test_every_method_is_planned_from_config_and_index(
    method: dict[str, Any], mixtral_layout: Path, tmp_path: Path
) -> None:
    plan = make_plan(recipe_for(mixtral_layout, method=method))
    experts = next(part for part in plan.parts if part.name == "routed experts")
    if isinstance(removed := method.get("start", method.get("ratio")), float):
        assert experts.parameters_after == pytest.approx((1 - removed) * experts.parameters, rel=0.003)
    console = Console(record=True, width=160)
    plan.show(console)
    assert f"{experts.parameters_after:,}" in console.export_text()
    assert (plan.flops["merge: alignment"] > 0) == (method["name"] in ("msmoe", "mcsmoe"))
    assert (plan.flops["factorise: products"] > 0) == (method["name"] in ("d2moe", "mcsmoe"))


def total(plan: Plan, field: str) -> int:
    return int(plan.to_dict()["total"][field])

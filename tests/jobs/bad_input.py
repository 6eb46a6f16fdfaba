"""A job that would run, the ways in which its input can be wrong, and what is said of each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedModel,
)

from moe_compress.checkpoint import Manifest, Source
from tests.tiny_models import build_tiny

INDEX = "model.safetensors.index.json"


@dataclass
class World:
    """A job that would run, in a folder of its own, until a case spoils it.

    root: everything lies in here. model: a sharded tiny Mixtral. text: its calibration text.
    output: where the job would write. recipe: as plain data. raw: written in its place, if given.
    overrides: of `--set`.
    """

    root: Path
    model: Path
    text: Path
    output: Path
    recipe: dict[str, Any]
    raw: bytes | None = None
    overrides: tuple[str, ...] = ()

    def write_json(self, name: str, **changes: Any) -> None:
        """Changes keys of a JSON file of the model."""
        path = self.model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    @property
    def shards(self) -> list[Path]:
        return sorted(self.model.glob("*.safetensors"))

    def command(self) -> list[str]:
        """The arguments of `moe-compress`, once the recipe is written."""
        path = self.root / "recipe.yaml"
        path.write_bytes(yaml.safe_dump(self.recipe).encode() if self.raw is None else self.raw)
        return ["compress", str(path), *(word for item in self.overrides for word in ("--set", item))]


def override(*items: str) -> Callable[[World], None]:
    return lambda world: setattr(world, "overrides", items)


def raw(content: bytes) -> Callable[[World], None]:
    return lambda world: setattr(world, "raw", content)


def drop(*keys: str) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        here = world.recipe
        for key in keys[:-1]:
            here = here[key]
        del here[keys[-1]]

    return spoil


def text_file(name: str, content: bytes, field: str = "calibration") -> Callable[[World], None]:
    def spoil(world: World) -> None:
        (world.root / name).write_bytes(content)
        world.recipe[field]["text"] = str(world.root / name)

    return spoil


def task_file(content: bytes) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        (world.root / "rows.jsonl").write_bytes(content)
        world.recipe["evaluation"]["tasks"] = [{"name": "mine", "test": str(world.root / "rows.jsonl")}]

    return spoil


def dense_model(world: World) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    replace_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8)), world)


def nan_weight(world: World, value: float = float("nan")) -> None:
    tensors = load_file(world.shards[1])
    name = sorted(tensors)[0]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, world.shards[1], {"format": "pt"})


def index_outside(place: str) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        weight_map = json.loads((world.model / INDEX).read_text())["weight_map"]
        world.write_json(INDEX, weight_map=weight_map | {next(iter(weight_map)): f"{place}/secret.safetensors"})

    return spoil


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[World], None]:
    """Changes the tensors whose names end so."""

    def spoil(world: World) -> None:
        for shard in world.shards:
            tensors = load_file(shard)
            changed = {key: change(tensor) if key.endswith(name) else tensor for key, tensor in tensors.items()}
            save_file({key: tensor.contiguous() for key, tensor in changed.items()}, shard, {"format": "pt"})

    return spoil


def twice_there(world: World) -> None:
    """One tensor is in two shards."""
    first, second = load_file(world.shards[0]), load_file(world.shards[1])
    name = next(iter(first))
    save_file(second | {name: first[name]}, world.shards[1], {"format": "pt"})


def lost_expert(world: World) -> None:
    for shard in world.shards:
        tensors = {name: tensor for name, tensor in load_file(shard).items() if ".experts.2.w1." not in name}
        save_file(tensors, shard, {"format": "pt"})
    weight_map = json.loads((world.model / INDEX).read_text())["weight_map"]
    world.write_json(INDEX, weight_map={name: s for name, s in weight_map.items() if ".experts.2.w1." not in name})


def small_vocabulary(world: World) -> None:
    change_tensor("embed_tokens.weight", lambda tensor: tensor[:16])(world)
    change_tensor("lm_head.weight", lambda tensor: tensor[:16])(world)
    world.write_json("config.json", vocab_size=16)


def replace_model(model: PreTrainedModel, world: World) -> None:
    for path in (*world.shards, world.model / INDEX):
        path.unlink()
    model.save_pretrained(world.model)


def encoder_decoder(world: World) -> None:
    sides = {"layers": 1, "ffn_dim": 8, "attention_heads": 2}
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sides.items()}
    replace_model(
        NllbMoeForConditionalGeneration(NllbMoeConfig(**sizes, d_model=8, num_experts=2, vocab_size=8)), world
    )


def align_biased(world: World) -> None:
    replace_model(build_tiny("gpt_oss"), world)
    world.overrides = ("method.align=true", "method.base=mean")


def pickled(world: World) -> None:
    for path in (*world.shards, world.model / INDEX):
        path.unlink()
    torch.save({}, world.model / "pytorch_model.bin")


def lost_tensor(world: World) -> None:
    """One tensor is in neither the index nor its shard."""
    tensors = load_file(world.shards[0])
    lost = sorted(tensors)[-1]
    del tensors[lost]
    save_file(tensors, world.shards[0], {"format": "pt"})
    weight_map = json.loads((world.model / INDEX).read_text())["weight_map"]
    del weight_map[lost]
    world.write_json(INDEX, weight_map=weight_map)


def no_tokenizer(world: World) -> None:
    for path in world.model.glob("tokenizer*"):
        path.unlink()


def file_in_the_way(field: str) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        (world.root / "file").write_text("")
        world.recipe[field] = str(world.root / "file" / "below")

    return spoil


def taken_output(world: World) -> None:
    world.output.mkdir(parents=True)
    (world.output / "precious.txt").write_text("")


def linked_output(world: World) -> None:
    world.output.parent.mkdir()
    world.output.symlink_to(world.root / "elsewhere")


def output_of_another_job(world: World) -> None:
    world.output.mkdir(parents=True)
    manifest = Manifest(
        tool_version="0",
        source=Source(name="model", digest="0"),
        recipe={"method": {"name": "d2moe", "ratio": 0.5}},
        layers={},
        parameters={},
        files={},
    )
    manifest.save(world.output)


def compressed_already(world: World) -> None:
    world.write_json("config.json", quantization_config={"quant_method": "moe_compress", "layers": {}})


def truncated(world: World) -> None:
    os.truncate(world.shards[2], world.shards[2].stat().st_size - 100)


CASES: dict[str, tuple[Callable[[World], object], str]] = {
    # the recipe
    "recipe is not YAML": (raw(b"model: [1"), "not YAML"),
    "recipe is binary": (raw(b"\xff\xfe\x00"), "not YAML"),
    "recipe is empty": (raw(b""), "not a mapping"),
    "recipe is a list": (raw(b"- model: m"), "not a mapping"),
    "unknown key": (override("method.ration=0.4"), "method.ration: unknown key"),
    "unknown key of the cluster": (override("cluster.nodes=3"), "cluster.nodes: unknown key"),
    "unknown section": (override("methods.ratio=0.4"), "methods: unknown key"),
    "unknown method": (override("method.name=magic"), "method.name: 'magic'"),
    "missing key": (drop("calibration", "text"), "calibration.text: missing"),
    "ratio missing": (drop("method", "ratio"), "method.ratio: missing"),
    "ratio null": (override("method.ratio=null"), "method.ratio: missing"),
    "ratio 0": (override("method.ratio=0"), "method.ratio: 0"),
    "ratio 1": (override("method.ratio=1"), "method.ratio: 1"),
    "ratio 1.5": (override("method.ratio=1.5"), "method.ratio: 1.5"),
    "ratio negative": (override("method.ratio=-0.1"), "method.ratio: -0.1"),
    "ratio NaN": (override("method.ratio=.nan"), "method.ratio: nan"),
    "ratio text": (override("method.ratio=much"), "method.ratio: 'much'"),
    "ratio true": (override("method.ratio=true"), "method.ratio: True"),
    "ratio beyond the base": (override("method.ratio=0.8", "method.base=mean"), "method.ratio: 0.8"),
    "ratio without a rank": (override("method.ratio=0.99", "method.ranks=uniform"), "method.ratio: 0.99"),
    "negative sequences": (override("calibration.num_sequences=-4"), "calibration.num_sequences: -4"),
    "no sequences": (override("calibration.num_sequences=0"), "calibration.num_sequences: 0"),
    "unknown dtype": (override("calibration.dtype=int4"), "calibration.dtype: 'int4'"),
    "unknown device": (override("cluster.device=banana"), "cluster.device: 'banana'"),
    "method without keys": (override("method=d2moe"), "method: 'd2moe' is not a mapping of keys"),
    "malformed --set": (override("method.ratio"), "--set 'method.ratio'"),
    # the model
    "model not named": (override("model=null"), "model: missing"),
    "no model": (override("model=/no/such/model"), "/no/such/model"),
    "config without experts": (dense_model, "model type 'llama'"),
    "encoder-decoder": (encoder_decoder, "model type 'nllb-moe'"),
    "no config": (lambda w: (w.model / "config.json").unlink(), "config.json"),
    "config is not JSON": (lambda w: (w.model / "config.json").write_text("{"), "config.json"),
    "unknown architecture": (lambda w: w.write_json("config.json", model_type="nope"), "config.json"),
    "config of another size": (lambda w: w.write_json("config.json", intermediate_size=44), "config.json calls for"),
    "config of more experts": (lambda w: w.write_json("config.json", num_local_experts=5), "config.json calls for"),
    "foreign quantization": (
        lambda w: w.write_json("config.json", quantization_config={"quant_method": "gptq"}),
        "quantization_config.quant_method 'gptq'",
    ),
    "compressed already": (compressed_already, "compressed checkpoint already"),
    "missing shard": (lambda w: w.shards[1].unlink(), "model-00002-of-"),
    "truncated shard": (truncated, "model-00003-of-"),
    "shard is not safetensors": (lambda w: w.shards[0].write_bytes(b"PK" * 99), "model-00001-of-"),
    "tensor lost": (lost_tensor, "no tensor for"),
    "index with ../": (index_outside(".."), "../secret.safetensors"),
    "index with an absolute path": (index_outside("/etc"), "/etc/secret.safetensors"),
    "tensor in two shards": (twice_there, "is in both"),
    "expert lost": (lost_expert, "an expert is missing"),
    "expert of another shape": (change_tensor("0.block_sparse_moe.experts.2.w1.weight", torch.t), "has the shape"),
    "matrix of another shape": (change_tensor("1.self_attn.k_proj.weight", torch.t), "has the shape"),
    "alignment of biased experts": (align_biased, "method.align: true"),
    "pickle": (pickled, "pytorch_model.bin is pickled"),
    "NaN weight": (nan_weight, "holds NaN or infinity"),
    "infinite weight": (lambda w: nan_weight(w, float("-inf")), "holds NaN or infinity"),
    "tokenizer of a larger model": (small_vocabulary, "the tokenizer gives id"),
    "no tokenizer": (no_tokenizer, "tokenizer does not load"),
    # the texts
    "no text named": (override("calibration.text=[]"), "calibration.text: [] is not valid; names no text"),
    "missing text": (override("calibration.text=/no/such.txt"), "calibration.text: /no/such.txt: no such text file"),
    "unknown kind of text": (text_file("a.pdf", b"x"), "a.pdf: unknown kind of text"),
    "empty text": (text_file("empty.txt", b""), "calibration.text: "),
    "blank text": (text_file("blank.txt", b"\n \n\n"), "blank.txt: holds no text"),
    "less than a sequence": (text_file("a.txt", b"a fox"), "fills no sequence of 16"),
    "less than a window": (text_file("a.txt", b"a fox", "evaluation"), "evaluation.text: the text holds"),
    "text is a number": (override("calibration.text=3"), "calibration.text: 3"),
    "unknown key of a dataset": (override("calibration.text={dataset: d, name: e}"), "calibration.text.name: unknown"),
    "text is not UTF-8": (text_file("latin.txt", b"caf\xe9"), "latin.txt: cannot be read"),
    "text is not JSON lines": (text_file("a.jsonl", b"{}\nno"), "a.jsonl:1"),
    "text is not Parquet": (text_file("a.parquet", b"PAR0"), "a.parquet: cannot be read"),
    "missing evaluation text": (override("evaluation.text=/no/such.txt"), "evaluation.text: /no/such.txt"),
    "nothing to evaluate on": (drop("evaluation", "text"), "evaluation.text: missing"),
    "generated targets of no text": (override("evaluation={tasks: [copa], generate: 3}"), "evaluation.generate: 3"),
    "unknown task": (override("evaluation.tasks=[banana]"), "evaluation.tasks: 'banana' is no task"),
    "task twice": (override("evaluation.tasks=[copa, copa]"), "evaluation.tasks: 'copa' is named twice"),
    "unknown key of a task": (override("evaluation.tasks=[{name: copa, file: a}]"), "tasks.0.file: unknown key"),
    "task without its file": (
        override("evaluation.tasks=[{name: mine, test: /no/such.jsonl}]"),
        "evaluation.tasks: /no/such.jsonl: no such text file",
    ),
    "task of other rows": (task_file(b'{"text": "a fox"}'), "no row of the task 'mine'"),
    "task without rows": (task_file(b"\n"), "mine: its test files hold no row"),
    "empty evaluation text": (text_file("empty.txt", b"", "evaluation"), "evaluation.text: "),
    "split that is not there": (
        lambda w: w.recipe["evaluation"].update(text={"dataset": str(w.root), "split": "absent"}),
        "evaluation.text: dataset",
    ),
    # where to
    "existing output": (taken_output, "exists and is not ours"),
    "output of another job": (output_of_another_job, "of another job"),
    "unwritable output": (file_in_the_way("output"), "output: "),
    "unwritable job folder": (file_in_the_way("job_dir"), "job_dir: "),
    "output is a bucket": (override("output=s3://bucket"), "names a bucket"),
    "output is a link": (linked_output, "is a symbolic link"),
    "output is a mount point": (override("output=/proc"), "output: /"),
    "output in the model": (lambda w: w.recipe.update(output=f"{w.model}/small"), "output: "),
    "output is the model": (lambda w: w.recipe.update(output=str(w.model)), "output: "),
    "job folder in the model": (lambda w: w.recipe.update(job_dir=f"{w.model}/job"), "job_dir: "),
    "job folder in the output": (lambda w: w.recipe.update(job_dir=f"{w.output}/job"), "job_dir: "),
}

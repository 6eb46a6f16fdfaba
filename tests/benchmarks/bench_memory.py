"""Peak memory of a whole job, all its processes together, on Mixtral-shaped checkpoints of growing depth.

    python -m tests.benchmarks.bench_memory [--layers 2 8 16] [--local]

Writes random bf16 checkpoints (D 1024, F 3584, 8 experts, top-2) layer by layer into a temporary folder, runs
`moe-compress compress` on each as a process of its own and samples the proportional set size of its process tree.
Prints a table of the peak of each stage, and the peak as a multiple of one layer above the constant: what the same
job costs, Python, torch and Ray in all its processes, when the layers are tiny.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import MixtralConfig, PreTrainedTokenizerFast

from moe_compress.checkpoint import save_index, write_shard

TEXT = " ".join(f"line {i} of a text that says the number {i * 7919 % 1000} and little else" for i in range(8000))


def write_checkpoint(folder: Path, num_layers: int, hidden: int = 1024, inner: int = 3584, experts: int = 8) -> int:
    """Writes a random Mixtral checkpoint, one shard a layer; returns the bytes of one layer."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_local_experts=experts,
        num_experts_per_tok=2,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        dtype=torch.bfloat16,
        architectures=["MixtralForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).bfloat16()

    shards = []
    for i in range(num_layers):
        prefix = f"model.layers.{i}."
        layer = {
            f"{prefix}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            layer[f"{prefix}self_attn.{name}_proj.weight"] = random(rows, hidden)
        layer[f"{prefix}block_sparse_moe.gate.weight"] = random(experts, hidden)
        for e in range(experts):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                layer[f"{prefix}block_sparse_moe.experts.{e}.{name}.weight"] = random(*shape)
        shards.append(write_shard(folder / f"model-{i:05d}.safetensors", layer))
    root = {"model.embed_tokens.weight": random(512, hidden), "lm_head.weight": random(512, hidden)}
    root["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    shards.append(write_shard(folder / "model-root.safetensors", root))
    save_index(folder, shards)
    return shards[0].tensor_bytes


class Sampler(threading.Thread):
    """Peak proportional set size of a process tree."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak, self.worst = psutil.Process(pid), 0, {}

    def run(self) -> None:
        while self.root.is_running() and self.root.status() != psutil.STATUS_ZOMBIE:
            sizes: dict[str, int] = {}
            try:
                for process in [self.root, *self.root.children(recursive=True)]:
                    try:
                        name = " ".join(process.cmdline()[:3])[-40:] or process.name()
                        sizes[f"{process.pid} {name}"] = process.memory_full_info().pss
                    except psutil.Error:
                        continue
            except psutil.Error:
                return
            if sum(sizes.values()) > self.peak:
                self.peak, self.worst = sum(sizes.values()), sizes
            time.sleep(0.1)


def measure(
    folder: Path, num_layers: int, cluster: dict[str, object], sequences: int, is_tiny: bool = False
) -> tuple[int, Sampler, dict[str, dict[str, float]]]:
    """(bytes of one layer, sampled peak, stages) of one job."""
    model, text = folder / "model", folder / "text.txt"
    layer_bytes = write_checkpoint(model, num_layers, *((64, 128) if is_tiny else ()))
    text.write_text(TEXT)
    recipe = {
        "model": str(model),
        "output": str(folder / "out"),
        "calibration": {"text": str(text), "num_sequences": sequences, "sequence_length": 256, "batch_size": 4},
        "method": {"name": "d2moe", "ratio": 0.4},
        "cluster": cluster,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "compress", str(folder / "recipe.yaml")], stderr=subprocess.PIPE, text=True
    )
    sampler = Sampler(job.pid)
    sampler.start()
    _, errors = job.communicate()
    if job.returncode:
        raise SystemExit(errors)
    stages = json.loads((folder / "out.job" / "summary.json").read_text())["stages"]
    return layer_bytes, sampler, stages


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--processes", action="store_true", help="show each process at the peak")
    options = parser.parse_args()
    cluster = {"local": True} if options.local else {"layer_workers": options.workers}
    console, table = Console(), Table(title=f"peak memory, {cluster}")
    columns = ("layers", "checkpoint GB", "one layer MB", "peak MB", "over the constant", "calibrate", "allocate")
    for column in (*columns, "compress"):
        table.add_column(column, justify="right")
    constant = 0
    for num_layers in [0, *options.layers]:
        is_tiny = num_layers == 0
        with tempfile.TemporaryDirectory() as name:
            layer_bytes, sampler, stages = measure(Path(name), num_layers or 2, cluster, options.sequences, is_tiny)
        constant = sampler.peak if is_tiny else constant
        by_stage = [f"{stages[name].get('peak_bytes', 0) / 1e6:,.0f}" for name in ("calibrate", "allocate", "compress")]
        table.add_row(
            "2 tiny" if is_tiny else str(num_layers),
            f"{num_layers * layer_bytes / 1e9:.2f}",
            f"{layer_bytes / 1e6:.0f}",
            f"{sampler.peak / 1e6:,.0f}",
            "the constant" if is_tiny else f"{(sampler.peak - constant) / layer_bytes:.2f} layers",
            *by_stage,
        )
        if options.processes:
            for name, size in sorted(sampler.worst.items(), key=lambda item: -item[1]):
                console.print(f"  {size / 1e6:8.0f} MB  {name}", highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()

"""The demo model: a small Mixtral, trained here in about a minute on text every Python has.

The text is the standard library: its sources and its documentation. About 5 % of the files, chosen
by a hash of their names, are held out for evaluation. The checkpoint is an ordinary one, so what
compresses it compresses any other.

    python -m jobs.demo [DIRECTORY]

Shape suffixes: N sequences, S tokens a sequence; L layers, T tokens, E experts, K chosen experts.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moe_compress.calibration.text import calibration_sequences
from moe_compress.model.quiet import quiet
from moe_compress.process import choose_accelerator

EOS_TOKEN = "<|endoftext|>"
# Tests and installed packages differ between machines; encodings are tables, not text.
SKIPPED_FOLDERS = {
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Demo:
    """Where the demo lies: a checkpoint, text it was trained on, text it never saw."""

    model_dir: Path
    calibration_file: Path
    evaluation_file: Path


@dataclass(frozen=True)
class Settings:
    """Everything the demo depends on; the defaults train for 60 to 90 s on two CPU cores."""

    steps: int = 900
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float = 4e-3
    # A token's row has a gradient only now and then: at the common rate so short a run ends with a
    # held-out perplexity of 54 instead of 43.
    embedding_learning_rate: float = 6.4e-2
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.1
    balance_weight: float = 0.04
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 2
    num_experts: int = 8
    top_k: int = 2
    vocab_size: int = 2048
    seed: int = 0


def build_demo(cache_dir: Path, *, steps: int = Settings.steps, **others: int) -> Demo:
    """Trains the demo model under `cache_dir`, or returns at once if it is there already.

    `steps` and `others` are fields of `Settings`. A file of the settings is written last: without
    it, or with different settings in it, the demo is made anew.
    """
    settings = Settings(steps=steps, **others)
    choose_accelerator()
    demo = Demo(cache_dir / "model", cache_dir / "calibration.jsonl", cache_dir / "evaluation.txt")
    marker = cache_dir / "demo.json"
    identity = json.dumps(asdict(settings) | {"python": sys.version}, indent=1)
    if marker.is_file() and marker.read_text() == identity:
        return demo
    cache_dir.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)

    training, held_out = split_documents()
    calibration = training[: len(training) // 4]
    _write(demo.calibration_file, "".join(json.dumps({"text": text}) + "\n" for text in calibration))
    _write(demo.evaluation_file, "\n\n".join(held_out))
    tokenizer = _train_tokenizer(calibration, settings)
    model = _train_model(training, tokenizer, settings)

    partial = cache_dir / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with quiet():
        model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(demo.model_dir, ignore_errors=True)
    partial.rename(demo.model_dir)
    _write(marker, identity)
    return demo


def split_documents() -> tuple[list[str], list[str]]:
    """The standard library's documents: those to train on, in a fixed random order, and the rest."""
    training: list[str] = []
    held_out: list[str] = []
    for name, text in sorted(_documents(), key=lambda document: _hash(document[0])):
        (held_out if _hash(name) < HELD_OUT_SHARE else training).append(text)
    return training, held_out


def _documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every source file, and of every topic of the documentation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - SKIPPED_FOLDERS
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            name = path.relative_to(root).as_posix()
            try:
                source = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if name == "pydoc_data/topics.py":
                for topic, text in _topics(source).items():
                    yield f"{name}/{topic}", text
            elif source.strip():
                yield name, source


def _topics(source: str) -> dict[str, str]:
    """The documentation's topics, a literal dictionary assigned in `source`: read, never run."""
    (assignment,) = (node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return ast.literal_eval(assignment.value)


def _hash(name: str) -> float:
    """Uniform in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _train_tokenizer(documents: list[str], settings: Settings) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN)


def _train_model(documents: list[str], tokenizer: PreTrainedTokenizerFast, settings: Settings) -> MixtralForCausalLM:
    num_chars = sum(map(len, documents))  # no text has more sequences than characters
    text = calibration_sequences(documents, tokenizer, num_chars, settings.sequence_length, settings.seed)
    tokens_NS = text.input_ids[text.attention_mask.all(dim=1)]
    config = MixtralConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        num_local_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        max_position_embeddings=8 * settings.sequence_length,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = MixtralForCausalLM(config)
        order_N = torch.randperm(len(tokens_NS))
    num_sequences = settings.steps * settings.batch_size
    tokens_NS = tokens_NS[order_N[torch.arange(num_sequences) % len(order_N)]]
    embedding = model.get_input_embeddings().weight
    matrices = [weight for weight in model.parameters() if weight.ndim > 1 and weight is not embedding]
    groups: list[dict[str, Any]] = [
        {"params": [embedding], "lr": settings.embedding_learning_rate},
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": [weight for weight in model.parameters() if weight.ndim == 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    num_warmup = max(settings.warmup * settings.steps, 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / num_warmup, 1 - step / settings.steps)
    )
    model.train()
    # In fp32: with matrices this small, autocast to bf16 costs more than it saves.
    with _progress() as progress:
        bar = progress.add_task("training", total=settings.steps, loss=0.0, speed=0.0)
        for batch_NS in tokens_NS.split(settings.batch_size):
            output = model(input_ids=batch_NS, output_router_logits=True, use_cache=False)
            loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch_NS[:, 1:].flatten())
            balance = _balance_loss(torch.stack(output.router_logits), settings.top_k)
            (loss + settings.balance_weight * balance).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            speed = (progress.tasks[bar].speed or 0.0) * batch_NS.numel()
            progress.update(bar, advance=1, loss=loss.item(), speed=speed)
    return model.eval()


def _balance_loss(logits_LTE: torch.Tensor, top_k: int) -> torch.Tensor:
    """num_experts * sum_e share_e * probability_e, the mean over layers: 1 when all are used alike.

    Layer by layer, while the loss in transformers pools the layers: there an expert that one layer
    overloads and another starves looks balanced, and experts die.
    """
    num_experts = logits_LTE.shape[-1]
    chosen_LTK = logits_LTE.topk(top_k).indices
    share_LE = F.one_hot(chosen_LTK, num_experts).float().mean((1, 2))
    return num_experts * (share_LE * logits_LTE.softmax(-1).mean(1)).sum(-1).mean()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(path)


if __name__ == "__main__":
    print(build_demo(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo")))

"""Small Switch Transformers: a random one, and one that has learned something."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moe_compress.calibration.pairs import calibration_pairs
from moe_compress.executor import InProcess
from moe_compress.job import Job
from moe_compress.model.streamer import model_inputs
from moe_compress.pipeline import compress
from moe_compress.progress import Reporter
from moe_compress.recipe import parse_recipe
from moe_compress.stages.prepare import check, prepare

PAD, EOS = 0, 1
LETTERS = string.ascii_lowercase[:16]
NUM_TASKS, LENGTH = 4, 6
BATCH = 64

SIZES: dict[str, Any] = {
    "d_model": 48,
    "d_ff": 64,
    "d_kv": 12,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_heads": 4,
    "num_experts": 8,
    "vocab_size": 2 + NUM_TASKS + len(LETTERS),
    "decoder_start_token_id": PAD,
    "dropout_rate": 0.0,
    "tie_word_embeddings": False,
    "initializer_factor": 0.3,
}


def random_switch(seed: int = 0, **sizes: Any) -> SwitchTransformersForConditionalGeneration:
    """A random fp32 model in eval mode, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**SIZES | sizes)).eval()


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: the tasks `0` to `3`, and letters; frames every text by an end of sequence, as T5's does."""
    words = ["<pad>", "</s>", *map(str, range(NUM_TASKS)), *LETTERS]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")


def cipher_pairs(count: int, seed: int, shortest: int | None = None) -> list[tuple[str, str]]:
    """The toy task: `2 h e l p` -> every letter by its cipher 2, one of four random substitutions."""
    ciphers = [torch.randperm(len(LETTERS), generator=torch.Generator().manual_seed(k)) for k in range(NUM_TASKS)]
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        task = int(torch.randint(0, NUM_TASKS, (1,), generator=generator))
        length = int(torch.randint(shortest or LENGTH, LENGTH + 1, (1,), generator=generator))
        letters = torch.randint(0, len(LETTERS), (length,), generator=generator)
        source = " ".join([str(task), *(LETTERS[i] for i in letters)])
        pairs.append((source, " ".join(LETTERS[i] for i in ciphers[task][letters])))
    return pairs


def write_pairs(path: Path, pairs: list[tuple[str, str]], fields: tuple[str, str] = ("source", "target")) -> Path:
    path.write_text("".join(json.dumps(dict(zip(fields, pair, strict=True))) + "\n" for pair in pairs))
    return path


def save_switch(model: SwitchTransformersForConditionalGeneration, folder: Path) -> Path:
    """Saves a model with the tokenizer as an ordinary checkpoint folder."""
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def compress_switch(model: Path, output: Path, pairs: Path, **changes: Any) -> Path:
    """Runs a job in this process; returns its folder, which all jobs beside each other share.

    Args:
        model, output: folders.
        pairs: text to calibrate and evaluate on.
        changes: sections of the recipe; `method` must be there.
    """
    recipe = {
        "model": str(model),
        "output": str(output),
        "job_dir": str(output.parent / "job"),
        "calibration": {"text": str(pairs), "num_sequences": 32, "sequence_length": 16},
        "cluster": {"local": True},
    }
    job = Job(parse_recipe(recipe | changes))
    with job.locked():
        compress(job, prepare(job, *check(job.recipe)), InProcess(1), Reporter(job))
    return job.folder


def trained_switch(seed: int, num_steps: int, **sizes: Any) -> SwitchTransformersForConditionalGeneration:
    """A small model that has learned the toy task."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**SIZES | sizes)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, num_steps, pct_start=0.1)
        text = calibration_pairs(cipher_pairs(BATCH * num_steps, seed), letter_tokenizer(), BATCH * num_steps, 16, seed)
        for batch in text.batches(BATCH):
            loss = model(**model_inputs(batch.input_ids, batch.attention_mask, batch.labels)).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()

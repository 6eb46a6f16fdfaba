"""Students with too many sparse columns, and trainings that prune them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.checkpoint.manifest import Manifest
from moe_compress.distillation.sparsity import ColumnPruner
from moe_compress.distillation_options import Sparsity
from moe_compress.model.experts import FactorisedExperts
from tests.model.handmade import load
from tests.tiny_models import token_ids

RATIO, NUM_STEPS = 0.8, 10
STUDENT: dict[str, Any] = {"name": "mcsmoe", "ratio": RATIO, "start": 0.5}


def sparsity(**options: Any) -> Sparsity:
    return Sparsity(ratio=RATIO, **options)


def pruner_of(model: Any, folder: Path, options: Sparsity | None = None, num_steps: int = NUM_STEPS) -> ColumnPruner:
    original = Manifest.load(folder).parameters["experts_original"]
    return ColumnPruner(model, options or sparsity(), num_steps, original)


def loss_of(model: Any, batch: int) -> Tensor:
    ids = token_ids(2, 12, seed=batch)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


class Training:
    """Plain AdamW with momentum and weight decay, some micro-batches a step."""

    def __init__(self, folder: Path, micro_batches: int = 1, **options: Any) -> None:
        self.model = load("mixtral", folder, **options)
        self.pruner = pruner_of(self.model, folder)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.1)
        self.micro_batches = micro_batches

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            for micro in range(self.micro_batches):
                (loss_of(self.model, step * self.micro_batches + micro) / self.micro_batches).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.pruner.step(step + 1)


def tables_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The packed sparse columns, in the order of the pruner's."""
    return {name: p for name, p in model.named_parameters() if name.endswith("_s")}


def without_filters(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FactorisedExperts):
            module.column_filters.clear()


def save_compact(training: Training, state: dict[str, Tensor], folder: Path) -> Path:
    """What training leaves, as a checkpoint."""
    model, config = training.model, training.model.config.quantization_config
    compact, layers = training.pruner.compact(state)
    quantizer, before = model.hf_quantizer, config.layers
    model.hf_quantizer, config.layers = None, layers  # with a quantizer transformers takes no other state
    model.save_pretrained(folder, state_dict=compact)
    model.hf_quantizer, config.layers = quantizer, before
    return folder

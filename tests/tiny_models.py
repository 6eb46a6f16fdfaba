"""Builds a tiny random model of every model type whose experts follow the contract.

The contract: a module class decorated with `use_experts_implementation`. The types are read from
the installed transformers, so that a new one appears by itself.

    python -m tests.tiny_models [TYPE ...]      which types build, reload and generate
"""

from __future__ import annotations

import re
import sys
import tempfile
from functools import cache
from itertools import chain
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tests.tiny_configs import VOCAB_SIZE, tiny_config

WEIGHT_STD = 0.15
BIAS_STD = 0.03  # a router's bias shifts the choice of experts and must not decide it

UNBUILDABLE = {
    "diffusion_gemma": "denoises a random canvas: input_ids alone do not determine its logits",
    "qwen3_omni_moe": "has no forward of its own: its text is qwen3_omni_moe_thinker",
}


class Unbuildable(Exception):
    """A model type that cannot be built tiny; `reason` says why in one line."""

    def __init__(self, model_type: str, reason: str) -> None:
        super().__init__(f"{model_type}: {reason}")
        self.reason = reason


@cache
def contract_types() -> list[str]:
    """Model types that have a head that generates and an experts class under the contract."""
    models = Path(transformers.__file__).parent / "models"
    decorated = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if re.search(r"^@use_experts_implementation", path.read_text(), re.MULTILINE)
    }
    generating = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return sorted(t for t in generating if model_type_to_module_name(t) in decorated)


def auto_class(model_type: str) -> type[AutoModelForCausalLM | AutoModelForMultimodalLM]:
    """The Auto class whose `from_pretrained` gives back the class that `save_tiny` saved."""
    # A few multimodal types are registered as causal too, but with their text half only.
    if model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def build_tiny(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in eval mode, the same for the same seed.

    Raises Unbuildable.
    """
    if model_type in UNBUILDABLE:
        raise Unbuildable(model_type, UNBUILDABLE[model_type])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = auto_class(model_type).from_config(tiny_config(model_type), dtype=torch.float32)
        except Exception as error:  # whatever a model type not yet in the tables runs into
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
            raise Unbuildable(model_type, reason) from error
        _randomize(model)
    return model.eval()


def save_tiny(model_type: str, folder: Path | str, seed: int = 0) -> Path:
    """Saves `build_tiny(model_type, seed)` as an ordinary checkpoint folder."""
    build_tiny(model_type, seed).save_pretrained(folder)
    return Path(folder)


def expert_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "_apply_gate") and hasattr(m, "has_gate")]


def token_ids(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random ids (batch, length) without pad, bos and eos."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Gives every matrix and every bias spread; norms stay as initialised."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name.endswith("tid2eid"):  # a hash router's table: token id -> its top_k expert ids
            tensor.copy_(torch.rand(len(tensor), 4).argsort(dim=-1)[:, : tensor.shape[1]])
        elif name.endswith("bias"):
            tensor.normal_(std=BIAS_STD)
        elif isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
            tensor.normal_(std=WEIGHT_STD)


@torch.no_grad()
def _row(model_type: str) -> tuple[object, ...]:
    """type, class, parameters, MoE layers, load equal, generates, reason."""
    try:
        model = build_tiny(model_type)
    except Unbuildable as error:
        return model_type, "-", "-", "-", "-", "-", error.reason
    ids = token_ids()
    logits = model(input_ids=ids).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = auto_class(model_type).from_pretrained(folder).eval()
    equal = torch.allclose(loaded(input_ids=ids).logits, logits, atol=1e-5)
    generated = loaded.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    return (
        model_type,
        type(model).__name__,
        model.num_parameters(),
        len(expert_modules(model)),
        equal and bool(logits.isfinite().all()),
        generated.shape[1] > ids.shape[1],
        "",
    )


def main(model_types: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("type | class | params | MoE layers | load equal | generates | reason")
    for model_type in model_types:
        print(*_row(model_type), sep=" | ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or contract_types())

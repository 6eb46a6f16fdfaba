"""The models of a training: the student, and the teacher that runs beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..calibration.text import IGNORED
from ..checkpoint.reader import CheckpointReader
from ..model.architecture import load_config, model_class_of
from ..model.quiet import quiet
from ..model.streamer import model_inputs
from ..model.switch import put_on_contract
from ..storage import local_folder
from .parameters import whole_shape


def load_model(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A checkpoint, compressed or not, whole. Under ZeRO 3 (`partitioned`) each process keeps its part alone."""
    model_class = model_class_of(load_config(CheckpointReader(checkpoint)))
    with quiet(), local_folder(checkpoint, lambda name: True) as here:
        model: PreTrainedModel = model_class.from_pretrained(here, dtype=dtype, trust_remote_code=False)
    put_on_contract(model)
    _hide_empty(model)
    return model


def _hide_empty(model: PreTrainedModel) -> None:
    """Makes buffers of parameters without elements, such as factors of rank 0, which ZeRO 3 cannot gather."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = whole_shape(parameter)
            if 0 in shape:
                delattr(module, name)
                module.register_buffer(name, torch.empty(shape, dtype=parameter.dtype, device=parameter.device))


def choose_dtype(checkpoint: Path, name: str) -> torch.dtype:
    """Of the forward and backward pass; `auto` is the checkpoint's own, float32 where that is of 16 bits with a range
    too short for gradients."""
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    own = load_config(CheckpointReader(checkpoint)).dtype
    return torch.bfloat16 if own in (torch.bfloat16, "bfloat16") else torch.float32


def forward(
    model: Any, config: PreTrainedConfig, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, with_hidden: bool
) -> Any:
    """The model's own forward, without its own loss.

    Args:
        model: called with keywords.
        config: the model's.
        input_ids, attention_mask, targets: of `Examples`.
        with_hidden: also give the layers' outputs.
    """
    inputs: dict[str, Any] = {**model_inputs(input_ids, attention_mask)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _shifted(targets, config.decoder_start_token_id, config.pad_token_id)
    return model(**inputs, use_cache=False, output_hidden_states=with_hidden)


def _shifted(targets_NL: Tensor, start: int, padding: int) -> Tensor:
    """What a decoder reads: each target one place later."""
    shifted = torch.full_like(targets_NL, start)
    shifted[:, 1:] = targets_NL[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, padding)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recomputes each layer in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def dropout_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Of the random numbers of one forward pass, so that a resumed training draws the same."""
    return ((seed * 1_000_003 + step) * 1009 + micro) * 1009 + rank

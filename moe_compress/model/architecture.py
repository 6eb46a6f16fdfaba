"""The model class and the dtype that a checkpoint calls for."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.reader import CheckpointReader
from ..errors import CheckpointError
from ..storage import local_folder
from .plugin import METHOD


def load_config(reader: CheckpointReader) -> transformers.PreTrainedConfig:
    """The config of a checkpoint that is not quantised but by us.

    Raises:
        CheckpointError: it is, or config.json is not usable.
    """
    folder: Path = reader.folder
    stored = reader.config.get("quantization_config")
    if stored is not None and stored.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder}: quantization_config.quant_method '{stored.get('quant_method')}' is not supported;"
            " give the bf16, fp16 or fp32 checkpoint"
        )
    try:
        with local_folder(folder) as here:
            return AutoConfig.from_pretrained(here, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: config.json is not usable ({reason}); correct it") from error


def tokenizer_of(checkpoint: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; raises whatever transformers raises."""
    with local_folder(checkpoint) as here:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(here, trust_remote_code=False)
    return tokenizer


def model_class_of(config: transformers.PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that the config names, or that its type has for text.

    Raises:
        CheckpointError: the installed transformers has none.
    """
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise CheckpointError(
            f"model type '{config.model_type}', architectures {config.architectures}: the installed"
            " transformers has no such class; models with remote code are not supported"
        ) from None


def majority_dtype(reader: CheckpointReader) -> torch.dtype:
    """The floating dtype that most bytes of a checkpoint have."""
    weight: dict[torch.dtype, int] = defaultdict(int)
    for entry in reader.entries.values():
        if entry.torch_dtype.is_floating_point:
            weight[entry.torch_dtype] += entry.num_bytes
    return max(weight, key=lambda d: weight[d]) if weight else torch.float32

"""The numbers of a model that costs depend on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from ..model.discovery import MoELayer
from ..model.routing import TOP_K_NAMES, experts_per_token
from ..model.skeleton import ROOT, Skeleton


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What costs depend on.

    Attributes:
        layers: the MoE layers.
        top_k: experts a token.
        hidden_size, vocab_size: D and V.
        attention_width: heads times head size.
        num_layers: decoder layers.
        root_parameters: outside the decoder layers: embeddings, final norm, head.
        largest_layer, largest_tensor: parameters of the largest decoder layer and of the largest experts tensor.
        active_parameters: what a token is multiplied with: all but its embedding and the experts it does not go to.
        dtype: of the checkpoint.
    """

    layers: list[MoELayer]
    top_k: int
    hidden_size: int
    vocab_size: int
    attention_width: int
    num_layers: int
    root_parameters: int
    largest_layer: int
    largest_tensor: int
    active_parameters: int
    dtype: torch.dtype


def stored_tensors(skeleton: Skeleton) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors that a checkpoint holds: all but those tied to another one."""
    for name, tensor in skeleton.model.state_dict().items():
        if name in skeleton.targets or name not in skeleton.model.all_tied_weights_keys:
            yield name, tensor


def describe(skeleton: Skeleton, layers: list[MoELayer]) -> ModelShape:
    """Reads the shape of a model off its config and its meta tensors."""
    config: Any = skeleton.model.config.get_text_config()
    sizes: Counter[str] = Counter()
    total = 0
    for name, tensor in stored_tensors(skeleton):
        sizes[skeleton.owner(name)] += tensor.numel()
        total += tensor.numel()
    top_k = _top_k(skeleton, layers)
    idle = sum(layer.num_parameters * (layer.num_experts - top_k) // layer.num_experts for layer in layers)
    embedding = skeleton.model.get_input_embeddings().weight.numel()
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    fields = config.to_dict()  # a model whose layers differ refuses to be asked for one number; the first does here
    num_heads = _first(fields, "num_attention_heads", "num_heads") or 0
    # latent attention has heads of two widths; this is the one of the values
    head_dim = _first(fields, "v_head_dim", "head_dim", "d_kv") or config.hidden_size // max(num_heads, 1)
    return ModelShape(
        layers=layers,
        top_k=top_k,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        attention_width=num_heads * head_dim,
        num_layers=len(skeleton.layers),
        root_parameters=sizes[ROOT],
        largest_layer=max(size for owner, size in sizes.items() if owner != ROOT),
        largest_tensor=max(layer.num_experts * layer.up_shape[0] * layer.up_shape[1] for layer in layers),
        active_parameters=total - idle - (0 if is_tied else embedding),
        dtype=skeleton.dtype,
    )


def _first(fields: dict[str, Any], *names: str) -> int | None:
    return next((fields[name] for name in names if fields.get(name)), None)


def _top_k(skeleton: Skeleton, layers: list[MoELayer]) -> int:
    experts: Any = skeleton.model.get_submodule(layers[0].path)
    top_k: int | None = experts_per_token(skeleton.model.config) or getattr(experts, "top_k", None)
    if top_k is None:
        raise CheckpointError(
            f"model type '{skeleton.model.config.model_type}': config.json names no experts a token; one of"
            f" {', '.join(TOP_K_NAMES)} must be there"
        )
    return top_k

"""Puts the experts of Switch Transformers on the experts contract, after which nothing else knows of them.

What is special about the family, and what becomes of it in memory:

* One module an expert (`expert_i.wi`, `expert_i.wo`): stacked into `up_proj` (E, F, D) and `down_proj` (E, D, F), which
  lie on disk as they always did, one tensor an expert.
* The router says by a one-hot mask where a token goes, and by a mask of zeros that the expert's capacity is used up:
  an expert id and the router's weight, which is 0 for a token that no expert takes.
* Stock code would not miss an expert: it would start with a random one. So every compressed layer carries an
  `expert_map`, and that lies on disk in the place of the last expert's output matrix, in a shape that stops stock code.

Source: arXiv 2101.03961; `modeling_switch_transformers.py` of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.integrations import use_experts_implementation
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from .discovery import always_mapped
from .grouped import run_experts
from .merged import MAP_NAME

_STOCK = {"up_proj": "wi", "down_proj": "wo"}
"""Parameter of the contract -> what every single expert calls it."""


@use_experts_implementation(has_gate=False)
class SwitchExperts(nn.Module):
    """The experts of one layer, stacked.

    Args:
        config: of the model.
        stock: the `ModuleDict` of single experts that this takes the place of.

    Attributes:
        guard: name of the tensor that stops stock code -> its name on disk.
    """

    top_k = 1

    def __init__(self, config: PreTrainedConfig, stock: Any) -> None:
        super().__init__()
        experts = list(stock.values())
        self.num_experts = len(experts)
        for name, single in _STOCK.items():
            stacked = torch.stack([getattr(expert, single).weight.detach() for expert in experts])
            self.register_parameter(name, nn.Parameter(stacked))
        self.act_fn = nn.Sequential(experts[0].act, experts[0].dropout)
        self.guard = (MAP_NAME, f"expert_{self.num_experts - 1}.{_STOCK['down_proj']}.weight")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D) outputs of the experts (T, 1) by their weights (T, 1)."""
        return run_experts(self, hidden_states, top_k_index, top_k_weights).mixed_TD


class SwitchBlock(SwitchTransformersSparseMLP):
    """A router and its experts, called by the contract."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D); tokens beyond an expert's capacity give zeros."""
        is_routed_BSE, weight_BS1, _ = self.router(hidden_states)
        index_T1 = is_routed_BSE.argmax(-1).reshape(-1, 1)
        weight_T1 = (weight_BS1 * is_routed_BSE.sum(-1, keepdim=True)).reshape(-1, 1)
        mixed_TD: Tensor = self.experts(hidden_states.flatten(0, 1), index_T1, weight_T1)
        return mixed_TD.view_as(hidden_states)


def put_on_contract(model: PreTrainedModel) -> None:
    """Turns every block of single experts in `model`, in place; other models stay as they are."""
    for block in model.modules():
        if type(block) is SwitchTransformersSparseMLP:
            block.experts = SwitchExperts(model.config, block.experts)
            block.__class__ = SwitchBlock
            block._is_hf_initialized = True  # its initialisation asks for the single experts


def stock_tensors(experts: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of an experts module, by name, as stock code of its family has them; mostly what they are."""
    if not always_mapped(experts):
        return tensors
    return {
        f"expert_{expert}.{_STOCK[name]}.weight": weight
        for name, stacked in tensors.items()
        for expert, weight in enumerate(stacked)
    }


def contract_conversions(model: nn.Module) -> list[WeightConverter]:
    """The way between single experts on disk and the stacked ones of a model that `put_on_contract` has turned."""
    if not any(isinstance(module, SwitchBlock) for module in model.modules()):
        return []
    return [
        WeightConverter(f"experts.expert_*.{single}.weight", f"experts.{name}", [MergeModulelist(0)])
        for name, single in _STOCK.items()
    ]

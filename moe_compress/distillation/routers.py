"""What routers say while a model runs."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import RecipeError
from .parameters import router_modules


class RouterLogits:
    """Listens to the routers of a model.

    A router is a module with a parameter whose first dimension counts experts; of what it returns the first
    floating-point tensor that is as wide is taken for its logits.

    Args:
        model: the model.

    Raises:
        RecipeError: it has no such module.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._heard: dict[str, Tensor] = {}
        modules = router_modules(model)
        if not modules:
            raise RecipeError("distillation.loss.router: no router of this model is a module; leave it out")
        for path, (router, num_experts) in modules.items():
            router.register_forward_hook(partial(self._hear, path, num_experts))

    def _hear(self, path: str, num_experts: int, router: nn.Module, args: Any, out: Any) -> None:
        candidates = out if isinstance(out, tuple) else (out,)
        for tensor in candidates:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[-1] == num_experts:
                self._heard[path] = tensor.reshape(-1, num_experts)
                return

    def take(self) -> list[Tensor]:
        """(B S, E) of each router in the forward pass before, in the model's order."""
        heard = list(self._heard.values())
        self._heard.clear()
        return heard

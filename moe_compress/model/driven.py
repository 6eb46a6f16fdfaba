"""Runs any model forward and exactly backward with one of its layers in memory: the model's own forward drives.

Each decoder layer is replaced by a stand-in that loads the layer, runs it and drops it. For the backward pass every
layer output is cut from the graph while the glue around the layers keeps its own; then the layers are recomputed
from the last to the first. Bit-equal to autograd through the whole model. Each layer is read once a micro-batch and
sweep, which is why streamer.py runs models whose layers form a chain in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .skeleton import Skeleton

Inputs = dict[str, Tensor]
LossFunction = Callable[[Tensor, Inputs], Tensor]
"""(logits (B, S, V), inputs) -> scalar summed loss."""

StandIn = Callable[[str], Callable[..., Any]]
"""Name of a layer -> what answers in its place."""


class DrivenModel:
    """A skeleton whose own forward loads, runs and drops each layer.

    Args:
        skeleton: the model; its root tensors must be loaded.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton, self.model = skeleton, skeleton.model

    @torch.no_grad()
    def drive_forward(self, inputs: Inputs, on_layer: Callable[[str], None] = lambda name: None) -> Tensor:
        """(B, S, V) logits; `on_layer` hears the name of each layer as it is run."""

        def stand_in(name: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                on_layer(name)
                return self._run_once(name, args, kwargs)

            return forward

        return self._logits(inputs, stand_in)

    @torch.no_grad()
    def generate(self, inputs: Inputs, **options: Any) -> Tensor:
        """What the model's own `generate` gives, (B, L) ids; every step reads each layer it runs once."""

        def stand_in(name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._run_once(name, args, kwargs)

        with self._replaced(stand_in):
            on_device = {key: value.to(self.skeleton.device) for key, value in inputs.items()}
            return self.model.generate(**on_device, **options)

    def drive_backward(
        self,
        inputs: Inputs,
        loss: LossFunction,
        around: Callable[[str], Any],
        wanted: Callable[[str], list[nn.Parameter]] = lambda name: [],
        on_grads: Callable[[str, list[Tensor | None]], None] = lambda name, grads: None,
    ) -> Tensor:
        """Exact gradients of the loss of one micro-batch, layer by layer from the last to the first.

        Args:
            inputs: the micro-batch.
            loss: summed loss of the logits.
            around: `around(name)` gives a context manager entered while a loaded layer is recomputed and
                differentiated.
            wanted: parameters of the loaded layer to differentiate.
            on_grads: receives their gradients.

        Returns:
            The summed loss.
        """
        records: list[tuple[str, Any, list[Tensor]]] = []

        def stand_in(name: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                with torch.no_grad():
                    out = self._run_once(name, args, kwargs)
                out = tree_map(lambda t: t.detach().clone().requires_grad_() if _is_float(t) else t, out)
                records.append((name, (args, kwargs), _floats(out)))
                return out

            return forward

        with torch.enable_grad():
            total = loss(self._logits(inputs, stand_in), inputs)
        total.backward(retain_graph=True)
        for name, called_with, outputs in reversed(records):
            if any(output.grad is not None for output in outputs):
                self.skeleton.load(name)
                with around(name):
                    on_grads(name, self._backward_once(name, called_with, outputs, wanted(name)))
                self.skeleton.drop(name)
            for output in outputs:
                output.grad = None
        return total.detach()

    def _run_once(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer: Any = self.skeleton.load(name)
        try:
            return type(layer).forward(layer, *args, **kwargs)
        finally:
            self.skeleton.drop(name)

    def _backward_once(
        self, name: str, called_with: Any, outputs: list[Tensor], parameters: list[nn.Parameter]
    ) -> list[Tensor | None]:
        """Recomputes a loaded layer, passes the gradient on to what it was called with, returns that of `parameters`.

        Args:
            name: the layer.
            called_with: its (args, kwargs).
            outputs: its floating outputs, cut from the graph, with their gradients.
            parameters: of the layer; made to require grad and left so.
        """
        for parameter in parameters:
            parameter.requires_grad_(True)
        floats = _floats(called_with)
        # What precedes the first layer has no graph, but the layer is still watched through its hidden states.
        inputs = [t for t in floats if t.requires_grad] or floats[:1]
        leaves = {id(t): t.detach().requires_grad_() for t in inputs}
        args, kwargs = tree_map(lambda t: leaves.get(id(t), t), called_with)
        with torch.enable_grad():
            again = _floats(self.skeleton.layers[name](*args, **kwargs))
            reached = [
                (new, output.grad)
                for new, output in zip(again, outputs, strict=True)
                if new.requires_grad and output.grad is not None
            ]
            grads = torch.autograd.grad(
                [new for new, _ in reached],
                [*leaves.values(), *parameters],
                [grad for _, grad in reached],
                allow_unused=True,
            )
        distinct = {id(t): t for t in inputs}.values()
        upstream = [(t, g) for t, g in zip(distinct, grads, strict=False) if t.requires_grad and g is not None]
        if upstream:
            torch.autograd.backward([t for t, _ in upstream], [g for _, g in upstream], retain_graph=True)
        return list(grads[len(leaves) :])

    def _logits(self, inputs: Inputs, stand_in: StandIn) -> Tensor:
        """(B, S, V) logits of the model with stand-ins for its layers."""
        with self._replaced(stand_in):
            on_device = {key: value.to(self.skeleton.device) for key, value in inputs.items()}
            if "labels" in on_device:  # the model shifts them itself; its own loss is not wanted
                labels = on_device.pop("labels")
                on_device["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels)
            return self.model(use_cache=False, **on_device).logits

    @contextmanager
    def _replaced(self, stand_in: StandIn) -> Iterator[None]:
        """Layers answer with `stand_in(name)` while the model's own forward runs."""
        for name, layer in self.skeleton.layers.items():
            layer.forward = stand_in(name)
        try:
            yield
        finally:
            for layer in self.skeleton.layers.values():
                del layer.forward


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _floats(tree: Any) -> list[Tensor]:
    """The floating tensors in nested tuples, lists and dicts."""
    return [value for value in tree_leaves(tree) if _is_float(value)]

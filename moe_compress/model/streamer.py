"""Runs a model one layer at a time, forward and exact backward, straight from its checkpoint.

The model's own `forward` is the only description of what happens around its layers. It is run with every decoder
layer replaced by a stand-in, which gives what each layer is called with besides the hidden states (masks, rotary
tables, positions: right by construction), and, with the last stand-in returning real hidden states, the head.

Two ways to run, same numbers:

* *chained*: each layer takes one tensor and gives one tensor to the next. Layers run one after the other over all
  micro-batches, each read once a sweep. Nearly every model.
* *driven*: anything else (layers that hand tuples on, glue between layers, encoder-decoder). The model's own
  forward drives, one micro-batch at a time; each layer is read once a micro-batch and sweep.

Backward recomputes each layer from its saved input and is bit-equal to autograd through the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import CalibrationError
from .skeleton import Skeleton

Inputs = dict[str, Tensor]
LossFunction = Callable[[Tensor, Inputs], Tensor]
"""(logits (B, S, V), inputs) -> scalar summed loss."""


@dataclass(slots=True)
class LayerCall:
    """What a layer is called with besides its hidden states."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Trace:
    """One micro-batch's way into the layers.

    Attributes:
        hidden: (B, S, D) input of the first layer.
        calls: one a layer, in order of execution.
    """

    hidden: Tensor
    calls: list[LayerCall]


class NotChained(Exception):
    """The layers of this model do not simply pass one tensor on."""


def model_inputs(input_ids: Tensor, attention_mask: Tensor) -> Inputs:
    """Keyword arguments of the model for (B, S) token ids and a (B, S) boolean mask of real tokens.

    Without padding no mask is given, which lets attention take its causal fast path.
    """
    inputs: Inputs = {"input_ids": input_ids}
    if not bool(attention_mask.all()):
        inputs["attention_mask"] = attention_mask.long()
    return inputs


class LayerStreamer:
    """Streams micro-batches through the layers of a skeleton.

    Args:
        skeleton: the model; its root tensors are loaded here, its layers by the caller through `load` and `drop`.
        sample: one micro-batch, by which the order of the layers and the way to run are found.

    Attributes:
        names: layers in order of execution.
        chained: whether `trace`, `run` and `head` may be used; otherwise `drive_forward` and `drive_backward`.
    """

    def __init__(self, skeleton: Skeleton, sample: Inputs) -> None:
        self.skeleton = skeleton
        self.model = skeleton.model
        skeleton.load_root()
        try:
            self.names = [call.name for call in self.trace(sample).calls]
            self.chained = len(set(self.names)) == len(self.names) and self._one_tensor_out(sample)
        except NotChained:
            self.chained = False
        if not self.chained:
            self.names = list(dict.fromkeys(self._called_layers(sample)))

    # --- chained -------------------------------------------------------------------------------------------

    def trace(self, inputs: Inputs) -> Trace:
        """Runs the model with stand-ins for its layers.

        Raises:
            NotChained: something other than the hidden states flows from layer to layer.
        """
        calls: list[LayerCall] = []
        first: list[Tensor] = []
        previous: list[Tensor] = []

        def stand_in(name: str) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if previous and hidden_states is not previous[-1]:
                    raise NotChained(name)
                beside = tree_flatten((args, kwargs))[0]
                if any(isinstance(t, Tensor) and t.requires_grad for t in beside):
                    raise NotChained(name)
                if not previous:
                    first.append(hidden_states.detach())
                calls.append(LayerCall(name, args, kwargs))
                previous.append(hidden_states.detach().requires_grad_())
                return previous[-1]

            return forward

        try:
            with torch.enable_grad(), self._replaced(stand_in):
                self.model(use_cache=False, **self._on_device(inputs))
        except NotChained:
            raise
        except Exception as error:  # a stand-in's single tensor where the model unpacks a tuple
            raise NotChained(str(error)) from error
        if not calls:
            raise NotChained("no layer was called")
        return Trace(first[0], calls)

    def run(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """One loaded layer on one micro-batch, (B, S, D) -> (B, S, D)."""
        return self.skeleton.layers[call.name](hidden, *call.args, **call.kwargs)

    def head(self, inputs: Inputs, hidden: Tensor) -> Tensor:
        """(B, S, V) logits from the hidden states after the last layer, by the model's own forward."""
        last = self.names[-1]

        def stand_in(name: str) -> Callable[..., Tensor]:
            return lambda h, *args, **kwargs: hidden if name == last else h

        with self._replaced(stand_in):
            return self.model(use_cache=False, **self._on_device(inputs)).logits

    def vjp(self, call: LayerCall, hidden: Tensor, grad: Tensor, wanted: list[nn.Parameter]) -> list[Tensor | None]:
        """Gradients of one loaded layer: w.r.t. its input, then w.r.t. the `wanted` parameters.

        Args:
            call: the layer.
            hidden: (B, S, D) its saved input.
            grad: (B, S, D) gradient of the loss w.r.t. its output.
            wanted: parameters of the layer; they are made to require grad and left so.
        """
        for parameter in wanted:
            parameter.requires_grad_(True)
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            out = self.run(call, leaf)
        return list(torch.autograd.grad(out, [leaf, *wanted], grad, allow_unused=True))

    # --- driven --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def drive_forward(self, inputs: Inputs) -> Tensor:
        """(B, S, V) logits; the model's own forward loads each layer as it comes to it."""

        def stand_in(name: str) -> Callable[..., Any]:
            layer = self.skeleton.layers[name]
            own = type(layer).forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                self.skeleton.load(name)
                try:
                    return own(layer, *args, **kwargs)
                finally:
                    self.skeleton.drop(name)

            return forward

        with self._replaced(stand_in):
            return self.model(use_cache=False, **self._on_device(inputs)).logits

    def drive_backward(
        self,
        inputs: Inputs,
        loss: LossFunction,
        around: Callable[[str], Any],
        wanted: Callable[[str], list[nn.Parameter]] = lambda name: [],
        on_grads: Callable[[str, list[Tensor | None]], None] = lambda name, grads: None,
    ) -> Tensor:
        """Exact gradients for any model: every layer output is cut from the graph, glue keeps its graph.

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
        records: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

        def stand_in(name: str) -> Callable[..., Any]:
            layer = self.skeleton.layers[name]
            own = type(layer).forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                self.skeleton.load(name)
                with torch.no_grad():
                    out = own(layer, *args, **kwargs)
                self.skeleton.drop(name)
                out = tree_map(lambda t: t.detach().clone().requires_grad_() if _is_float(t) else t, out)
                records.append((name, args, kwargs, out))
                return out

            return forward

        with torch.enable_grad(), self._replaced(stand_in):
            total = loss(self.model(use_cache=False, **self._on_device(inputs)).logits, inputs)
        total.backward(retain_graph=True)
        for name, args, kwargs, outs in reversed(records):
            leaves = [t for t in tree_flatten(outs)[0] if _is_float(t)]
            if all(leaf.grad is None for leaf in leaves):
                continue
            layer = self.skeleton.load(name)
            parameters = wanted(name)
            for parameter in parameters:
                parameter.requires_grad_(True)
            olds: list[Tensor] = []
            news: list[Tensor] = []

            def cut(t: Any, olds: list[Tensor] = olds, news: list[Tensor] = news) -> Any:
                if not (_is_float(t) and t.requires_grad):
                    return t
                olds.append(t)
                news.append(t.detach().requires_grad_())
                return news[-1]

            own_args, own_kwargs = tree_map(cut, (args, kwargs))
            with torch.enable_grad(), around(name):
                outputs = [t for t in tree_flatten(layer(*own_args, **own_kwargs))[0] if _is_float(t)]
                pairs = [
                    (out, leaf.grad)
                    for out, leaf in zip(outputs, leaves, strict=True)
                    if leaf.grad is not None and out.requires_grad
                ]
                grads = torch.autograd.grad(
                    [out for out, _ in pairs],
                    [*news, *parameters],
                    [grad for _, grad in pairs],
                    allow_unused=True,
                )
            upstream = [(t, g) for t, g in zip(olds, grads, strict=False) if g is not None]
            if upstream:
                torch.autograd.backward([t for t, _ in upstream], [g for _, g in upstream], retain_graph=True)
            on_grads(name, list(grads[len(news) :]))
            for leaf in leaves:
                leaf.grad = None
            self.skeleton.drop(name)
        return total.detach()

    # --- shared --------------------------------------------------------------------------------------------

    def _one_tensor_out(self, sample: Inputs) -> bool:
        """Runs the first layer for real: only its result tells whether layers return plain tensors."""
        trace = self.trace(sample)
        call = trace.calls[0]
        self.skeleton.load(call.name)
        try:
            with torch.no_grad():
                return isinstance(self.run(call, trace.hidden), Tensor)
        except TypeError:
            return False
        finally:
            self.skeleton.drop(call.name)

    def _called_layers(self, sample: Inputs) -> Iterator[str]:
        called: list[str] = []

        def stand_in(name: str) -> Callable[..., Any]:
            layer = self.skeleton.layers[name]
            own = type(layer).forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                called.append(name)
                self.skeleton.load(name)
                try:
                    return own(layer, *args, **kwargs)
                finally:
                    self.skeleton.drop(name)

            return forward

        with torch.no_grad(), self._replaced(stand_in):
            self.model(use_cache=False, **self._on_device(sample))
        return iter(called)

    @contextmanager
    def _replaced(self, stand_in: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
        """Layers answer with `stand_in(name)` while the model's own forward runs."""
        for name, layer in self.skeleton.layers.items():
            layer.forward = stand_in(name)
        try:
            yield
        finally:
            for layer in self.skeleton.layers.values():
                del layer.forward

    def _on_device(self, inputs: Inputs) -> Inputs:
        return {key: value.to(self.skeleton.device) for key, value in inputs.items()}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def summed_nll(logits: Tensor, inputs: Inputs) -> Tensor:
    """Summed negative log-likelihood of the text's next tokens, padding left out, in fp32.

    Raises:
        CalibrationError: the loss is not finite.
    """
    return _nll(logits, inputs, inputs["input_ids"][:, 1:].to(logits.device))


def sampled_nll(generator: torch.Generator) -> LossFunction:
    """Like `summed_nll`, with next tokens drawn from the model itself: gives the true Fisher information."""

    def loss(logits: Tensor, inputs: Inputs) -> Tensor:
        probabilities = logits[:, :-1].detach().float().softmax(-1).cpu()
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
        return _nll(logits, inputs, drawn.view(probabilities.shape[:2]).to(logits.device))

    return loss


def _nll(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
    mask = inputs.get("attention_mask")
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none")
    if mask is not None:
        losses = losses * mask[:, 1:].flatten().to(losses)
    total = losses.sum()
    if not torch.isfinite(total):
        raise CalibrationError(
            f"loss of a calibration batch is {float(total)}: the model's activations overflow or its weights"
            " hold NaN; try calibration.dtype: float32"
        )
    return total

"""Runs a model one layer at a time, forward and exact backward, straight from its checkpoint.

The model's own `forward` is the only description of what happens around its layers. It is run with every decoder
layer replaced by a stand-in, which gives what each layer is called with besides the hidden states (masks, rotary
tables, positions: right by construction), and, with the last stand-in returning real hidden states, the head.

Two ways to run, same numbers:

* *chained*: each layer takes one tensor and gives one tensor to the next. Layers run one after the other over all
  micro-batches, each read once a sweep. Nearly every model.
* *driven* (driven.py): anything else, such as layers that hand tuples on, glue between layers, encoder-decoder.

Backward recomputes each layer from its saved input and is bit-equal to autograd through the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import CalibrationError
from .driven import DrivenModel, Inputs, LossFunction
from .grouped import use_tiled_products
from .skeleton import Skeleton


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


def model_inputs(input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Inputs:
    """Keyword arguments of the model for (B, S) token ids and a (B, S) boolean mask of real tokens.

    Without padding no mask is given, which lets attention take its causal fast path. (B, L) labels are the targets of
    an encoder-decoder model, -100 on padding.
    """
    inputs: Inputs = {"input_ids": input_ids}
    if labels is not None:
        inputs["labels"] = labels
    if not bool(attention_mask.all()):
        inputs["attention_mask"] = attention_mask.long()
    return inputs


class _AllCalled(Exception):
    """The last layer was reached: nothing after it is worth running."""


class LayerStreamer(DrivenModel):
    """Streams micro-batches through the layers of a skeleton.

    Args:
        skeleton: the model; its root tensors are loaded here, its layers by the caller through `load` and `drop`.
        sample: one micro-batch, by which the order of the layers and the way to run are found.

    Attributes:
        names: layers in order of execution.
        chained: whether `trace`, `run` and `head` may be used; otherwise `drive_forward` and `drive_backward`.
    """

    def __init__(self, skeleton: Skeleton, sample: Inputs) -> None:
        super().__init__(skeleton)
        use_tiled_products(skeleton.model)
        skeleton.load_root()
        self.names: list[str] = []
        called: list[str] = []
        try:
            trace = self.trace(sample)
            called = [call.name for call in trace.calls]
            self.chained = len(set(called)) == len(called) and self._gives_one_tensor(trace)
        except NotChained:
            self.chained = False
        if not self.chained:
            called.clear()
            self.drive_forward(sample, called.append)
        self.names = list(dict.fromkeys(called))

    def trace(self, inputs: Inputs) -> Trace:
        """Runs the model with stand-ins for its layers, as far as the last of them.

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
                if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves((args, kwargs))):
                    raise NotChained(name)
                if not previous:
                    first.append(hidden_states.detach())
                calls.append(LayerCall(name, args, kwargs))
                previous.append(hidden_states.detach().requires_grad_())
                if len(calls) == len(self.names):
                    raise _AllCalled
                return previous[-1]

            return forward

        try:
            with torch.enable_grad():
                self._logits(inputs, stand_in)
        except _AllCalled:
            pass
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

        return self._logits(inputs, stand_in)

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

    def _gives_one_tensor(self, trace: Trace) -> bool:
        """Runs the first layer for real: only its result tells whether layers return plain tensors."""
        first = trace.calls[0]
        self.skeleton.load(first.name)
        try:
            with torch.no_grad():
                return isinstance(self.run(first, trace.hidden), Tensor)
        except TypeError:
            return False
        finally:
            self.skeleton.drop(first.name)


def summed_nll(logits: Tensor, inputs: Inputs) -> Tensor:
    """Summed negative log-likelihood of the text's next tokens, or of the target's; padding left out, in fp32.

    Raises:
        CalibrationError: the loss is not finite.
    """
    return _nll(*_predictions(logits, inputs))


def sampled_nll(generator: torch.Generator) -> LossFunction:
    """Like `summed_nll`, with next tokens drawn from the model itself: gives the true Fisher information."""

    def loss(logits: Tensor, inputs: Inputs) -> Tensor:
        logits, labels, mask = _predictions(logits, inputs)
        probabilities = logits.detach().float().softmax(-1).cpu()
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
        return _nll(logits, drawn.view(labels.shape).to(labels), mask)

    return loss


def _predictions(logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, P, V) logits, the (B, P) ids they are to predict, and the (B, P) mask of those that are no padding."""
    if "labels" in inputs:
        labels = inputs["labels"].to(logits.device)
        return logits, labels, labels >= 0
    mask = inputs.get("attention_mask")
    return logits[:, :-1], inputs["input_ids"][:, 1:].to(logits.device), None if mask is None else mask[:, 1:]


def _nll(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    if mask is not None:
        losses = losses * mask.flatten().to(losses)
    total = losses.sum()
    if not torch.isfinite(total):
        raise CalibrationError(
            f"loss of a calibration batch is {float(total.detach())}: the model's activations overflow or its weights"
            " hold NaN; try calibration.dtype: float32"
        )
    return total

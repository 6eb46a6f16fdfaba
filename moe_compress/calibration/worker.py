"""One worker of the calibration: runs its layers forward and backward and gathers their statistics.

The layers are cut into chunks of consecutive layers, dealt to the workers in turn; a worker holds the weights of one
chunk at a time. With chunks of one layer and two workers, one runs layer i on micro-batch j+1 while the other runs
layer i+1 on micro-batch j, and memory is one layer each; with one chunk a worker, every worker owns one contiguous,
resident range. In-process the same object runs everything itself: the bytes of the result cannot differ, because each
statistic is summed by one worker in the order of the micro-batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.reader import CheckpointReader
from ..model.discovery import MoELayer
from ..model.grouped import use_tiled_products
from ..model.observer import ExpertObserver
from ..model.skeleton import Skeleton
from ..model.streamer import (
    Inputs,
    LayerCall,
    LayerStreamer,
    LossFunction,
    Trace,
    model_inputs,
    sampled_nll,
    summed_nll,
)
from ..process import give_back
from ..storage import node_scratch
from .activations import ActivationStore
from .statistics import SAMPLE_TOKENS, LayerStatistics
from .text import TokenBatch


@dataclass(frozen=True, slots=True)
class CalibrationSetup:
    """All a worker needs to know; plain data, so that it travels.

    Attributes:
        checkpoint: folder of the original.
        tokens: the packed calibration text, as `TokenBatch.save` wrote it.
        statistics: folder the statistics of each MoE layer are written to.
        scratch: folder for spilled activations.
        batch_size: sequences a micro-batch.
        dtype: to compute in; None for the checkpoint's.
        device: torch device, or `auto`.
        activation_bytes: activations kept in memory by each worker.
        full_grams: also sum the input Grams of the larger side.
        sampled_seed: seed of labels drawn from the model; None for the text's own.
        chunk_layers: layers a chunk.
        num_workers: workers that share the chunks.
        below: a compressed checkpoint of the original whose layers run the forward half, so that every layer of the
            original is observed on the hidden states that the compressed layers below it hand up; None for its own.
    """

    checkpoint: Path
    tokens: Path
    statistics: Path
    scratch: Path
    batch_size: int
    dtype: torch.dtype | None
    device: str
    activation_bytes: int
    full_grams: bool
    sampled_seed: int | None
    chunk_layers: int
    num_workers: int
    below: Path | None = None


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def statistics_path(folder: Path, experts_path: str) -> Path:
    """The statistics file of the experts module at `experts_path`."""
    return folder / f"{experts_path}.safetensors"


class LayerWorker:
    """Worker `index` of `setup.num_workers`.

    Driver's protocol, in this order: `forward` of every chunk and micro-batch, `loss` of every micro-batch on the
    worker of the last chunk, `backward` of every chunk from the last to the first, `finish` after each. Hidden states
    and gradients are passed only between workers: a chunk whose neighbour is on the same worker takes them from its
    own store and returns None.
    """

    def __init__(self, setup: CalibrationSetup, index: int = 0) -> None:
        self.setup, self.index = setup, index
        self.batches = list(TokenBatch.load(setup.tokens).batches(setup.batch_size))
        skeleton = Skeleton(CheckpointReader(setup.checkpoint), setup.dtype, pick_device(setup.device))
        self.skeleton = skeleton
        self.streamer = LayerStreamer(skeleton, self._inputs(0))
        self.forward_skeleton = skeleton if setup.below is None else self._open(setup.below)
        names, size = self.streamer.names, setup.chunk_layers
        self.chunks = [names[i : i + size] for i in range(0, len(names), size)]
        self.moe = {layer.path: layer for layer in skeleton.moe_layers()}
        self.store = ActivationStore(node_scratch(setup.scratch) / f"{index}-{os.getpid()}", setup.activation_bytes)
        self.statistics: dict[str, LayerStatistics] = {}
        self._loaded: tuple[Skeleton, int] | None = None
        self._traced: tuple[int, Trace] | None = None

    def describe(self) -> tuple[int, bool]:
        """(number of chunks, whether the model is chained; otherwise only `drive` may be used)."""
        return len(self.chunks), self.streamer.chained

    def forward(self, chunk: int, batch: int, hidden: Tensor | None) -> Tensor | None:
        """Runs one chunk on one micro-batch; `hidden` is None for the first chunk or if it is here already."""
        self._enter(self.forward_skeleton, chunk, chunk + self.setup.num_workers)
        trace = self._trace(batch)
        if chunk == 0:
            hidden = trace.hidden
        elif hidden is None:
            hidden = self.store.get((self.chunks[chunk][0], batch))
        for call in self._calls(trace, chunk):
            assert hidden is not None
            if (call.name, batch) not in self.store:
                self.store.put((call.name, batch), hidden)
            with torch.no_grad():
                hidden = self.forward_skeleton.layers[call.name](hidden, *call.args, **call.kwargs)
        return self._hand_on(hidden, chunk + 1, batch)

    def loss(self, batch: int) -> float:
        """Summed loss of one micro-batch; the gradient of the last layer's output stays here."""
        leaf = self.store.pop(("end", batch)).detach().requires_grad_()
        inputs = self._inputs(batch)
        with torch.enable_grad():
            total = self._loss_function(batch)(self.streamer.head(inputs, leaf), inputs)
        (grad,) = torch.autograd.grad(total, leaf)
        self.store.put(("grad", batch), grad)
        return total.item()

    def backward(self, chunk: int, batch: int, grad: Tensor | None) -> Tensor | None:
        """Recomputes one chunk on one micro-batch, gathers its statistics, gives the gradient of its input."""
        self._enter(self.skeleton, chunk, chunk - self.setup.num_workers)
        give_back()
        if grad is None:
            grad = self.store.pop(("grad", batch))
        for call in reversed(self._calls(self._trace(batch), chunk)):
            hidden = self.store.pop((call.name, batch))
            with self._observed(call.name, batch):
                (below,) = self.streamer.vjp(call, hidden, grad, [])
            assert below is not None
            grad = below
        return None if chunk == 0 else self._keep_grad(grad, chunk - 1, batch)

    def drive(self, batch: int) -> float:
        """The whole forward and backward of one micro-batch, for models that are not chained; summed loss."""
        loss = self.streamer.drive_backward(
            self._inputs(batch),
            self._loss_function(batch),
            lambda name: self._observed(name, batch),
        )
        return float(loss)

    def finish(self, chunk: int | None = None) -> list[str]:
        """Writes the statistics of a chunk's MoE layers (of all, after `drive`); returns their paths."""
        layers = self.streamer.names if chunk is None else self.chunks[chunk]
        done = [path for path in self.statistics if self.skeleton.owner(path) in layers]
        for path in done:
            self.statistics.pop(path).save(statistics_path(self.setup.statistics, path))
        return done

    # --- internals -----------------------------------------------------------------------------------------

    def _open(self, below: Path) -> Skeleton:
        """The compressed model, of which only layers are ever loaded: what is around them is the original's."""
        skeleton = Skeleton(CheckpointReader(below), self.skeleton.dtype, self.skeleton.device)
        use_tiled_products(skeleton.model)
        return skeleton

    def _inputs(self, batch: int) -> Inputs:
        tokens = self.batches[batch]
        return model_inputs(tokens.input_ids, tokens.attention_mask, tokens.labels)

    def _loss_function(self, batch: int) -> LossFunction:
        seed = self.setup.sampled_seed
        if seed is None:
            return summed_nll
        return sampled_nll(torch.Generator().manual_seed(seed * 1_000_003 + batch))

    def _calls(self, trace: Trace, chunk: int) -> list[LayerCall]:
        start = chunk * self.setup.chunk_layers
        return trace.calls[start : start + len(self.chunks[chunk])]

    def _trace(self, batch: int) -> Trace:
        """What the layers are called with; recomputed because keeping it would hold a mask a micro-batch."""
        if self._traced is None or self._traced[0] != batch:
            with torch.no_grad():
                self._traced = (batch, self.streamer.trace(self._inputs(batch)))
        return self._traced[1]

    def _enter(self, skeleton: Skeleton, chunk: int, following: int) -> None:
        if self._loaded == (skeleton, chunk):
            return
        if self._loaded is not None:
            before, dropped = self._loaded
            for name in self.chunks[dropped]:
                before.drop(name)
            give_back()
        for name in self.chunks[chunk]:
            skeleton.load(name)
        self._loaded = skeleton, chunk
        if 0 <= following < len(self.chunks):
            for name in self.chunks[following]:
                skeleton.prefetch(name)

    def _is_mine(self, chunk: int) -> bool:
        return chunk % self.setup.num_workers == self.index

    def _hand_on(self, hidden: Tensor | None, following: int, batch: int) -> Tensor | None:
        assert hidden is not None
        if following == len(self.chunks):
            self.store.put(("end", batch), hidden)
            return None
        if self._is_mine(following):
            self.store.put((self.chunks[following][0], batch), hidden)
            return None
        return hidden

    def _keep_grad(self, grad: Tensor, chunk: int, batch: int) -> Tensor | None:
        if not self._is_mine(chunk):
            return grad
        self.store.put(("grad", batch), grad)
        return None

    @contextmanager
    def _observed(self, name: str, batch: int) -> Iterator[None]:
        """Watches the MoE layers inside one decoder layer and adds what they saw to their statistics."""
        inside = [layer for path, layer in self.moe.items() if self.skeleton.owner(path) == name]
        observers = [self._observer(layer) for layer in inside]
        with ExitStack() as stack:
            for observer in observers:
                stack.enter_context(observer.watching())
            yield
        mask = self._mask(name, self.batches[batch])
        for observer in observers:
            seen = observer.take(None if bool(mask.all()) else mask.flatten())
            if seen is not None:
                self._sums(observer.layer).update(seen, *mask.shape)

    def _mask(self, name: str, tokens: TokenBatch) -> Tensor:
        """(B, S) which tokens of a decoder (or encoder) layer are no padding."""
        return tokens.target_mask if self.skeleton.is_in_decoder(name) else tokens.attention_mask

    def _observer(self, layer: MoELayer) -> ExpertObserver:
        experts = self.skeleton.model.get_submodule(layer.path)
        return ExpertObserver(layer, experts, self.skeleton.model.get_submodule(layer.path.rpartition(".")[0]))

    def _sums(self, layer: MoELayer) -> LayerStatistics:
        if layer.path not in self.statistics:
            name = self.skeleton.owner(layer.path)
            stride = -(-sum(int(self._mask(name, batch).sum()) for batch in self.batches) // SAMPLE_TOKENS)
            self.statistics[layer.path] = LayerStatistics(layer, self.setup.full_grams, self.skeleton.device, stride)
        return self.statistics[layer.path]


Call = Callable[..., object]

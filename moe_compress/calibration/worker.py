"""One worker of the calibration: runs its layers forward and backward and gathers their statistics.

The layers are cut into chunks of consecutive layers; a worker holds the weights of one chunk at a time and does the
steps it is given (schedule.py). With chunks of one layer and two workers, one runs layer i on micro-batch j+1 while the
other runs layer i+1 on micro-batch j, and memory is one layer each; with one chunk a worker, every worker owns one
contiguous, resident range. In-process the same object runs everything itself: the bytes of the result cannot differ,
because each statistic is summed by one worker in the order of the micro-batches.

Hidden states and gradients at the borders of chunks are handed in and out and kept by whoever runs the workers. Inside
a chunk they stay in the worker's store; what is not there, for this worker took the place of another, is made again.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
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
from ..retry import patiently
from ..storage import node_scratch
from .activations import ActivationStore
from .ranges import cut_to_fit
from .schedule import Step
from .statistics import SAMPLE_TOKENS, LayerStatistics, gram_shapes
from .text import TokenBatch

LAYERS_SHARE = 0.6
"""Of a worker's memory, for the layers of a chunk and their sums; the rest is for activations and what is outside."""


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
        chunk_layers: layers a chunk; None for as many as there is room for.
        memory_bytes: what a worker may hold, which decides how many that are.
        num_workers: workers that share the chunks, replicas among them.
        num_groups: groups of micro-batches that are summed apart, and then together: one a replica.
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
    chunk_layers: int | None
    num_workers: int
    num_groups: int = 1
    memory_bytes: int = 0
    below: Path | None = None

    @property
    def num_columns(self) -> int:
        """Workers that share the chunks for one group; chunks are dealt to them in turn."""
        return max(1, self.num_workers // self.num_groups)


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class TooEarly(Exception):
    """A micro-batch's turn to be summed has not come; one before it failed."""


@dataclass(frozen=True, slots=True)
class Description:
    """What the driver must know of a model.

    Attributes:
        chunks: names of the layers of each chunk.
        chained: otherwise the model is one chunk, and only `backward` and what follows may be asked for.
        token_bytes: size of the hidden states of a token.
    """

    chunks: list[list[str]]
    chained: bool
    token_bytes: int


def statistics_path(folder: Path, experts_path: str) -> Path:
    """The statistics file of the experts module at `experts_path`."""
    return folder / f"{experts_path}.safetensors"


def _part_path(folder: Path, experts_path: str, group: int) -> Path:
    """What one group of micro-batches adds to the statistics."""
    return folder / f".{experts_path}.{group}.part"


class LayerWorker:
    """Does the steps of one calibration that it is given.

    Args:
        setup: the calibration.
    """

    def __init__(self, setup: CalibrationSetup) -> None:
        self.setup = setup
        self.batches = list(patiently(TokenBatch.load, setup.tokens).batches(setup.batch_size))
        skeleton = Skeleton(patiently(CheckpointReader, setup.checkpoint), setup.dtype, pick_device(setup.device))
        self.skeleton = skeleton
        self.streamer = LayerStreamer(skeleton, self._inputs(0))
        self.forward_skeleton = skeleton if setup.below is None else self._open(setup.below)
        self.moe = {layer.path: layer for layer in skeleton.moe_layers()}
        self.chunks = self._cut(self.streamer.names)
        self.store = ActivationStore(node_scratch(setup.scratch) / secrets.token_hex(8), setup.activation_bytes)
        self.statistics: dict[tuple[str, int], LayerStatistics] = {}
        self._next: Counter[tuple[int, int]] = Counter()
        self._loaded: tuple[Skeleton, int] | None = None
        self._traced: tuple[int, Trace] | None = None

    def describe(self) -> Description:
        """The chunks and what goes between them."""
        width: int = self.skeleton.model.config.get_text_config().hidden_size
        return Description(self.chunks, self.streamer.chained, width * self.skeleton.dtype.itemsize)

    def run(self, step: Step, values: Sequence[Tensor]) -> tuple[Tensor | None, list[str]]:
        """Does one step.

        Args:
            step: what.
            values: what it needs, as `Schedule.needs` lists them.

        Returns:
            What it makes, if others may need it, and the paths of the experts whose statistics are on disk now.

        Raises:
            TooEarly: the sums of a step before this one were not taken.
        """
        kind, chunk, part = step
        values = [value.to(self.skeleton.device) for value in values]
        if kind == "forward":
            return self._forward(chunk, part, *values), []
        if kind == "loss":
            return self._loss(part, *values), []
        if kind == "gradient":
            return self._backward(chunk, part, values, summed=False), []
        if kind == "backward":
            group = part % self.setup.num_groups
            if self._next[chunk, group] != part // self.setup.num_groups:
                raise TooEarly(str(step))
            made = None
            if self.streamer.chained:
                made = self._backward(chunk, part, values, summed=True)
            else:
                self._drive(part)
            self._next[chunk, group] += 1
            return made, []
        if kind == "finish":
            return None, patiently(self._finish, chunk, part)
        return None, patiently(self._merge, chunk)

    def _forward(self, chunk: int, batch: int, hidden: Tensor | None = None) -> Tensor:
        """Runs one chunk on one micro-batch; the first one begins with the text."""
        self._enter(self.forward_skeleton, chunk, chunk + self.setup.num_columns)
        trace = self._trace(batch)
        if hidden is None:
            hidden = trace.hidden
        for call in self._calls(trace, chunk):
            if call.name != self.chunks[chunk][0] and (call.name, batch) not in self.store:
                self.store.put((call.name, batch), hidden)
            with torch.no_grad():
                hidden = self.forward_skeleton.layers[call.name](hidden, *call.args, **call.kwargs)
        assert hidden is not None
        return hidden

    def _loss(self, batch: int, hidden: Tensor) -> Tensor:
        """The gradient of the summed loss of one micro-batch with respect to the last layer's output."""
        leaf = hidden.detach().requires_grad_()
        inputs = self._inputs(batch)
        with torch.enable_grad():
            total = self._loss_function(batch)(self.streamer.head(inputs, leaf), inputs)
        (grad,) = torch.autograd.grad(total, leaf)
        return grad

    def _backward(self, chunk: int, batch: int, values: Sequence[Tensor], summed: bool) -> Tensor | None:
        """Recomputes one chunk on one micro-batch, gathers its statistics, gives the gradient of its input."""
        *below, grad = values
        names = self.chunks[chunk]
        if any((name, batch) not in self.store for name in names[1:]):
            self._forward(chunk, batch, *below)
        self._enter(self.skeleton, chunk, chunk - self.setup.num_columns)
        give_back()
        trace = self._trace(batch)
        first = below[0] if below else trace.hidden
        for call in reversed(self._calls(trace, chunk)):
            hidden = first if call.name == names[0] else self.store.pop((call.name, batch))
            with self._observed(call.name, batch) if summed else nullcontext():
                (grad_below,) = self.streamer.vjp(call, hidden, grad, [])
            assert grad_below is not None
            grad = grad_below
        return grad if chunk else None

    def _drive(self, batch: int) -> None:
        """The whole forward and backward of one micro-batch, for models that are not chained."""
        self.streamer.drive_backward(
            self._inputs(batch),
            self._loss_function(batch),
            lambda name: self._observed(name, batch),
        )

    def _finish(self, chunk: int, group: int) -> list[str]:
        """Writes the sums of a chunk's MoE layers; those of one group of several wait to be merged."""
        folder = self.setup.statistics
        mine = [key for key in self.statistics if self.skeleton.owner(key[0]) in self.chunks[chunk] and key[1] == group]
        alone = self.setup.num_groups == 1
        for path, _ in mine:
            target = statistics_path(folder, path) if alone else _part_path(folder, path, group)
            self.statistics[path, group].save(target)
        for key in mine:
            del self.statistics[key]
        return [path for path, _ in mine] if alone else []

    def _merge(self, chunk: int) -> list[str]:
        """Adds up what the groups saw of a chunk's MoE layers, in their order."""
        folder, done = self.setup.statistics, []
        for path, layer in self.moe.items():
            if self.skeleton.owner(path) not in self.chunks[chunk]:
                continue
            parts = [_part_path(folder, path, group) for group in range(self.setup.num_groups)]
            files = [file for file in parts if file.exists()]
            if files and not statistics_path(folder, path).exists():  # else whoever merged them died right after
                total = LayerStatistics.load(layer, files[0])
                for file in files[1:]:
                    total.merge(LayerStatistics.load(layer, file))
                total.save(statistics_path(folder, path))
            if statistics_path(folder, path).exists():
                done.append(path)
            for file in files:
                file.unlink()
        return done

    # --- internals -----------------------------------------------------------------------------------------

    def _cut(self, names: list[str]) -> list[list[str]]:
        """The chunks: all layers of a model that is not chained."""
        size = self.setup.chunk_layers if self.streamer.chained else len(names)
        if size is not None:
            return [names[i : i + size] for i in range(0, len(names), size)]
        sizes = [self._held_bytes(name) for name in names]
        ranges = cut_to_fit(sizes, self.setup.num_columns, LAYERS_SHARE * self.setup.memory_bytes)
        return [[names[i] for i in each] for each in ranges]

    def _held_bytes(self, name: str) -> int:
        """Weights of a layer, and the sums of its experts."""
        weights = sum(p.numel() for p in self.skeleton.layers[name].parameters()) * self.skeleton.dtype.itemsize
        inside = [layer for path, layer in self.moe.items() if self.skeleton.owner(path) == name]
        shapes = [shape for layer in inside for shape in gram_shapes(layer, self.setup.full_grams).values()]
        return weights + 4 * sum(map(prod, shapes))

    def _open(self, below: Path) -> Skeleton:
        """The compressed model, of which only layers are ever loaded: what is around them is the original's."""
        skeleton = Skeleton(patiently(CheckpointReader, below), self.skeleton.dtype, self.skeleton.device)
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
        return [call for call in trace.calls if call.name in self.chunks[chunk]]

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
                self._sums(observer.layer, batch % self.setup.num_groups).update(seen, *mask.shape)

    def _mask(self, name: str, tokens: TokenBatch) -> Tensor:
        """(B, S) which tokens of a decoder (or encoder) layer are no padding."""
        return tokens.target_mask if self.skeleton.is_in_decoder(name) else tokens.attention_mask

    def _observer(self, layer: MoELayer) -> ExpertObserver:
        experts = self.skeleton.model.get_submodule(layer.path)
        return ExpertObserver(layer, experts, self.skeleton.model.get_submodule(layer.path.rpartition(".")[0]))

    def _sums(self, layer: MoELayer, group: int) -> LayerStatistics:
        key = layer.path, group
        if key not in self.statistics:
            name = self.skeleton.owner(layer.path)
            stride = -(-sum(int(self._mask(name, batch).sum()) for batch in self.batches) // SAMPLE_TOKENS)
            self.statistics[key] = LayerStatistics(layer, self.setup.full_grams, self.skeleton.device, stride)
        return self.statistics[key]

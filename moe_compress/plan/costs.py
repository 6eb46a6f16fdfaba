"""Memory, disk, network and operations of a job, each by a formula.

A sequential job calibrates, factorises and compresses twice; its second sweep is counted like the first, though the
compressed layers that run forward there have fewer parameters.

Symbols: n tokens of the calibration text, b tokens of a micro-batch (batch_size x sequence_length), k experts a token,
D hidden_size, F intermediate_size, M rows of the first projection, E experts, V vocabulary, L layers, w bytes of an
element in the dtype computed in. The text may be shorter than the recipe asks for; then all that follows is less.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import ceil, prod
from pathlib import Path

import torch

from ..calibration.ranges import cut_to_fit
from ..calibration.statistics import SAMPLE_TOKENS, gram_shapes, gram_width, group_of, is_gram
from ..calibration.worker import LAYERS_SHARE
from ..method_options import D2MoE, Merge
from ..methods.forms import cluster_counts
from ..methods.limits import mean_rank
from ..methods.metric import experts_at_once
from ..methods.slots import Slot, slots
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS, matrix_shape
from ..model.stored_experts import BLOCK_BYTES
from ..recipe import Recipe
from .machine import TF32, Machine
from .outcome import Outcome
from .shape import ModelShape
from .speed import EIGEN

PROCESS_BYTES = 350_000_000
"""Interpreter and libraries, measured."""

DIRECTION_BYTES = 64
"""What the allocation holds for a direction of a matrix at its peak, measured."""

WINDOW_BYTES = 2**30
"""Hidden states that each streamed model keeps in memory during the evaluation."""

TEXT_BYTES_A_TOKEN = 4


class Workload:
    """The costs of a recipe on a model.

    Args:
        recipe: the job.
        model: the original's shape.
        result: what is left of the experts.
        bytes_after: size of the output.
        machine: the cluster to plan for; None for this machine.

    Attributes:
        dtype: calibration computes in it.
        passes: through the stages, from calibration to shards.
        num_workers: layer workers; num_units: units of work side by side.
        num_batches, num_chunks: micro-batches of the text and chunks of layers, of which the calibration's calls are.
        num_groups: of micro-batches whose statistics are summed apart, each by workers of its own.
        num_levels: of the output, each evaluated by itself.
    """

    def __init__(
        self, recipe: Recipe, model: ModelShape, result: Outcome, bytes_after: int, machine: Machine | None = None
    ) -> None:
        self.recipe, self.model, self.result, self.bytes_after = recipe, model, result, bytes_after
        self.machine = machine
        text = recipe.calibration
        self.dtype = model.dtype if text.dtype == "auto" else getattr(torch, text.dtype)
        self.num_tokens = text.num_sequences * text.sequence_length
        self.batch_tokens = min(text.batch_size, text.num_sequences) * text.sequence_length
        self.full = text.full_covariance == "always" or recipe.method.needs_full_covariance
        self.passes = 2 if recipe.method.sequential else 1
        self.num_workers, self.num_units = _side_by_side(recipe, machine)
        self.num_batches = ceil(text.num_sequences / text.batch_size)
        self.num_groups = min(recipe.cluster.replicas, self.num_batches)
        self.resident_layers = self._resident_layers()
        self.num_chunks = ceil(model.num_layers / self.resident_layers)
        self.num_levels = 1 + len(getattr(recipe.method, "levels", []))

    def _resident_layers(self) -> int:
        """Of `auto` a worker's share, or what of it fits into the memory that is known of a worker."""
        asked, memory_gb = self.recipe.cluster.resident_layers, self.recipe.cluster.worker_memory_gb
        if isinstance(asked, int):
            return asked
        columns = max(1, self.num_workers // self.num_groups)
        of_gpu = None if self.machine is None else self.machine.memory_bytes
        memory = of_gpu if memory_gb is None else memory_gb * 2**30
        if memory is None:
            return ceil(self.model.num_layers / columns)
        layer = self.model.largest_layer * self.dtype.itemsize + max(map(self._statistics_bytes, self.model.layers))
        ranges = cut_to_fit([layer] * self.model.num_layers, columns, LAYERS_SHARE * memory)
        return max(map(len, ranges))

    # --- bytes ---------------------------------------------------------------------------------------------

    def memory_bytes(self) -> dict[str, dict[str, int]]:
        """What each kind of process holds at its peak."""
        memory = {"calibration worker": self._calibration_memory(), "factorisation task": self._unit_memory()}
        if self.recipe.evaluation is not None:
            memory["evaluation task"] = self._evaluation_memory()
        memory["driver"] = {"libraries": PROCESS_BYTES, "allocation": self.num_directions() * DIRECTION_BYTES}
        return memory

    def num_directions(self) -> int:
        """What the budget is spent on: min(M, N) of every factorised matrix."""
        return sum(min(slot.num_rows, slot.num_columns) * layer.num_experts for layer, slot in self._slots())

    def _calibration_memory(self) -> dict[str, int]:
        """Always there: root tensors and the resident layers, in w, and boundary activations up to their limit.

        On top, the largest of: the second copy of a fused tensor while it is assembled; the statistics of the
        resident layers and one layer's backward; the loss. Prefetching takes page cache only. A layer's backward
        holds b k (5 D + 2 M + 2 F) routed values (inputs, projections, outputs, and the gradients of each) and
        b (8 D + 4 A), A the attention's width; the loss V values a token: logits twice and their gradient in w, and
        three times in fp32.
        """
        model, width = self.model, self.dtype.itemsize
        resident = self.resident_layers
        routed = max(5 * l.hidden_size + 2 * l.up_shape[0] + 2 * l.intermediate_size for l in model.layers)
        beside = 8 * model.hidden_size + 4 * model.attention_width
        backward = self.batch_tokens * (model.top_k * routed + beside) * width
        statistics = resident * max(self._statistics_bytes(layer) for layer in model.layers)
        peaks = [
            {"assembly of a tensor": model.largest_tensor * model.dtype.itemsize},
            {"statistics": statistics, "backward of a micro-batch": backward},
            {"loss of a micro-batch": self.batch_tokens * model.vocab_size * (3 * width + 12)},
        ]
        return {
            "libraries": PROCESS_BYTES,
            "embeddings and head": model.root_parameters * width,
            "resident layers": resident * model.largest_layer * width,
            "activations between layers": min(self.boundary_bytes() // self.num_workers, self._activation_limit()),
        } | max(peaks, key=lambda peak: sum(peak.values()))

    def _unit_memory(self) -> dict[str, int]:
        """One group of one layer: its factors, a block of its experts twice while they are assembled (all of them where
        experts are compared), two of the layer's Grams, and some matrices in fp32: four an expert, of one expert on a
        CPU, of a block on a GPU."""
        layer = max(self.model.layers, key=lambda each: each.num_parameters)
        width, method = self.model.dtype.itemsize, self.recipe.method
        at_once = {group: experts_at_once(layer, group, self._on_gpu()) for group in GROUPS}
        sizes = {group: prod(matrix_shape(layer, group)) for group in GROUPS}
        by_block = isinstance(method, D2MoE) and not method.align
        block = (
            max(BLOCK_BYTES, *(at_once[g] * sizes[g] * width for g in GROUPS))
            if by_block
            else self.model.largest_tensor * width
        )
        shapes = gram_shapes(layer, self.full)
        for name in filter(is_gram, shapes):
            sizes[group_of(name)] = max(sizes[group_of(name)], gram_width(layer, name) ** 2)
        return {
            "libraries": PROCESS_BYTES,
            "factors": self.model.largest_tensor * width,
            "experts": 2 * block,
            "statistics": 2 * 4 * max(prod(shape) for shape in shapes.values()),
            "arithmetic": 4 * 4 * max(at_once[group] * sizes[group] for group in GROUPS),
        }

    def _evaluation_memory(self) -> dict[str, int]:
        """Of both checkpoints the root tensors and the hidden states of the windows, up to a limit each; on top the
        larger of one layer with a fused tensor being assembled, beside two logits of a window, and seven logits of a
        window (of both models, their logarithms, a probability, a difference and its product)."""
        settings = self.recipe.evaluation
        assert settings is not None
        model, tokens = self.model, self._evaluation_tokens()
        width = (model.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)).itemsize
        hidden = ceil(tokens / self.num_units) * model.hidden_size * width
        logits = min(settings.sequence_length, tokens) * model.vocab_size * 4
        layer = model.largest_layer * width
        assembly = model.largest_tensor * model.dtype.itemsize
        peaks = [
            {"resident layer": layer, "assembly of a tensor": assembly, "logits of a window": 2 * logits},
            {"logits of a window": 7 * logits},
        ]
        return {
            "libraries": PROCESS_BYTES,
            "embeddings and heads": 2 * model.root_parameters * width,
            "activations between layers": 2 * min(hidden, WINDOW_BYTES),
        } | max(peaks, key=lambda peak: sum(peak.values()))

    def disk_bytes(self) -> dict[str, int]:
        """Job folder and output. The output is made of hard links to the job's shards where the disk allows them.

        Statistics: fp32 Grams of all layers. Spectra: min(M, N) fp32 energies a matrix. First pass: shards like the
        output's. Spilled: what of the L n D w activations exceeds the workers' limits; gone after the calibration.
        Tokens: nine bytes each.
        """
        energies = 4 * self.num_directions()
        spilled = self.boundary_bytes() - self.num_workers * self._activation_limit()
        return {
            "statistics": self.passes * sum(self._statistics_bytes(layer) for layer in self.model.layers),
            "spectra": self.passes * energies,
            "first pass": (self.passes - 1) * self.bytes_after,
            "output": self.bytes_after,
            "spilled activations": max(spilled, 0),
            "tokens": 9 * (self.num_tokens + self._evaluation_tokens()),
        }

    def network_bytes(self) -> int:
        """Hidden states forward and gradients back over every border of two workers: 2 (chunks - 1) n D w a pass."""
        if self.num_workers == 1:
            return 0
        return self.passes * 2 * (self.num_chunks - 1) * self.num_tokens * self.model.hidden_size * self.dtype.itemsize

    def boundary_bytes(self) -> int:
        """The input of every layer for the whole text: L n D w."""
        return self.model.num_layers * self.num_tokens * self.model.hidden_size * self.dtype.itemsize

    def _activation_limit(self) -> int:
        return int(self.recipe.calibration.activation_memory_gb * 2**30)

    def _statistics_bytes(self, layer: MoELayer) -> int:
        """Matrix sums in fp32, and the router's E^2 in fp64; of vectors E (2 D + F) in fp32, and the sampled tokens: D
        and k in w, k ids."""
        grams = sum(prod(shape) for shape in gram_shapes(layer, self.full).values())
        vectors = layer.num_experts * (2 * layer.hidden_size + layer.intermediate_size)
        sampled = self.num_tokens // ceil(self.num_tokens / SAMPLE_TOKENS)
        width, top_k = self.dtype.itemsize, self.model.top_k
        return (
            4 * (grams + vectors)
            + 8 * layer.num_experts**2
            + sampled * (layer.hidden_size * width + top_k * (width + 8))
        )

    # --- operations ----------------------------------------------------------------------------------------

    def flops(self) -> dict[str, float]:
        """Operations of each stage; a multiplication and an addition are two."""
        length = self.recipe.calibration.sequence_length
        eigen, products = self._factorisation_flops()
        return {
            "calibrate: model": self.passes * 3 * self._forward_flops(self.num_tokens, length),
            "calibrate: statistics": self.passes * self._statistics_flops(),
            "factorise: eigendecompositions": self.passes * eigen,
            "factorise: products": self.passes * products,
            "merge: alignment": self._alignment_flops(),
            "evaluate": self._evaluation_flops(),
        }

    def seconds(self, stage: str, flops: float, speed: dict[str, float]) -> float:
        """Time of a stage, all its processes busy at the speed measured here for its kind of work."""
        calibrating = stage.startswith("calibrate")
        kind = "float32"
        if stage == "calibrate: model":
            kind = str(self.dtype).removeprefix("torch.")
        elif stage == "calibrate: statistics" and self.dtype != torch.float32 and TF32 in speed:
            kind = TF32
        elif stage.endswith("eigendecompositions"):
            kind = EIGEN
        return flops / speed[kind] / (self.num_workers if calibrating else self.num_units)

    def _forward_flops(self, num_tokens: int, sequence_length: int) -> float:
        """2 n (active parameters) + 2 n L S A: the causal half of scores and mixing over S tokens, A wide.

        A calibration is three: forward, the same again, and the gradient of the inputs.
        """
        model = self.model
        attention = 2 * model.num_layers * sequence_length * model.attention_width
        return float(num_tokens) * (2 * model.active_parameters + attention)

    def _statistics_flops(self) -> float:
        """A routed pair: 2 for each element of a packed Gram or of a diagonal; Fisher 2 r (M + N) for each projection,
        r tokens that an expert sees of a sequence. A token: 2 E^2 for the router's Gram."""
        total = 0.0
        length = self.recipe.calibration.sequence_length
        for layer in self.model.layers:
            grams = sum(2 * prod(shape[1:]) for shape in gram_shapes(layer, self.full).values())
            widths = sum(layer.up_shape) + sum(layer.down_shape)
            segment = length * self.model.top_k / layer.num_experts
            pair = grams + 2 * segment * widths
            total += self.num_tokens * (self.model.top_k * pair + 2 * layer.num_experts**2)
        return total

    def _factorisation_flops(self) -> tuple[float, float]:
        """(eigendecompositions, products), of all matrices, once for the energies and once for the factors.

        K = min(M, N), r the uniform rank: 9 K^3 of the problem; where N is the smaller side also 9 N^3 for the root
        of the covariance and M N^2 + 3 N^3 of products; 2 M N r for the factors (linalg/factorisation.py).
        """
        options = self.result.factorised
        eigen = products = 0.0
        if options is None:
            return eigen, products
        for layer, slot in self._slots():
            m, n = slot.num_rows, slot.num_columns
            side = min(m, n)
            rank, right = max(mean_rank(layer, slot, options), 0), n <= m
            times = 2 + ((options.num_bases, options.share).count("budget")) * len(cluster_counts(layer.num_experts))
            eigen += layer.num_experts * times * (9 * side**3 + (9 * n**3 if right else 0))
            products += layer.num_experts * (times * (m * n**2 + 3 * n**3 if right else 0) + 2 * m * n * rank)
        return eigen, products

    def _alignment_flops(self) -> float:
        """2 F (M D + D F) for every expert that joins another, one product; the assignments come on top."""
        options = self.recipe.method
        if not isinstance(options, Merge) or options.align == "none":
            return 0.0
        return sum(
            2.0
            * (layer.num_experts - left.num_experts)
            * layer.intermediate_size
            * (prod(layer.up_shape) + prod(layer.down_shape))
            for layer, left in zip(self.model.layers, self.result.layers, strict=True)
        )

    def _evaluation_flops(self) -> float:
        """Two forwards, original and compressed, for each level."""
        if self.recipe.evaluation is None:
            return 0.0
        return (
            2 * self.num_levels * self._forward_flops(self._evaluation_tokens(), self.recipe.evaluation.sequence_length)
        )

    def num_evaluation_batches(self) -> int:
        """Micro-batches of windows."""
        settings = self.recipe.evaluation
        if settings is None:
            return 0
        return ceil(self._evaluation_tokens() / (settings.sequence_length * settings.batch_size))

    def _evaluation_tokens(self) -> int:
        """The windows asked for; for a whole text its size, four bytes a token, and nothing if it is not there."""
        settings = self.recipe.evaluation
        if settings is None or not isinstance(settings.text, list):
            return 0
        sizes = [path.stat().st_size for path in map(Path, settings.text) if path.is_file()]
        tokens = sum(sizes) // TEXT_BYTES_A_TOKEN
        if settings.max_windows is None:
            return tokens
        asked = settings.max_windows * settings.sequence_length
        return min(asked, tokens) if sizes else asked

    def _slots(self) -> Iterator[tuple[MoELayer, Slot]]:
        options = self.result.factorised
        if options is None:
            return
        for layer in self.result.layers:
            for group in GROUPS:
                for slot in slots(layer, group, options):
                    yield layer, slot

    def _on_gpu(self) -> bool:
        if self.machine is not None:
            return True
        device = self.recipe.cluster.device
        return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _side_by_side(recipe: Recipe, machine: Machine | None) -> tuple[int, int]:
    """(layer workers, units of work side by side), as the executor will choose there, or on a machine like this one."""
    cluster = recipe.cluster
    if machine is not None:
        return min(cluster.layer_workers or machine.num_gpus, machine.num_gpus), machine.num_gpus
    if cluster.local:
        return 1, 1
    num_gpus = torch.cuda.device_count()
    slots_here = max(1, (os.cpu_count() or 1) // cluster.threads)
    num_workers = cluster.layer_workers or num_gpus or min(2, slots_here)
    return num_workers, max(num_workers, num_gpus or slots_here)

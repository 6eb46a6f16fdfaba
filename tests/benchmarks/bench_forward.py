"""Speed of a compressed layer beside the original's, in the same process, measured in turn.

    python -m tests.benchmarks.bench_forward [--shape coarse|fine] [--dtype float32|bfloat16]

The original runs by the fastest of all implementations that transformers offers on this device, and by ours for stock
experts (model/grouped.py). 40 % of its parameters are gone: ranks vary from expert to expert as an allocation's do,
gate and up are one slot; once without a base, once with a base and deltas at the same bytes, and once with half of
the base's columns skipped at run time. Prefill of 2048 tokens,
decode of batches that never repeat one routing after the other.

Times are CPU time of one thread: others may share the machine. Ratios are medians over neighbours in time; above 1 the
compressed layer is faster. FLOPs and bytes a token are those of the matrices that the routing asks for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_compress.model import grouped  # noqa: F401  registers tiled_mm
from moe_compress.model.experts import FactorisedExperts
from moe_compress.model.slots import DENSE, FactorisedSlot

REMOVED = 0.4
PREFILL_TOKENS = 2048
BATCHES = (1, 8, 32)
ROUTINGS = 4
"""Different routings that a measurement goes through."""


@dataclass(frozen=True)
class Shape:
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int


SHAPES = {"coarse": Shape(8, 2, 1024, 3584), "fine": Shape(64, 8, 1024, 512)}
Call = tuple[Tensor, Tensor, Tensor]


def ranks_like_allocated(
    rows: int, columns: int, num_experts: int, budget: int, generator: torch.Generator
) -> list[int]:
    """Ranks of log-normal spread whose factors take `budget` parameters; whole beyond the break-even rank."""
    spread = (0.35 * torch.randn(num_experts, generator=generator)).exp()
    break_even = rows * columns // (rows + columns)

    def at(scale: float) -> list[int]:
        return [r if r < break_even else DENSE for r in (scale * spread).int().tolist()]

    def size(ranks: list[int]) -> int:
        return sum(rows * columns if r == DENSE else r * (rows + columns) for r in ranks)

    low, high = 0.0, 10.0 * break_even
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle)) <= budget else (low, middle)
    return at(low)


def specification(shape: Shape, has_base: bool, skip: float) -> dict[str, Any]:
    """40 % of the parameters removed from each slot."""
    generator = torch.Generator().manual_seed(0)
    D, F, E = shape.hidden_size, shape.intermediate_size, shape.num_experts
    spec: dict[str, Any] = {}
    for name, rows, columns in (("gate_up", 2 * F, D), ("down", D, F)):
        budget = int((1 - REMOVED) * E * rows * columns) - has_base * rows * columns
        spec[name] = {"ranks": ranks_like_allocated(rows, columns, E, budget, generator)}
        if has_base:
            spec[name] |= {"bases": [0] * E, "skip": skip}
    return spec


@torch.no_grad()
def build(shape: Shape, dtype: torch.dtype) -> tuple[Any, dict[str, FactorisedExperts]]:
    """The original of random weights, and its compressed forms."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    original = MixtralExperts(config).to(dtype)
    compressed = {
        name: FactorisedExperts(original, specification(shape, has_base, skip))
        for name, has_base, skip in (
            ("no base", False, 0.0),
            ("base + deltas", True, 0.0),
            ("half of base + deltas", True, 0.5),
        )
    }
    for module in (original, *compressed.values()):
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return original, compressed


def calls(shape: Shape, num_tokens: int, dtype: torch.dtype) -> list[Call]:
    """Inputs of some calls; each token's experts are drawn at random."""
    generator = torch.Generator().manual_seed(num_tokens)
    found = []
    for _ in range(1 if num_tokens == PREFILL_TOKENS else ROUTINGS):
        hidden = torch.randn(num_tokens, shape.hidden_size, generator=generator).to(dtype)
        scores = torch.rand(num_tokens, shape.num_experts, generator=generator)
        weights, index = scores.softmax(-1).topk(shape.top_k)
        found.append((hidden, index, (weights / weights.sum(-1, keepdim=True)).to(dtype)))
    return found


def once(module: Any, inputs: list[Call]) -> float:
    """CPU seconds of one round."""
    began = time.thread_time()
    for each in inputs:
        module(*each)
    return time.thread_time() - began


def fastest_implementation(original: Any, inputs: list[Call]) -> tuple[str, float]:
    """Name, and seconds of a round, of the original's best implementation; those that cannot run here are left out."""
    seconds = {}
    for name in ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()):
        if name == "batched_mm" and len(inputs[0][0]) == PREFILL_TOKENS and original.down_proj.device.type == "cpu":
            continue  # copies two whole matrices for every routed pair
        original.config._experts_implementation = name
        try:
            once(original, inputs)
            seconds[name] = min(once(original, inputs) for _ in range(3))
        except (ImportError, RuntimeError, ValueError, AttributeError, OSError):
            continue
    best = min(seconds, key=lambda name: seconds[name])
    original.config._experts_implementation = best
    return best, seconds[best]


def work(shape: Shape, slots: list[FactorisedSlot], inputs: list[Call]) -> tuple[float, float]:
    """FLOPs, and parameters read, a token; the original's where there are no slots."""
    flops = read = 0.0
    for _, index, _ in inputs:
        counts = torch.bincount(index.flatten(), minlength=shape.num_experts).tolist()
        if not slots:
            size = 3 * shape.hidden_size * shape.intermediate_size
            flops += sum(2 * count * size for count in counts)
            read += sum(size for count in counts if count)
        for slot in slots:
            M, N = slot.num_rows, slot.num_columns
            sizes = [M * N if rank == DENSE else rank * (M + N) for rank in slot.ranks]
            flops += sum(2 * count * size for count, size in zip(counts, sizes, strict=True))
            read += sum(size for count, size in zip(counts, sizes, strict=True) if count)
            flops += 2 * slot.num_bases * M * slot.num_kept_columns * len(index)
            read += slot.num_bases * M * slot.num_kept_columns
    tokens = sum(len(index) for _, index, _ in inputs)
    return flops / tokens, read / tokens


def gemm_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of the best of five square products."""
    a, b = torch.randn(2, size, size).to(dtype)

    def product() -> float:
        began = time.thread_time()
        a @ b
        return time.thread_time() - began

    return 2 * size**3 / min(product() for _ in range(5))


def rounds_of(seconds: float, budget_s: float) -> int:
    """Rounds that fit a budget."""
    return max(5, min(200, int(budget_s / max(seconds, 1e-9))))


@torch.no_grad()
def bench(shape: Shape, dtype: torch.dtype, budget_s: float, show: Callable[[str], None]) -> dict[str, float]:
    """Ratios original / compressed by case, printed on the way."""
    original, compressed = build(shape, dtype)
    ratios = {}
    for num_tokens in (PREFILL_TOKENS, *BATCHES):
        inputs = calls(shape, num_tokens, dtype)
        best, seconds = fastest_implementation(original, inputs)
        original_flops, original_read = work(shape, [], inputs)
        for name, module in compressed.items():
            once(module, inputs)
            pairs = [(once(original, inputs), once(module, inputs)) for _ in range(rounds_of(seconds, budget_s))]
            case = f"{'prefill' if num_tokens == PREFILL_TOKENS else 'decode'} {num_tokens}, {name}"
            ratios[case] = median(before / after for before, after in pairs)
            before, after = (median(times) / len(inputs) for times in zip(*pairs, strict=True))
            flops, read = work(shape, module.slots, inputs)
            width = dtype.itemsize / 1e6
            show(
                f"  {case:35}{ratios[case]:5.2f}x   {before * 1e3:8.2f} -> {after * 1e3:8.2f} ms"
                f"   {original_flops / 1e6:5.0f} -> {flops / 1e6:4.0f} MFLOP ({original_flops / flops:.2f}x)"
                f"   {original_read * width:7.2f} -> {read * width:7.2f} MB ({original_read / read:.2f}x)"
                f"   {flops * num_tokens / after / 1e9:4.0f} GFLOP/s   original by {best}"
            )
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of the original a case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; FLOPs and MB a token")
    for dtype_name in [args.dtype] if args.dtype else ["bfloat16", "float32"]:
        dtype = getattr(torch, dtype_name)
        print(f"{dtype_name}: GEMM peak {gemm_peak(dtype) / 1e9:.0f} GFLOP/s")
        for name in [args.shape] if args.shape else list(SHAPES):
            print(f" {name}: {SHAPES[name]}")
            bench(SHAPES[name], dtype, args.budget, print)


if __name__ == "__main__":
    main()

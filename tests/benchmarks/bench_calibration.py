"""What the statistics cost: calibration with all of them beside the bare forward and backward of the same layers.

    python -m tests.benchmarks.bench_calibration [--shape coarse|fine] [--dtype float32|bfloat16]

Three workers run the same micro-batches in turn: *stock*, with nothing watched and the experts as transformers runs
them; *bare*, with nothing watched and the experts as we run them (the same in fp32, model/grouped.py in bf16); and
*observed*, all statistics. Ratios are of neighbours in time, so they hold on a machine that others use too; CPU time
leaves their share out, wall time does not.

FLOP/s count what the mathematics needs: products of attention's projections, of the routed experts, the triangles of
symmetric products. Attention's own products, filler and mirrored halves are not counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from moe_compress.calibration.schedule import Kind, Step
from moe_compress.calibration.text import TokenBatch
from moe_compress.calibration.worker import CalibrationSetup, LayerWorker
from moe_compress.model.discovery import MoELayer
from moe_compress.process import settle

VOCAB_SIZE = 512


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_layers: int = 2
    batch_size: int = 8
    sequence_length: int = 256


SHAPES = {"coarse": Shape(1024, 3584, 8, 2), "fine": Shape(1024, 512, 32, 8)}


class BareWorker(LayerWorker):
    """The same sweep, nothing observed."""

    @contextmanager
    def _observed(self, name: str, batch: int) -> Iterator[None]:
        yield


class StockWorker(BareWorker):
    """The same, with the experts as transformers runs them."""

    def __init__(self, setup: CalibrationSetup) -> None:
        super().__init__(setup)
        self.skeleton.model.set_experts_implementation("grouped_mm")


WORKERS = {"stock": StockWorker, "bare": BareWorker, "observed": LayerWorker}
STAGES = ("forward", "backward")


def num_heads(shape: Shape) -> int:
    """Of 64 columns each."""
    return shape.hidden_size // 64


def num_key_value_heads(shape: Shape) -> int:
    """A quarter of them."""
    return max(num_heads(shape) // 4, 1)


def write_model(folder: Path, shape: Shape) -> None:
    """A Mixtral of random weights."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=num_heads(shape),
        num_key_value_heads=num_key_value_heads(shape),
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    MixtralForCausalLM(config).save_pretrained(folder)


def stage_flop(layer: MoELayer, shape: Shape) -> dict[str, float]:
    """Floating-point operations of a micro-batch: of a forward of all layers, and of their statistics."""
    (M, D), F = layer.up_shape, layer.intermediate_size
    tokens = shape.num_layers * shape.batch_size * shape.sequence_length
    pairs = tokens * shape.top_k
    head = D // num_heads(shape) * num_key_value_heads(shape)
    attention = tokens * 2 * D * (2 * D + 2 * head)
    grams = sum(width**2 for width in (min(M, D), min(M, D), min(D, F), min(D, F)))
    grams += D**2 if D <= F else 0  # the gradient's, on the output side alone
    grams += M**2 if M < D else 0
    tokens_a_segment = shape.sequence_length * shape.top_k / shape.num_experts
    fisher = tokens_a_segment * (M + D + D + F)
    return {"forward": attention + pairs * 2 * (D * M + F * D), "statistics": pairs * (grams + fisher)}


def gemm_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of the best of five square products."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / min(_timed(lambda: a @ b)[0] for _ in range(5))


def _timed(action: object) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    action()  # type: ignore[operator]
    return time.process_time() - cpu, time.perf_counter() - wall


_worker: LayerWorker
"""The one of this process: each has its own, because the products that one compiles would push out another's."""


def _start(label: str, setup: CalibrationSetup) -> None:
    global _worker
    settle(1)
    _worker = WORKERS[label](setup)


def _sweep(batch: int) -> dict[str, tuple[float, float]]:
    values: list[Tensor] = []

    def run(kind: Kind) -> None:
        made, _ = _worker.run(Step(kind, 0, batch), values)
        values[:] = [] if made is None else [made]

    return {
        "forward": _timed(lambda: run("forward")),
        "loss": _timed(lambda: run("loss")),
        "backward": _timed(lambda: run("backward")),
    }


def _stage_flop(shape: Shape) -> dict[str, float]:
    return stage_flop(next(iter(_worker.moe.values())), shape)


def run(shape: Shape, dtype: torch.dtype, num_batches: int, full: bool = False) -> dict[str, float]:
    """Median CPU seconds of a micro-batch by worker and stage, its FLOP/s, medians of the ratios of whole sweeps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", shape)
        rows = (num_batches + 1) * shape.batch_size
        ids = torch.randint(VOCAB_SIZE, (rows, shape.sequence_length), generator=torch.Generator().manual_seed(0))
        TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool)).save(folder / "tokens.safetensors")
        setup = CalibrationSetup(
            checkpoint=folder / "model",
            tokens=folder / "tokens.safetensors",
            statistics=folder,
            scratch=folder / "scratch",
            batch_size=shape.batch_size,
            dtype=dtype,
            device="cpu",
            activation_bytes=2**32,
            full_grams=full,
            sampled_seed=None,
            chunk_layers=shape.num_layers,
            num_workers=1,
        )
        times: dict[str, list[tuple[float, float]]] = {}
        with ExitStack() as stack:
            processes = {
                label: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), _start, (label, setup)))
                for label in WORKERS
            }
            for batch in range(num_batches + 1):
                for label, process in processes.items():
                    taken = process.submit(_sweep, batch).result()
                    if batch == 0:  # loads the layers, compiles products
                        continue
                    for stage, seconds in taken.items():
                        times.setdefault(f"{label} {stage}", []).append(seconds)
                    total = (sum(t[0] for t in taken.values()), sum(t[1] for t in taken.values()))
                    times.setdefault(label, []).append(total)
            flop = processes["observed"].submit(_stage_flop, shape).result()
    result = {f"{key} s": median(cpu for cpu, _ in values) for key, values in times.items()}
    for label in WORKERS:
        statistics = flop["statistics"] if label == "observed" else 0
        result[f"{label} forward flops"] = flop["forward"] / result[f"{label} forward s"]
        result[f"{label} backward flops"] = (2 * flop["forward"] + statistics) / result[f"{label} backward s"]
    for against in ("stock", "bare"):
        for i, clock in enumerate(("CPU", "wall")):
            pairs = zip(times["observed"], times[against], strict=True)
            result[f"observed / {against} {clock}"] = median(o[i] / b[i] for o, b in pairs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="coarse")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="also the input Grams of the larger side")
    args = parser.parse_args()
    settle(1)
    shape = replace(SHAPES[args.shape], batch_size=args.batch_size, sequence_length=args.sequence_length)
    dtype = getattr(torch, args.dtype)
    peak = gemm_peak(dtype)
    result = run(shape, dtype, args.batches, args.full)
    print(f"{shape}, {args.dtype}, one thread, torch {torch.__version__}, {sys.platform}")
    print(f"GEMM peak {peak / 1e9:.0f} GFLOP/s")
    for label in WORKERS:
        print(f"{label:9}{result[f'{label} s']:7.3f} s CPU a micro-batch")
        for stage in STAGES:
            seconds, flops = (result[f"{label} {stage} {unit}"] for unit in ("s", "flops"))
            print(f"  {stage:9}{seconds:5.3f} s  {flops / 1e9:5.0f} GFLOP/s, {flops / peak:.0%} of the peak")
    for against in ("stock", "bare"):
        cpu, wall = (result[f"observed / {against} {clock}"] for clock in ("CPU", "wall"))
        print(f"observed / {against}: {cpu:.2f} CPU, {wall:.2f} wall")


if __name__ == "__main__":
    main()

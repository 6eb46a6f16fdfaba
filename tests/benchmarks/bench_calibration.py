"""What the statistics cost: calibration with all of them beside the bare forward and backward of the same layers.

    python -m tests.benchmarks.bench_calibration [--shape coarse|fine] [--dtype float32|bfloat16]

Bare is the same worker with the stock experts and nothing watched: forward sweep, recompute, gradient of the input.
Both run the same micro-batches in turn, so the ratio holds on a machine that others use too; CPU time leaves their
share out, wall time does not. GFLOP/s count the products of the routed experts, and of their statistics.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_compress.calibration.text import TokenBatch
from moe_compress.calibration.worker import CalibrationSetup, LayerWorker
from moe_compress.model.discovery import MoELayer

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


def write_model(folder: Path, shape: Shape) -> None:
    """A Mixtral of random weights."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.hidden_size // 64,
        num_key_value_heads=max(shape.hidden_size // 256, 1),
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    MixtralForCausalLM(config).save_pretrained(folder)


def expert_flop(layer: MoELayer, shape: Shape) -> tuple[int, int]:
    """Floating-point operations a routed pair: (bare forward, recompute and input gradient; the Grams)."""
    (M, D), F = layer.up_shape, layer.intermediate_size
    return 3 * 2 * (D * M + F * D), 2 * (2 * min(M, D) ** 2 + 2 * min(D, F) ** 2 + (D <= F) * D**2)


def gemm_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of the best of five square products."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / min(_timed(lambda: a @ b)[0] for _ in range(5))


def _timed(action: object) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    action()  # type: ignore[operator]
    return time.process_time() - cpu, time.perf_counter() - wall


def run(shape: Shape, dtype: torch.dtype, num_batches: int, full: bool = False) -> dict[str, float]:
    """Median CPU and wall seconds of a micro-batch, bare and observed; GFLOP/s; medians of the ratios."""
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
        bare, observed = BareWorker(setup), LayerWorker(setup)

        def sweep(worker: LayerWorker, batch: int) -> None:
            worker.forward(0, batch, None)
            worker.loss(batch)
            worker.backward(0, batch, None)

        times: dict[str, list[tuple[float, float]]] = {"bare": [], "observed": []}
        for batch in range(num_batches + 1):
            for label, worker in (("bare", bare), ("observed", observed)):
                taken = _timed(lambda worker=worker, batch=batch: sweep(worker, batch))
                if batch > 0:  # the first loads the layers
                    times[label].append(taken)
        layer = next(iter(observed.moe.values()))
    pairs = shape.num_layers * shape.batch_size * shape.sequence_length * shape.top_k
    plain, grams = expert_flop(layer, shape)
    result: dict[str, float] = {}
    for i, clock in enumerate(("cpu", "wall")):
        for label in times:
            result[f"{label}_{clock}_s"] = median(t[i] for t in times[label])
        ratios = (o[i] / b[i] for o, b in zip(times["observed"], times["bare"], strict=True))
        result[f"ratio_{clock}"] = median(ratios)
    result["bare_gflops"] = pairs * plain / result["bare_cpu_s"] / 1e9
    result["observed_gflops"] = pairs * (plain + grams) / result["observed_cpu_s"] / 1e9
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="coarse")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="also the input Grams of the larger side")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    peak = {name: gemm_peak(getattr(torch, name)) / 1e9 for name in ("float32", "bfloat16")}
    result = run(shape, dtype, args.batches, args.full)
    print(f"{shape}, {args.dtype}, one thread, torch {torch.__version__}, {sys.platform}")
    print(f"GEMM peak: float32 {peak['float32']:.0f} GFLOP/s, bfloat16 {peak['bfloat16']:.0f} GFLOP/s")
    for label in ("bare", "observed"):
        cpu, wall, speed = (result[f"{label}_{key}"] for key in ("cpu_s", "wall_s", "gflops"))
        share = speed / peak[args.dtype]
        print(f"{label:9} {cpu:7.3f} s CPU {wall:7.3f} s wall  {speed:5.0f} GFLOP/s, {share:.0%} of the peak")
    print(f"observed / bare: {result['ratio_cpu']:.2f} CPU, {result['ratio_wall']:.2f} wall")


if __name__ == "__main__":
    main()

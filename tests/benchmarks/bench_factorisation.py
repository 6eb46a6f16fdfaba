"""Time to factorise the three projections of an expert: the published route, a lean one, ours.

    python -m tests.benchmarks.bench_factorisation [--experts 8]

All routes solve min ||(D - X) A^1/2||_F at the same rank for gate, up (F, D) and down (D, F):

    published   eigenvalues of A in fp64 (shift to definite), fp64 Cholesky L, full SVD of D L, L^-1
    lean        fp32 Cholesky with jitter, thin SVD of D L, triangular solve
    ours        moe_compress.linalg: one root for gate and up, eigenvectors of the small side;
                down from its output covariance, which calibration accumulates directly

One thread and its CPU time, and the routes take turns expert by expert: the ratios hold on a
machine that others use too.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from moe_compress.linalg.factorisation import (
    Factors,
    InputRoot,
    factorise_left,
    factorise_right,
    left_gram,
    right_gram,
)
from moe_compress.linalg.symmetric import STRIP

# Shape suffixes: T tokens, D hidden_size, F intermediate_size, M output size, N input size.

JITTER = 1e-6  # of the mean diagonal: the lean route's Cholesky and our root alike
PROJECTIONS = ("gate", "up", "down")


def published(d_MN: Tensor, gram_NN: Tensor, rank: int) -> Factors:
    gram_NN = gram_NN.double()
    lowest = torch.linalg.eigvalsh(gram_NN)[0].item()
    if lowest <= 0:
        gram_NN.diagonal().add_(1e-6 - lowest)
    lower_NN = torch.linalg.cholesky(gram_NN).float()
    left, singular, right = torch.linalg.svd(d_MN @ lower_NN, full_matrices=False)
    scale = singular[:rank].sqrt()
    return left[:, :rank] * scale, scale[:, None] * right[:rank] @ torch.linalg.inv(lower_NN)


def lean(d_MN: Tensor, gram_NN: Tensor, rank: int) -> Factors:
    gram_NN = gram_NN.clone()
    gram_NN.diagonal().add_(JITTER * gram_NN.diagonal().mean())
    lower_NN = torch.linalg.cholesky(gram_NN)
    left, singular, right = torch.linalg.svd(d_MN @ lower_NN, full_matrices=False)
    scale = singular[:rank].sqrt()
    scaled_right = scale[:, None] * right[:rank]
    v_RN = torch.linalg.solve_triangular(lower_NN, scaled_right, upper=False, left=False)
    return left[:, :rank] * scale, v_RN


def ours(deltas: dict[str, Tensor], gram_DD: Tensor, output_gram_DD: Tensor, rank: int) -> dict[str, Factors]:
    root = InputRoot.from_gram(gram_DD[None], JITTER)
    return {
        "gate": factorise_right(deltas["gate"][None], root, [rank])[0],
        "up": factorise_right(deltas["up"][None], root, [rank])[0],
        "down": factorise_left(deltas["down"][None], output_gram_DD[None], [rank])[0],
    }


def covariance(num_tokens: int, size: int, generator: torch.Generator) -> Tensor:
    """Full-rank and anisotropic: two decades of feature scale, mixed by a dense matrix."""
    x_TN = torch.randn(num_tokens, size, generator=generator) * torch.logspace(0, -2, size)
    x_TN = x_TN @ torch.randn(size, size, generator=generator) / size**0.5
    return x_TN.mT @ x_TN


def weighted_error(d_MN: Tensor, factors: Factors, gram_NN: Tensor) -> float:
    """Relative to the error of dropping D altogether; the sums in fp64."""
    rest_MN = d_MN - factors[0] @ factors[1]
    energy, whole = (((w @ gram_NN) * w).sum(dtype=torch.float64) for w in (rest_MN, d_MN))
    return (energy / whole).sqrt().item()


def timed(action: Callable[..., object], *args: object) -> float:
    start = time.process_time()
    action(*args)
    return time.process_time() - start


def gemm_peak(size: int) -> float:
    """FLOP/s of the best of five square fp32 products."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / min(timed(torch.mm, a, b) for _ in range(5))


def run(num_experts: int, hidden_size: int, intermediate_size: int) -> dict[str, dict[str, float]]:
    """CPU seconds by part, weighted error by route and projection (worst expert), FLOP/s."""
    m, n = intermediate_size, hidden_size
    rank = int(0.6 * m * n / (m + n))
    seconds: dict[str, float] = defaultdict(float)
    errors: dict[str, float] = defaultdict(float)
    for expert in range(num_experts):
        generator = torch.Generator().manual_seed(expert)
        gram_DD = covariance(4 * n, n, generator)
        gram_FF = covariance(2 * m, m, generator)
        grams = {"gate": gram_DD, "up": gram_DD, "down": gram_FF}
        shapes = {"gate": (m, n), "up": (m, n), "down": (n, m)}
        deltas = {p: 0.02 * torch.randn(shapes[p], generator=generator) for p in PROJECTIONS}
        output_gram_DD = left_gram(deltas["down"], gram_FF)
        results: dict[tuple[str, str], Factors] = {}
        for name, route in {"published": published, "lean": lean}.items():
            start = time.process_time()
            for p in PROJECTIONS:
                results[name, p] = route(deltas[p], grams[p], rank)
            seconds[name] += time.process_time() - start
        start = time.process_time()
        found = ours(deltas, gram_DD, output_gram_DD, rank)
        seconds["ours"] += time.process_time() - start
        results |= {("ours", p): found[p] for p in PROJECTIONS}

        root = InputRoot.from_gram(gram_DD[None], JITTER)
        seconds["right_gram"] += timed(right_gram, deltas["gate"][None], root)
        seconds["left_gram"] += timed(left_gram, deltas["down"], gram_FF)
        for (name, p), factors in results.items():
            error = weighted_error(deltas[p], factors, grams[p])
            errors[f"{name} {p}"] = max(errors[f"{name} {p}"], error)
    mirrored = n * (n + min(n, STRIP))  # flop per summed element of a symmetric product
    flops = {
        "right_gram": num_experts * (mirrored * (m + n) + 2 * n**3) / seconds["right_gram"],
        "left_gram": num_experts * (mirrored * m + 2 * n * m**2) / seconds["left_gram"],
        "peak": gemm_peak(2 * n),
    }
    return {"seconds": dict(seconds), "errors": dict(errors), "flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=3584)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = run(args.experts, args.hidden_size, args.intermediate_size)
    seconds, errors, flops = result["seconds"], result["errors"], result["flops"]
    print(
        f"{args.experts} experts, D {args.hidden_size}, F {args.intermediate_size}, fp32, "
        f"one thread, torch {torch.__version__}"
    )
    from_large = seconds["ours"] + seconds["left_gram"]
    rows = {name: seconds[name] for name in ("published", "lean", "ours")}
    for name, total in (rows | {"ours, F x F covariance": from_large}).items():
        route = name.split(",")[0]
        quality = "  ".join(f"{p} {errors[f'{route} {p}']:.7f}" for p in PROJECTIONS)
        print(f"{name:24}{total:9.3f} s   relative weighted error: {quality}")
    for total, label in ((seconds["ours"], "ours"), (from_large, "ours, F x F covariance")):
        print(f"published / {label} {seconds['published'] / total:.1f}, lean / {label} {seconds['lean'] / total:.1f}")
    for name in ("right_gram", "left_gram"):
        share = flops[name] / flops["peak"]
        print(f"{name} {flops[name] / 1e9:.0f} GFLOP/s, {share:.0%} of the GEMM peak")
    print(f"GEMM peak {flops['peak'] / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()

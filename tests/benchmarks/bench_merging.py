"""What grouping and alignment cost.

    python -m tests.benchmarks.bench_merging

Alignment: 31 ungated experts of F 3072, D 768 (a layer of Switch-Base-32) to one, in one process and in two, one
numerical thread each; the cost matrix alone beside the machine's peak. Grouping: similarity, dominant experts and
groups of 48 layers of 128 experts out of their statistics, as of 500,000 tokens.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from moe_compress.linalg.alignment import ExpertWeights, align, channel_features
from moe_compress.linalg.similarity import gram_cosine
from moe_compress.methods.grouping import adaptive_counts, dominant_experts, join_dominant
from moe_compress.methods.merge import as_array

F, D, NUM_ALIGNED = 3072, 768, 31


def settle() -> None:
    torch.set_num_threads(1)


def expert(seed: int) -> ExpertWeights:
    """A permuted and disturbed copy of one and the same expert."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(F, D, generator=generator), torch.randn(D, F, generator=generator)
    generator.manual_seed(seed)
    order = torch.randperm(F, generator=generator)
    noise = 0.5 * torch.randn(F, D, generator=generator)
    return ExpertWeights(up_FD=up[order] + noise, down_DF=down[:, order])


def align_one(seed: int) -> float:
    """Seconds of one alignment; making the experts is not counted."""
    reference, other = expert(0), expert(seed)
    began = time.perf_counter()
    align(reference, other)
    return time.perf_counter() - began


def best_of(action: Callable[[], object], times: int = 5) -> float:
    """Seconds of the quickest."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return min(taken)


def bench_alignment() -> None:
    wall = {}
    for processes in (1, 2):
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), settle) as pool:
            list(pool.map(align_one, range(1, processes + 1)))  # imports and first touches
            began = time.perf_counter()
            seconds = list(pool.map(align_one, range(1, NUM_ALIGNED + 1)))
            wall[processes] = time.perf_counter() - began
        print(f"{NUM_ALIGNED} alignments, {processes} processes: {wall[processes]:.2f} s, {sum(seconds):.2f} s in them")
    print(f"two processes are {wall[1] / wall[2]:.2f}x as fast as one")


def bench_cost_matrix() -> None:
    a, b = torch.randn(2, 2048, 2048)
    peak = 2 * 2048**3 / best_of(lambda: a @ b)
    one, two = channel_features(expert(0)), channel_features(expert(1))
    speed = 2 * F * F * one.shape[1] / best_of(lambda: one @ two.mT)
    print(f"cost matrix: {speed / 1e9:.0f} GFLOP/s, {speed / peak:.0%} of the GEMM peak, {peak / 1e9:.0f} GFLOP/s")


def bench_grouping(num_layers: int = 48, num_experts: int = 128, num_tokens: int = 500_000) -> None:
    generator = torch.Generator().manual_seed(0)
    grams, tokens = [], []
    for _ in range(num_layers):
        logits = torch.randn(num_experts, 4096, generator=generator, dtype=torch.float64)
        grams.append(logits @ logits.T * (num_tokens / 4096))
        share = torch.rand(num_experts, generator=generator, dtype=torch.float64)
        tokens.append(as_array((share / share.sum() * num_tokens * 8).round()))

    def group() -> None:
        counts = adaptive_counts(
            [each / each.max() for each in tokens], num_layers * num_experts // 2, [1] * num_layers
        )
        for gram, score, count in zip(grams, tokens, counts, strict=True):
            joined = join_dominant(as_array(gram_cosine(gram)), dominant_experts(score, count))
            assert len(np.unique(joined)) == count

    print(f"similarity, dominants and groups, {num_layers} layers of {num_experts} experts: {best_of(group, 3):.3f} s")


def main() -> None:
    settle()
    bench_grouping()
    bench_cost_matrix()
    bench_alignment()


if __name__ == "__main__":
    main()

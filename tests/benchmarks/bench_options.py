"""What each option of D2-MoE is worth: perplexity of a model compressed with it and without, over calibration seeds.

    python -m tests.benchmarks.bench_options MODEL --text TEXT --evaluate TEXT [--ratios 0.4 0.6] [--seeds 0 1 2]

One calibration a seed serves all rows, and one decomposition a row all ratios. Calibrates on 128 sequences of 256
tokens, evaluates in fp32 on the first 160 windows of 256. Prints mean and spread (largest less smallest) over the
seeds; every measurement is appended to `results.jsonl` in the work folder, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compress.executor import InProcess
from moe_compress.job import Job
from moe_compress.pipeline import compress
from moe_compress.progress import Reporter
from moe_compress.recipe import parse_recipe
from moe_compress.stages.prepare import check, prepare

ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "weighting: two_sided": {"weighting": "two_sided"},
    "weighting: input": {"weighting": "input"},
    "weighting: none": {"weighting": "none"},
    "ranks: uniform": {"ranks": "uniform"},
    "ranks: frequency": {"ranks": "frequency"},
    "gate_up: separate": {"gate_up": "separate"},
    "base: mean": {"base": "mean"},
    "base: fisher": {"base": "fisher"},
    "base: fisher_columns": {"base": "fisher_columns"},
    "base: closed_form": {"base": "closed_form"},
    "base: closed_form, align": {"base": "closed_form", "align": True},
    "base: closed_form, alternate": {"base": "closed_form", "alternate": 8},
    "base: closed_form, 2 bases": {"base": "closed_form", "num_bases": 2},
    "base: closed_form, by budget": {"base": "closed_form", "num_bases": "budget"},
    "base: closed_form, a quarter of columns gone": {
        "base": "closed_form",
        "base_sparsity": 0.25,
        "base_dynamic": 0,
    },
    "base: closed_form, another skipped a call": {"base": "closed_form", "base_sparsity": 0.5},
    "base: closed_form, the same by norms": {"base": "closed_form", "base_sparsity": 0.5, "base_metric": "norm"},
    "share: 1": {"share": 1},
    "share: 4": {"share": 4},
    "share: budget": {"share": "budget"},
    "sequential": {"sequential": True},
    "sequential, two_sided": {"sequential": True, "weighting": "two_sided"},
    "preset: paper": {"preset": "paper"},
}


@torch.no_grad()
def perplexity(model: str | Path, windows: Tensor) -> float:
    """Perplexity on (n, length) windows, fp32."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total = 0.0
    for batch in windows.split(16):
        logits = network(input_ids=batch).logits[:, :-1].flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    return float(torch.tensor(total / windows[:, 1:].numel()).exp())


def compressed(model: str, text: str, work: Path, seed: int, method: dict[str, Any]) -> Path:
    """The checkpoint that a method makes."""
    output = work / f"out-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    text_part = {"text": text, "num_sequences": 128, "sequence_length": 256, "seed": seed}
    recipe = parse_recipe(
        {
            "model": model,
            "output": str(output),
            "job_dir": str(work / f"job-{seed}"),
            "calibration": {**text_part, "full_covariance": "always"},
            "method": {"name": "d2moe", **method},
            "evaluation": None,
            "cluster": {"local": True},
        }
    )
    job = Job(recipe)
    with job.locked():
        compress(job, prepare(job, *check(recipe)), InProcess(1), Reporter(job))
    return output


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--work", type=Path, default=Path("bench_options"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    ids = AutoTokenizer.from_pretrained(options.model)(Path(options.evaluate).read_text())["input_ids"]
    windows = torch.tensor(ids[: 160 * 256]).view(-1, 256)
    results = options.work / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    measured = {(row, ratio, seed): value for row, ratio, seed, value in map(json.loads, lines)}
    for seed in options.seeds:
        for row in options.rows:
            for ratio in options.ratios:
                if (row, ratio, seed) in measured:
                    continue
                folder = compressed(options.model, options.text, options.work, seed, {"ratio": ratio, **ROWS[row]})
                measured[row, ratio, seed] = perplexity(folder, windows)
                with results.open("a") as file:
                    file.write(json.dumps([row, ratio, seed, measured[row, ratio, seed]]) + "\n")
    table = Table(title=f"perplexity, original {perplexity(options.model, windows):.3f}")
    table.add_column("option")
    for ratio in options.ratios:
        table.add_column(f"{ratio:g} removed", justify="right")
    for row in options.rows:
        cells = []
        for ratio in options.ratios:
            values = [measured[row, ratio, seed] for seed in options.seeds]
            cells.append(f"{mean(values):.3f} ±{max(values) - min(values):.3f}")
        table.add_row(row, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()

"""Jobs on a real local Ray cluster, as processes of their own, and the means to kill parts of them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast, **sizes: int) -> Path:
    """A random Mixtral whose job takes long enough to be killed in the middle, or one of other sizes."""
    usual = {
        "hidden_size": 128,
        "intermediate_size": 224,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
    }
    config = MixtralConfig(**usual | sizes, dtype=torch.bfloat16)  # type: ignore[arg-type]
    torch.manual_seed(0)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(
    path: Path, model: Path, text: Path, output: Path, cluster: dict[str, Any], method: str = "d2moe", **options: Any
) -> Path:
    recipe = {
        "model": str(model),
        "output": str(output),
        "calibration": {"text": str(text), "num_sequences": 24, "sequence_length": 64, "batch_size": 4},
        "method": {"name": method, "ratio": 0.5, **options},
        "evaluation": {"text": str(text), "sequence_length": 64, "max_windows": 8},
        "cluster": cluster,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path) -> subprocess.Popen[str]:
    """`moe-compress compress RECIPE` as a process."""
    command = [sys.executable, "-m", "jobs.cli", "compress", str(recipe)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what it said) of a job."""
    _, errors = job.communicate(timeout=300)
    return job.returncode, errors


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def find_process(job: subprocess.Popen[str], title: str, timeout_s: float) -> psutil.Process | None:
    """The first descendant of the job whose title begins so, busy with a call; None if the job ends before."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and job.poll() is None:
        try:
            for child in psutil.Process(job.pid).children(recursive=True):
                if " ".join(child.cmdline()).startswith(title):
                    return child
        except psutil.Error:
            pass
        time.sleep(0.02)
    return None

"""`make quickstart`: trains a small Mixtral, then runs on it the job a user would run on Mixtral-8x7B.

python -m jobs.quickstart [DIRECTORY]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import yaml
from rich.console import Console

from moe_compress.recipe import load_recipe

from .demo import build_demo
from .run import run


def quickstart(folder: Path, console: Console) -> None:
    """Builds the demo model if it is not there, writes a recipe, and runs it from the start."""
    demo = build_demo(folder / "model")
    output = folder / "compressed"
    recipe = {
        "model": str(demo.model_dir),
        "output": str(output),
        "calibration": {
            "text": str(demo.calibration_file),
            "num_sequences": 128,
            "sequence_length": 256,
        },
        "method": {"name": "d2moe", "ratio": 0.4},
        "evaluation": {"text": str(demo.evaluation_file), "sequence_length": 256, "max_windows": 128},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    resolved = load_recipe(path)
    for earlier in (resolved.output_path, resolved.job_path):
        shutil.rmtree(earlier, ignore_errors=True)
    console.print(f"$ moe-compress compress {path}", highlight=False)
    run(resolved, console)
    console.print(f"the compressed checkpoint is {output}; after `import moe_compress` it loads with from_pretrained")


if __name__ == "__main__":
    quickstart(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo"), Console())

"""What a finished job did, measured: `summary.json`, which the report reads."""

from __future__ import annotations

import json
from typing import Any

from ..checkpoint.manifest import Manifest
from ..checkpoint.writer import atomic_write
from ..job import Job
from ..progress import Reporter
from ..storage import as_path
from .prepare import Prepared

SUMMARY_NAME = "summary.json"
TRAINING_NAME = "training.json"


def summarise(job: Job, prepared: Prepared, scores: dict[str, Any] | None, reporter: Reporter) -> None:
    """Writes parameters, bytes on disk, quality, time and memory of the job, and what each level reads."""
    output = prepared.recipe.output_path
    manifest = Manifest.load(output)
    itemsize = prepared.skeleton.dtype.itemsize
    summary = {
        "model": manifest.source.name,
        "output": str(as_path(prepared.recipe.output)),
        "method": prepared.recipe.method.model_dump(),
        "parameters": manifest.parameters,
        "bytes": {
            "original": sum(path.stat().st_size for path in prepared.reader.files),
            "compressed": sum(path.stat().st_size for path in output.glob("*.safetensors")),
            "experts_original": manifest.parameters["experts_original"] * itemsize,
            "experts_compressed": manifest.parameters["experts_compressed"] * itemsize,
        },
        "scores": scores,
        "levels": {name: level.model_dump() for name, level in manifest.levels.items()},
        "stages": reporter.stages,
    }
    atomic_write(job.folder / SUMMARY_NAME, json.dumps(summary, indent=2) + "\n")

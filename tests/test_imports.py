"""Imports point one way: jobs -> cluster -> moe_compress, and inside the library only downwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# room -> what it may import of the library beside itself
ALLOWED = {
    "errors": set(),
    "method_options": set(),
    "storage": {"errors"},
    "recipe_fields": {"method_options", "storage"},
    "distillation_options": {"method_options", "recipe_fields"},
    "recipe": {"errors", "method_options", "distillation_options", "recipe_fields", "storage"},
    "budget": set(),
    "offers": {"budget"},
    "memory": set(),
    "process": set(),
    "retry": {"errors"},
    "checkpoint": {"errors", "retry", "storage"},
    "linalg": {"errors"},
    "model": {"errors", "storage", "checkpoint"},
    "calibration": {"errors", "process", "retry", "storage", "checkpoint", "model", "linalg"},
    "methods": {"errors", "method_options", "budget", "linalg", "calibration", "model"},
    "evaluation": {"errors", "recipe_fields", "storage", "checkpoint", "model", "calibration"},
    "distillation": {
        *("errors", "process", "distillation_options", "recipe_fields", "checkpoint", "model", "calibration"),
        *("evaluation", "storage"),
    },
    "job": {"errors", "recipe", "retry", "storage", "checkpoint"},
    "batch_recipe": {"errors", "method_options", "recipe_fields", "recipe", "storage", "job"},
    "progress": {"errors", "job", "memory"},
    "stages": {
        *("errors", "recipe", "recipe_fields", "method_options", "budget", "checkpoint", "model", "calibration"),
        *("linalg", "methods", "distillation", "distillation_options"),
        *("evaluation", "job", "progress", "executor", "offers", "retry", "storage"),
    },
    "executor": {"calibration", "process", "retry"},
    "pipeline": {"checkpoint", "executor", "job", "progress", "stages"},
    "plan": {
        *("errors", "recipe", "recipe_fields", "method_options", "budget", "checkpoint", "model", "calibration"),
        *("methods", "distillation", "distillation_options"),
        *("stages", "report"),
    },
    "simulation": {
        *("errors", "recipe", "checkpoint", "model", "calibration", "methods", "executor", "job", "progress"),
        *("stages", "plan"),
    },
    "materialize": {"errors", "storage", "checkpoint", "model"},
    "report": {"errors", "recipe", "storage", "checkpoint", "model", "job", "stages"},
}


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, also inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = [*package[: len(package) - node.level], *(node.module or "").split(".")] if node.level else None
            base = ".".join(filter(None, parts)) if parts is not None else str(node.module)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("moe_compress"), ids=lambda p: str(p.relative_to(ROOT)))
def test_library_imports_downwards(path: Path) -> None:
    names = imports(path)
    room = path.relative_to(ROOT / "moe_compress").parts[0].removesuffix(".py")
    banned = {"ray", "cluster", "jobs"} | ({"deepspeed"} if room != "distillation" else set())
    assert not any(name.split(".")[0] in banned for name in names)
    if room == "__init__":
        return
    used = {name.split(".")[1] for name in names if name.startswith("moe_compress.")} - {room, "__version__"}
    assert used <= ALLOWED[room], f"{room} may not import {used - ALLOWED[room]}"


@pytest.mark.parametrize("path", files("cluster"), ids=lambda p: str(p.relative_to(ROOT)))
def test_cluster_does_not_import_jobs(path: Path) -> None:
    assert not any(name.split(".")[0] == "jobs" for name in imports(path))


def test_library_works_without_ray_and_deepspeed() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; sys.modules['deepspeed'] = None;"
        "import moe_compress, moe_compress.pipeline, moe_compress.executor; print(moe_compress.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("moe_compress", "cluster", "jobs")
        for path in files(folder)
        if (lines := len(path.read_text().splitlines())) > 420
    }
    assert not long, f"a file this long usually holds two ideas: {long}"

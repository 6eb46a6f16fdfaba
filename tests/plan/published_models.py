"""What the makers of five models say of them, beside the config.json that they publish (folder `published`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_compress.recipe import Recipe, parse_recipe

FOLDER = Path(__file__).parent / "published"


@dataclass(frozen=True)
class Published:
    """A model's figures: total and active parameters, and the elements of its routed experts by hand."""

    total: float
    active: float
    experts: int
    is_fp8: bool = False


MODELS = {
    "Mixtral-8x7B-v0.1": Published(46.7e9, 12.9e9, 32 * 8 * 3 * 4096 * 14336),
    "Mixtral-8x22B-v0.1": Published(140.6e9, 39.1e9, 56 * 8 * 3 * 6144 * 16384),
    "Qwen3-235B-A22B": Published(235e9, 22e9, 94 * 128 * 3 * 4096 * 1536),
    "DeepSeek-V3": Published(671e9, 37e9, 58 * 256 * 3 * 7168 * 2048, is_fp8=True),
    "Kimi-K2-Instruct": Published(1.03e12, 32e9, 60 * 384 * 3 * 7168 * 2048, is_fp8=True),
}


def recipe_for(name: str, **changes: Any) -> Recipe:
    """A usual job on one of them."""
    recipe: dict[str, Any] = {
        "model": str(FOLDER / name),
        "output": "small",
        "calibration": {"text": "text.txt"},
        "method": {"name": "d2moe", "ratio": 0.4},
        "evaluation": {"text": "text.txt", "max_windows": 64},
    }
    return parse_recipe(recipe | changes)

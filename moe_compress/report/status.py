"""How a job goes or went, from its folder alone: events.jsonl, the recipe, and whether a process holds the lock."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.writer import parse_events
from ..errors import RecipeError
from ..job import in_use
from ..recipe import Recipe, Training

EVENTS_NAME = "events.jsonl"

_PATHS = {
    "compress": ("calibrate", "allocate", "compress", "assemble", "evaluate"),
    "distill": ("teach", "train", "assemble", "evaluate"),
}
"""Command -> the stages of its job, as a person thinks of them."""

_PART_OF = dict.fromkeys(("similarity", "align", "decompose", "factorise"), "allocate")
"""Stage of some method -> the one of the path that it belongs to; what is in neither is scored, after the last."""


@dataclass(slots=True)
class StageStatus:
    """A stage as it stood when it last said something: `left_s` at its speed so far, peak memory if it is known."""

    name: str
    done: int
    total: int
    seconds: float = 0.0
    tokens: float = 0.0
    left_s: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    is_over: bool = False

    @property
    def tokens_per_s(self) -> float | None:
        """Since it began."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


@dataclass(slots=True)
class Status:
    """A job as its folder tells of it.

    Attributes:
        state: `running`, `done`, `failed` (it said why), `stopped` (interrupted or killed) or `new` (nothing has run).
        command, host, process: of the last run.
        started_s, last_event_s: since the epoch.
        last_event: its name.
        stages: of the last run, in order.
        remaining: stages of the path that have not begun.
        num_runs: how often the job was begun or taken up again.
        worker_losses, task_losses, restarts: layer workers and tasks that were lost, and trainings that started
            again, in all runs.
        training: step, loss, kl and whatever else the last step of a training said, and the last validation.
        reason: why the last run failed.
    """

    folder: str
    state: str = "new"
    command: str = "compress"
    host: str = ""
    process: int = 0
    started_s: float = 0.0
    last_event_s: float = 0.0
    last_event: str = ""
    stages: list[StageStatus] = field(default_factory=list)
    remaining: list[str] = field(default_factory=list)
    num_runs: int = 0
    worker_losses: int = 0
    task_losses: int = 0
    restarts: int = 0
    training: dict[str, float] = field(default_factory=dict)
    reason: str | None = None

    @property
    def current(self) -> StageStatus | None:
        """The stage that runs or ran when the job stopped."""
        return self.stages[-1] if self.stages and not self.stages[-1].is_over else None

    @property
    def peak_bytes(self) -> int | None:
        """Of the last run, all processes of the driver's machine."""
        return max((stage.peak_bytes for stage in self.stages if stage.peak_bytes), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        current = self.current
        speed = None if current is None else current.tokens_per_s
        stage = None if current is None else asdict(current) | {"tokens_per_s": speed}
        return asdict(self) | {"stage": stage, "peak_bytes": self.peak_bytes}


def read_status(folder: Path) -> Status:
    """The status of a job.

    Raises:
        RecipeError: the folder is not that of a job.
    """
    if not any((folder / name).is_file() for name in (EVENTS_NAME, "lock")):
        raise RecipeError(f"job_dir: {folder} is no job folder: nothing has run there; give <output>.job")
    status = Status(str(folder))
    events = folder / EVENTS_NAME
    for event in parse_events(events.read_bytes().splitlines() if events.exists() else ()):
        _tell(status, event)
    if status.state == "running" and not in_use(folder):
        status.state = "stopped"
    if status.state != "done":
        status.remaining = _remaining(status, folder)
    current = status.current
    if current is not None and status.state == "running":
        silent_s = max(0.0, time.time() - status.last_event_s)
        if current.left_s is not None:
            current.left_s = max(0.0, current.left_s - silent_s)
    return status


def _tell(status: Status, event: dict[str, Any]) -> None:
    """Takes one event into the status."""
    name = event["event"]
    status.last_event, status.last_event_s = name, event["time_s"]
    current = status.current
    if name == "run_start":
        status.state, status.reason, status.stages = "running", None, []
        status.command, status.host, status.process = event["command"], event["host"], event["process"]
        status.started_s, status.num_runs = event["time_s"], status.num_runs + 1
    elif name == "run_end":
        status.state = "done"
    elif name == "run_stopped":
        status.state = "stopped"
    elif name == "run_failed":
        status.state, status.reason = "failed", event["reason"]
    elif name == "stage_start":
        if current is not None:  # it was given up, and is tried again
            status.stages.pop()
        status.stages.append(StageStatus(event["stage"], 0, event["total"]))
    elif name in ("progress", "stage_end") and current is not None:
        for key in ("done", "total", "seconds", "tokens", "left_s", "peak_bytes", "note"):
            setattr(current, key, event.get(key, getattr(current, key)))
        current.is_over = name == "stage_end"
    elif name == "step":
        figures = {key: value for key, value in event.items() if isinstance(value, int | float) and key != "time_s"}
        status.training |= figures
        if current is not None and current.name == "train":
            current.done = event["step"]
    elif name == "validation":
        status.training["validation_loss"] = event["validation_loss"]
    elif name == "worker_lost":
        status.worker_losses += 1
    elif name == "task_lost":
        status.task_losses += 1
    elif name == "restart":
        status.restarts += 1


def _remaining(status: Status, folder: Path) -> list[str]:
    """The stages of the job's path after the last one that began."""
    recipe = _recipe(folder, status.command)
    path = list(_PATHS[status.command])
    if recipe.get("evaluation") is None:
        path.remove("evaluate")
    if (recipe.get("method") or {}).get("sequential"):
        once = [name for name in path if name != "evaluate"]
        path = [*once, *(f"{name} again" for name in once), *path[len(once) :]]
    if not status.stages:
        return path
    name = status.stages[-1].name
    stage, _, again = name.partition(" again")
    name = _PART_OF.get(stage, stage) + (" again" if name.endswith(" again") else again)
    return path[path.index(name) + 1 :] if name in path else []


def _recipe(folder: Path, command: str) -> dict[str, Any]:
    file = folder / (Training if command == "distill" else Recipe).file_name
    return dict(yaml.safe_load(file.read_text())) if file.exists() else {}

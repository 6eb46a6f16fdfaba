"""One progress line for the stage that runs, its events in the job folder, and whoever else watches.

Events of a run: `run_start`, for each stage `stage_start`, now and then `progress`, `stage_end`, at last `run_end`,
`run_failed` or `run_stopped`; none of these where the process was killed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from .errors import one_line
from .job import Job
from .memory import PeakMemory

_PLAIN_INTERVAL_S = 10.0
_EVENT_INTERVAL_S = 10.0


Watch = Callable[["Stage"], None]
"""Is told of a stage whenever it has changed."""


def nobody(stage: Stage) -> None:
    """Watches nothing."""


class Stage:
    """A running stage; `advance` moves its line.

    Args:
        name, total: what it is called, and how many steps it has.
        console: where its line goes.
        watch: told of every change.
    """

    def __init__(self, name: str, total: int, console: Console, watch: Watch = nobody) -> None:
        self.name, self.total, self.console, self._watch = name, total, console, watch
        self.done = 0
        self.tokens = 0.0
        self.figures: dict[str, float] = {}
        self.note = ""
        self.started = self._shown = time.monotonic()
        self._base: tuple[int, float] | None = (0, self.started)
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", table_column=Column(width=15)),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task(name, total=total, speed="")

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self.started

    def begin_at(self, done: int) -> None:
        """Goes on from a step, back or forth; how long the rest takes is told by the steps after the next one."""
        self.done, self._base = done, None
        if self._bar is not None:
            self._bar.reset(self._task, total=self.total, completed=done, speed="")
        self._watch(self)

    def advance(self, steps: int = 1, tokens: float = 0, note: str = "") -> None:
        """Counts finished steps, and the tokens they went through; the note stands in the line until the next."""
        self.done += steps
        self._base = self._base or (self.done, time.monotonic())
        self.note = note or self.note
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=self._speed())
        elif time.monotonic() - self._shown > _PLAIN_INTERVAL_S:
            self._shown = time.monotonic()
            left = "" if self.left_s is None else f" {self.left_s:.0f} s left"
            self.console.print(f"{self.name} {self.done}/{self.total} {self._speed()}{left}")
        self._watch(self)

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest will take at the speed so far; None before there is one."""
        first, since = self._base or (self.done, 0.0)
        if self.done == first:
            return None
        return (time.monotonic() - since) / (self.done - first) * (self.total - self.done)

    def _speed(self) -> str:
        speed = f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s" if self.tokens else ""
        return ", ".join(filter(None, (speed, self.note)))

    def close(self) -> None:
        """Takes the line away and says how long the stage took."""
        if self._bar is not None:
            self._bar.stop()
        speed = self._speed()
        self.console.print(f"{self.name}: {self.done} steps in {self.seconds:.1f} s{', ' + speed if speed else ''}")


class Reporter:
    """Shows stages to a person and records them as events.

    Args:
        job: whose events.jsonl the stages are recorded in, if any.
        console: where lines go; standard error by default, so that standard output stays clean.
        memory: gives the peak of each stage.
        watch: told of every stage when it begins and whenever it has advanced.

    Attributes:
        stages: {"seconds", "tokens", "peak_bytes"} of each finished stage by name.
    """

    def __init__(
        self,
        job: Job | None,
        console: Console | None = None,
        memory: PeakMemory | None = None,
        watch: Watch = nobody,
    ) -> None:
        self.job, self.memory, self.watch = job, memory, watch
        self.console = console or Console(stderr=True)
        self.stages: dict[str, dict[str, float]] = {}
        self._suffix = ""
        self._recorded = 0.0

    @contextmanager
    def run(self, command: str) -> Iterator[None]:
        """A run of a job from its beginning to its end, whichever that is."""
        self.event("run_start", command=command, process=os.getpid(), host=socket.gethostname())
        try:
            yield
        except Exception as error:
            with suppress(OSError):  # a refused job's folder is gone; a full disk has been told of
                reason = one_line(error) or type(error).__name__
                self.event("run_failed", reason=reason, exit_code=getattr(error, "exit_code", 1))
            raise
        except BaseException:  # Ctrl-C, or SIGTERM, of which Ray makes an exit
            with suppress(OSError):
                self.event("run_stopped")
            raise
        self.event("run_end")

    def again(self) -> Reporter:
        """This reporter for a second time through the same stages, which it tells apart by their names."""
        second = copy(self)
        second._suffix = " again"
        return second

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """Runs a stage of `total` steps."""
        name += self._suffix
        if self.memory is not None:
            self.memory.take()
        self.event("stage_start", stage=name, total=total)
        self._recorded = time.monotonic()
        stage = Stage(name, total, self.console, self._advanced)
        self.watch(stage)
        try:
            yield stage
        finally:
            stage.close()
        figures: dict[str, float] = {"seconds": round(stage.seconds, 3), "tokens": round(stage.tokens)} | stage.figures
        if self.memory is not None:
            figures["peak_bytes"] = self.memory.take()
        self.stages[name] = figures
        self.event("stage_end", stage=name, done=stage.done, **figures)

    def _advanced(self, stage: Stage) -> None:
        self.watch(stage)
        if time.monotonic() - self._recorded > _EVENT_INTERVAL_S:
            self._recorded = time.monotonic()
            left_s = None if stage.left_s is None else round(stage.left_s, 1)
            figures = {"seconds": round(stage.seconds, 3), "tokens": round(stage.tokens), "left_s": left_s}
            if self.memory is not None:
                figures["peak_bytes"] = self.memory.so_far
            self.event("progress", stage=stage.name, done=stage.done, total=stage.total, **figures, note=stage.note)

    def event(self, name: str, **fields: Any) -> None:
        """One line of events.jsonl."""
        if self.job is not None:
            self.job.event(name, **fields)

    def say(self, text: str) -> None:
        """One line to the person."""
        self.console.print(text, highlight=False)

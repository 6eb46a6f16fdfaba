"""Drives the layer workers of one calibration: asks the schedule what to do, and tells it what happened.

What is left behind by a run that was killed half-way: the statistics of the chunks that were finished, and
`finished.json`, which says of which layers; their sums are not taken again.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ..calibration.schedule import Schedule, Step
from ..calibration.text import TokenBatch
from ..calibration.worker import CalibrationSetup, Description
from ..checkpoint.writer import atomic_write
from ..errors import CalibrationError
from ..executor import Alone, Done, Event, Executor, Failed, Joined, Lost
from ..job import Job
from ..progress import Reporter
from ..storage import node_scratch

MAX_DEATHS = 3
"""How many workers may die at the same step before the job gives up."""

FINISHED_NAME = "finished.json"


class Sweep:
    """One forward and backward of the whole calibration text.

    Args:
        job: told of losses.
        setup: the calibration.
        limit_bytes: what steps under way may read and write together.
        check: hears of the model before anything is run.
        on_paths: hears of experts whose statistics are on disk.
    """

    def __init__(
        self,
        job: Job,
        setup: CalibrationSetup,
        limit_bytes: float,
        check: Callable[[Description], None],
        on_paths: Callable[[list[str]], None],
    ) -> None:
        self.job, self.setup, self.limit_bytes = job, setup, limit_bytes
        self.check, self.on_paths = check, on_paths
        self.batches = list(TokenBatch.load(setup.tokens).batches(setup.batch_size))
        self._finished = Finished(setup.statistics / FINISHED_NAME)
        self._seen: list[str] = []
        self._chunks: list[list[str]] = []
        self._undone: set[Step] = set()
        self._deaths: Counter[Step] = Counter()
        self._num_again = self._num_lost = 0

    def run(self, executor: Executor, reporter: Reporter) -> list[str]:
        """The paths of the MoE layers that the text reached.

        Raises:
            CalibrationError: activations are not finite, or workers die again and again; finished work is kept.
        """
        pool = executor.start_pool(self.setup)
        try:
            early: list[Event] = []
            while not (joined := [event for event in early if isinstance(event, Joined)]):
                early += pool.wait()
            model = joined[0].model
            schedule = self._schedule(model)
            with reporter.stage("calibrate", len(self._undone)) as stage:
                for event in early:
                    self._hear(event, schedule, reporter)
                while not schedule.is_finished:
                    for worker, step in schedule.next():
                        pool.start(worker, step, schedule.needs(step), schedule.makes(step))
                    for event in pool.wait():
                        self._hear(event, schedule, reporter)
                        if isinstance(event, Done):
                            pool.let_go(schedule.done(event.worker, event.step))
                            stage.advance(*self._progress(event.step, model))
                            self._record(event)
                if self._num_lost:
                    stage.figures |= {"workers_lost": self._num_lost, "steps_again": self._num_again}
        finally:
            pool.close()
            shutil.rmtree(node_scratch(self.setup.scratch), ignore_errors=True)
        return self._seen

    def _schedule(self, model: Description) -> Schedule:
        self.check(model)
        self._chunks = model.chunks
        finished = [index for index, names in enumerate(model.chunks) if self._finished.holds(names)]
        for index in finished:
            self._tell(self._finished.paths(model.chunks[index]))
        schedule = Schedule(
            len(model.chunks),
            [batch.input_ids.numel() * model.token_bytes for batch in self.batches],
            self.setup.num_workers,
            self.setup.num_groups,
            self.limit_bytes,
            model.chained,
            finished,
        )
        self._undone = schedule.left()
        return schedule

    def _hear(self, event: Event, schedule: Schedule, reporter: Reporter) -> None:
        if isinstance(event, Joined):
            schedule.join(event.worker)
        elif isinstance(event, Alone):
            schedule.adopt()
        elif isinstance(event, Failed):
            self._num_again += sum(schedule.failed(event.worker, event.step, event.lost).values())
        elif isinstance(event, Lost):
            self._lose(event, schedule, reporter)

    def _lose(self, event: Lost, schedule: Schedule, reporter: Reporter) -> None:
        is_new = event.worker in schedule.running
        under_way = schedule.running[event.worker][:1] if is_new else []
        again = schedule.lose(event.worker, event.values_too)
        self._num_lost += is_new
        self._num_again += sum(again.values())
        if is_new or again:
            self.job.event("worker_lost", worker=event.worker, reason=event.reason, again=dict(again))
            steps = ", ".join(f"{count} {kind}" for kind, count in again.items()) or "none"
            reporter.say(f"a layer worker was lost ({event.reason}); steps to do again: {steps}")
        for step in under_way:
            self._deaths[step] += 1
            if self._deaths[step] > MAX_DEATHS:
                raise CalibrationError(
                    f"{self._deaths[step]} layer workers were lost at {step.kind} of {self._chunks[step.chunk][0]},"
                    f" last: {event.reason}; finished layers are kept in {self.job.folder}; give the workers more"
                    " memory and run the job again"
                )

    def _progress(self, step: Step, model: Description) -> tuple[int, float]:
        """(steps, tokens) to count; a token counts once it has been through all layers both ways."""
        if step not in self._undone:
            return 0, 0
        self._undone.remove(step)
        if step.kind not in ("forward", "backward"):
            return 1, 0
        return 1, self.batches[step.part].num_tokens / (2 * len(model.chunks) if model.chained else 1)

    def _record(self, event: Done) -> None:
        if event.step.kind == ("finish" if self.setup.num_groups == 1 else "merge"):
            self._finished.add(self._chunks[event.step.chunk], event.paths)
            self._tell(event.paths)

    def _tell(self, paths: list[str]) -> None:
        self._seen += paths
        self.on_paths(paths)


class Finished:
    """Which layers' statistics are on disk, for a run that comes after this one.

    Args:
        file: where it is written down.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._paths: dict[str, list[str]] = json.loads(file.read_text()) if file.exists() else {}

    def holds(self, names: list[str]) -> bool:
        """Whether these layers are all there."""
        return all(name in self._paths for name in names)

    def paths(self, names: list[str]) -> list[str]:
        """The experts in these layers."""
        return [path for name in names for path in self._paths[name]]

    def add(self, names: list[str], paths: list[str]) -> None:
        """Writes down layers and the experts in them."""
        for name in names:
            self._paths[name] = [path for path in paths if path.startswith(f"{name}.")]
        atomic_write(self.file, json.dumps(self._paths))

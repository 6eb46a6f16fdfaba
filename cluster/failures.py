"""What becomes of a training when a process fails; runs in Ray Train's controller.

The controller is a process of its own that otherwise needs neither torch's models nor ours: what is imported here is
imported when something has failed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.train import UserCallback


class Failures(UserCallback):
    """Ends a training that would fail again, and writes down that another starts again.

    Args:
        folder: of the training.
        events: file of its events.
        max_failures: how often it may start again.
    """

    def __init__(self, folder: Path, events: Path, max_failures: int) -> None:
        self._folder, self._events, self._left = folder, events, max_failures
        self._last: dict[int, str] = {}

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Hears of each failure, of some more than once.

        Raises:
            MoECompressError: of a process, which ends the training.
        """
        from moe_compress.checkpoint.writer import append_event
        from moe_compress.distillation.snapshots import read_progress
        from moe_compress.errors import MoECompressError

        for error in worker_exceptions.values():
            if isinstance(error, MoECompressError):
                raise error
        said = {rank: str(error) for rank, error in worker_exceptions.items()}
        if self._left and said != self._last:
            self._left, self._last = self._left - 1, said
            step = read_progress(self._folder)[1].step
            append_event(self._events, "restart", step=step, reason=reason_of(worker_exceptions))


def reason_of(failures: dict[int, Exception]) -> str:
    """One line on a process that died, or else raised an error; others merely miss it."""
    causes = {rank: getattr(error, "health_check_failure", error) for rank, error in failures.items()}
    for rank, cause in causes.items():
        if isinstance(cause, RayError):
            return f"process {rank} died ({type(cause).__name__})"
    rank = min(causes)
    return f"process {rank}: {one_line(causes[rank])}"


def one_line(error: Exception) -> str:
    """An error of somebody else's, briefly."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

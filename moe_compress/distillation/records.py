"""What a training says of itself: a line of events.jsonl and a point in TensorBoard for every step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.writer import append_event, parse_events


class StepRecords:
    """Writes the figures of steps; of the first process alone.

    Args:
        events: file that lines are appended to.
        board: folder of TensorBoard's files; without that package there are none.
    """

    def __init__(self, events: Path, board: Path) -> None:
        self._events, self._folder = events, board
        self._board: Any = None

    def __call__(self, figures: dict[str, Any]) -> None:
        """Records the figures of one step, `step` among them."""
        kind = "validation" if "validation_loss" in figures else "step"
        append_event(self._events, kind, **figures)
        self._board = self._board or _open_board(self._folder, figures["step"])
        if self._board is not None:
            for name, value in figures.items():
                if name != "step":
                    self._board.add_scalar(name, value, figures["step"])
            self._board.flush()


def _open_board(folder: Path, step: int) -> Any:
    """TensorBoard's writer; what a run that was killed wrote from this step on is no longer shown. None without it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step)


class EventsTail:
    """Reads what is appended to events.jsonl from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = path.stat().st_size if path.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The events of the whole lines since the last call."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._place += len(line)
                yield from parse_events([line])

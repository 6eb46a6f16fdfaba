"""The errors a person can meet. Each message is one line: what, its value, the rule, the fix."""

from __future__ import annotations

ERROR = "error: "
"""What such a line begins with."""


class MoECompressError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class RecipeError(MoECompressError):
    """The recipe, or what it points at, cannot be run: refused before any tensor is read."""

    exit_code = 2


class CheckpointError(MoECompressError):
    """The input checkpoint is not a readable safetensors MoE checkpoint."""

    exit_code = 2


class CalibrationError(MoECompressError):
    """Statistics could not be gathered: a NaN in the activations, a worker lost for good."""


class CompressionError(MoECompressError):
    """A layer could not be compressed or written: singular beyond repair, disk full."""


class DistillationError(MoECompressError):
    """A training cannot go on; its snapshots are kept."""


def one_line(said: object, limit: int | None = None) -> str:
    """What somebody else says, an error for instance, on one line of at most `limit` characters."""
    return " ".join(str(said).split())[:limit]


class JobFailed(MoECompressError):
    """Jobs in other processes failed; this one ends as they did."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def reason_in(log: str) -> str | None:
    """The last error line of what a job said."""
    lines = [line for line in log.splitlines() if line.startswith(ERROR)]
    return lines[-1].removeprefix(ERROR) if lines else None


class StorageError(MoECompressError, OSError):
    """An object store refuses, or fails for longer than it is waited for. Made of an errno and the line."""

    def __str__(self) -> str:
        return str(self.strerror)

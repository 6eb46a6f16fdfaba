"""Peak memory of this process and all it started, by sampling."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

_INTERVAL_S = 0.25


def tree_bytes() -> int:
    """Proportional set size of this process and its descendants: shared pages count once, in parts."""
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            info = process.memory_full_info()
            total += getattr(info, "pss", info.uss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class PeakMemory:
    """Samples `tree_bytes` while the context is open; `take` gives the peak since the last take."""

    def __init__(self) -> None:
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def so_far(self) -> int:
        """Peak bytes since the last take, which goes on."""
        return self._peak

    def take(self) -> int:
        """Peak bytes since the last call."""
        peak = max(self._peak, tree_bytes())
        self._peak = 0
        return peak

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._peak = max(self._peak, tree_bytes())

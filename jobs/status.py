"""Shows how a job goes, once or as long as it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from moe_compress.report.status_view import look

_WATCH_S = 2.0


def show(folder: Path, console: Console, as_json: bool = False, watch: bool = False) -> None:
    """Prints the status of a job or a batch.

    Args:
        folder: of the job or batch.
        console: where it goes.
        as_json: as JSON, one line a look where several are taken.
        watch: look again and again as long as it runs.

    Raises:
        RecipeError: the folder is that of neither.
    """
    view, data, runs = look(folder)
    if as_json:
        print(json.dumps(data, indent=None if watch else 2), flush=True)
        while watch and runs:
            time.sleep(_WATCH_S)
            _, data, runs = look(folder)
            print(json.dumps(data), flush=True)
    elif not watch:
        console.print(view)
    else:
        with Live(view, console=console, auto_refresh=False) as live:
            while runs:
                time.sleep(_WATCH_S)
                view, _, runs = look(folder)
                live.update(view, refresh=True)

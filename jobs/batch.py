"""Runs a batch: each job a process of its own, so that whatever becomes of one the others go on.

In the batch's folder, `recipes/` holds the resolved recipes, `summary.json` a row a job, `logs/` what the jobs said and
`done/` the row of each that is done. Run again, those are left alone and the others go on where they were. `lock` is
held while it runs, also between jobs: a second run is refused, and whoever looks knows whether the summary still holds.

    python -m jobs.batch MANIFEST [--set key=value]      `moe-compress batch`, as a cluster is given it to run
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from moe_compress.batch_recipe import Batch, Entry, expand, parse_batch
from moe_compress.checkpoint.manifest import MANIFEST_NAME
from moe_compress.checkpoint.writer import atomic_write
from moe_compress.errors import ERROR, CheckpointError, JobFailed, RecipeError, reason_in
from moe_compress.recipe import read_recipe
from moe_compress.report.batch import JOBS, batch_view
from moe_compress.stages.prepare import check, check_output
from moe_compress.stages.summary import SUMMARY_NAME
from moe_compress.storage import address, as_path, locked

from .run import missing_folders, without_trace

_ROOT = Path(__file__).parents[1]
_POLL_S = 0.1
_LOG_BYTES = 16384


def run_batch(path: Path, overrides: Sequence[str], console: Console, as_json: bool = False) -> None:
    """Runs or resumes a batch and prints its summary.

    Args:
        path, overrides: the manifest.
        console: where the summary goes.
        as_json: as JSON.

    Raises:
        RecipeError: something in it cannot be run; then nothing has started.
        JobFailed: some jobs failed; exit code 2 if the input of each of them is wrong.
        MoECompressError: it runs already.
    """
    batch = parse_batch(read_recipe(path, overrides))
    folder = _folder(batch, path)
    created = missing_folders(folder)
    with locked(folder, "folder"):
        with without_trace(created):
            entries = _checked(batch, folder)
        for name in ("done", "logs", "recipes"):
            (folder / name).mkdir(exist_ok=True)
        rows = _Runner(folder, entries, batch.max_parallel, Console(stderr=True)).run()
    if as_json:
        print(json.dumps({JOBS: rows}, indent=2))
    else:
        console.print(batch_view(rows))
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        names = ", ".join(row["name"] for row in failed)
        code = 2 if all(row["exit_code"] == 2 for row in failed) else 1
        raise JobFailed(f"{len(failed)} of {len(rows)} jobs failed ({names}); run the batch again once mended", code)


def _folder(batch: Batch, path: Path) -> Path:
    if batch.folder is not None:
        return Path(batch.folder).absolute()
    if str(path) == "-":
        raise RecipeError("folder: missing, and standard input has no name to make one from; give folder")
    folder = path.absolute().with_suffix("")
    if folder.is_file():
        raise RecipeError(f"folder: {folder} is a file; give folder, or let the manifest end in .yaml")
    return folder


def _checked(batch: Batch, folder: Path) -> list[Entry]:
    """The jobs of a batch, none of which is refused; every error is told."""
    entries, problems = expand(batch, folder)
    problems += _refusals(entries)
    if not problems:
        return entries
    if len(problems) == 1:
        raise RecipeError(problems[0])
    for problem in problems:
        print(f"{ERROR}{problem}", file=sys.stderr)
    raise RecipeError(f"batch: {len(problems)} errors, and no job has started; mend them")


def _refusals(entries: list[Entry]) -> list[str]:
    """What is wrong with the recipes beside the models at hand; a broken checkpoint is the matter of its own jobs."""
    found = []
    for entry in entries:
        try:
            check_output(entry.recipe)
            if as_path(entry.recipe.model).exists():
                check(entry.recipe)
        except RecipeError as error:
            found.append(f"job {entry.name}: {error}")
        except CheckpointError:
            continue
    return found


@dataclass(slots=True)
class _Running:
    """A job under way."""

    entry: Entry
    process: subprocess.Popen[bytes]
    began: float


class _Runner:
    """Runs the jobs of a batch, some side by side, and keeps its summary.

    Args:
        folder: of the batch.
        entries: its jobs.
        max_parallel: jobs side by side; never two of one job folder, which is locked.
        console: told as jobs begin and end.
    """

    def __init__(self, folder: Path, entries: list[Entry], max_parallel: int, console: Console) -> None:
        self.folder, self.entries, self.max_parallel, self.console = folder, entries, max_parallel, console
        self.rows = {entry.name: self._finished(entry) or _row(entry, "waiting") for entry in entries}

    def run(self) -> list[dict[str, Any]]:
        """The rows of all jobs, once each has ended."""
        waiting = [entry for entry in self.entries if self.rows[entry.name]["status"] != "done"]
        running: list[_Running] = []
        try:
            while waiting or running:
                self._start_some(waiting, running)
                self._save()
                while not (ended := [job for job in running if job.process.poll() is not None]):
                    time.sleep(_POLL_S)
                for job in ended:
                    running.remove(job)
                    self._end(job)
        finally:
            for job in running:
                job.process.terminate()
            for job in running:
                job.process.wait()
                self.rows[job.entry.name] = _row(job.entry, "waiting")
            self._save()
        return list(self.rows.values())

    def _start_some(self, waiting: list[Entry], running: list[_Running]) -> None:
        for entry in list(waiting):
            if len(running) == self.max_parallel:
                return
            if entry.recipe.job_path in {job.entry.recipe.job_path for job in running}:
                continue
            waiting.remove(entry)
            recipe = self.folder / "recipes" / f"{entry.name}.yaml"
            atomic_write(recipe, entry.recipe.to_yaml())
            with open(self._log(entry), "w") as log:
                running.append(_Running(entry, _start(recipe, log), time.monotonic()))
            self.rows[entry.name] = _row(entry, "running")
            self.console.print(f"{entry.name}: begins", highlight=False, markup=False)

    def _end(self, job: _Running) -> None:
        entry, code = job.entry, job.process.returncode
        row = _row(entry, "failed" if code else "done", seconds=round(time.monotonic() - job.began, 1), exit_code=code)
        if code == 0:
            row |= _figures(json.loads((entry.recipe.job_path / SUMMARY_NAME).read_text()))
            atomic_write(self._record(entry), json.dumps({"digest": entry.digest, "row": row}, indent=2) + "\n")
        else:
            row["reason"] = reason_in(_tail(self._log(entry))) or _unsaid(code)
        self.rows[entry.name] = row
        said = f"failed: {row['reason']}" if code else f"done in {row['seconds']:.0f} s"
        self.console.print(f"{entry.name}: {said}", highlight=False, markup=False, soft_wrap=True)

    def _finished(self, entry: Entry) -> dict[str, Any] | None:
        """The row of a job that was done before and whose output is there still."""
        record = self._record(entry)
        if not record.is_file() or not (entry.recipe.output_path / MANIFEST_NAME).exists():
            return None
        found = json.loads(record.read_text())
        return found["row"] if found["digest"] == entry.digest else None

    def _log(self, entry: Entry) -> Path:
        return self.folder / "logs" / f"{entry.name}.log"

    def _record(self, entry: Entry) -> Path:
        return self.folder / "done" / f"{entry.name}.json"

    def _save(self) -> None:
        atomic_write(self.folder / SUMMARY_NAME, json.dumps({JOBS: list(self.rows.values())}, indent=2) + "\n")


def _row(entry: Entry, status: str, **known: Any) -> dict[str, Any]:
    """A row of the summary; what is not known yet is null."""
    unknown = dict.fromkeys(("bytes", "perplexity", "seconds", "exit_code", "reason"))
    recipe = entry.recipe
    places = {"model": recipe.model, "output": address(recipe.output_path), "job_dir": address(recipe.job_path)}
    ratio = recipe.method.ratio
    return (
        {"name": entry.name, "method": recipe.method.name, "ratio": ratio, "status": status, **unknown} | known | places
    )


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    """What a job's own summary says: bytes and perplexity, before and after."""
    scores = summary["scores"] or {}
    perplexity = [scores["original_perplexity"], scores["perplexity"]] if "perplexity" in scores else None
    return {"bytes": [summary["bytes"]["original"], summary["bytes"]["compressed"]], "perplexity": perplexity}


def _start(recipe: Path, log: IO[str]) -> subprocess.Popen[bytes]:
    """A process that runs a job and does not outlive this one, however this one ends."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.compress", str(recipe)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        preexec_fn=_die_with_the_parent if sys.platform == "linux" else None,
    )


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with_the_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _tail(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_BYTES))
        return file.read().decode(errors="replace")


def _unsaid(code: int) -> str:
    """Why a job that gave no reason ended."""
    if code < 0:
        return f"killed by signal {-code}; if memory ran out, give it more"
    return f"ended with code {code} and said nothing; its log tells"


if __name__ == "__main__":
    from .cli import main

    main("batch")

"""Gives jobs to the job server of a Ray cluster, follows and stops them.

A job server takes an id once. A name here stands for one id after another (NAME, NAME.2, NAME.3), of which at most one
runs: whoever submits a name again follows what runs under it, or starts the next.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from moe_compress.errors import MoECompressError, RecipeError, one_line, reason_in

_CONNECT_S = 5.0
_SILENCE_S = 60.0
"""How long nothing may be heard before the job is asked after; a connection may have died without a word."""

_LOST_S = 600.0
"""How long a server may be away before whoever follows gives up."""

_POLL_S = 0.5
_REASON_CHARS = 4096

_FAILED = (RuntimeError, ConnectionError, TimeoutError, aiohttp.ClientError, requests.RequestException)
"""What Ray's client raises where the server, or the way to it, fails."""

_UNHEARD = (*_FAILED, OSError)


class JobServer:
    """The job server of a cluster.

    Args:
        address: URL of its dashboard, http://HOST:8265.

    Raises:
        RecipeError: nothing answers there, or it wants another token.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(f"--address {address}: no URL of a job server; give one like http://HOST:8265")
        try:
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            socket.create_connection((parts.hostname, port), _CONNECT_S).close()
            os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray puts RAY_ADDRESS before what it is given
            self._client = JobSubmissionClient(address)
            logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # says when it hangs up
        except AuthenticationError as error:
            said = re.split(r"[.\n]", str(error))[0]
            raise RecipeError(
                f"--address {address}: refused ({said}); set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its token"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"--address {address}: no job server answers ({_briefly(error)}); give the URL of the cluster's"
                " dashboard, as in http://HOST:8265"
            ) from error

    def submit(self, name: str, entrypoint: str, runtime_env: dict[str, Any]) -> tuple[str, bool]:
        """(id of what runs under a name, whether it was started by this call).

        Args:
            name: see above.
            entrypoint: a command of the shell.
            runtime_env: as of Ray.

        Raises:
            RecipeError: the environment cannot be sent.
            MoECompressError: the server fails, perhaps after it took the job; called again, all is well.
        """
        while True:
            attempts = self._attempts(name)
            last = attempts[max(attempts)] if attempts else None
            if last is not None and not last.status.is_terminal():
                return str(last.submission_id), False
            submission_id = f"{name}.{max(attempts) + 1}" if attempts else name
            try:
                with self._asking():
                    self._client.submit_job(entrypoint=entrypoint, submission_id=submission_id, runtime_env=runtime_env)
            except MoECompressError as error:
                if "already exists" in str(error.__cause__):  # another has submitted the same name this very moment
                    continue
                raise
            except (ValueError, TypeError, OSError) as error:
                raise RecipeError(f"--runtime-env: cannot be sent ({_briefly(error)}); mend it") from error
            return submission_id, True

    def find(self, name: str) -> JobDetails:
        """What runs under a name or an id, or ran there last.

        Raises:
            RecipeError: nothing did.
            MoECompressError: the server fails.
        """
        attempts = self._attempts(name)
        if not attempts:
            raise RecipeError(f"{name}: {self.address} knows no job of this name; `ray job list` shows what it knows")
        return attempts[max(attempts)]

    def follow(self, submission_id: str, write: Callable[[str], None]) -> tuple[JobDetails, str | None]:
        """(how a job ended, the reason it gave if it failed).

        Args:
            submission_id: of the job.
            write: takes what it says, as it says it; all of it, from the beginning.

        Raises:
            MoECompressError: the server has been away for too long.
        """
        said, shown, heard_at = "", 0, time.monotonic()

        def hear(text: str) -> None:
            nonlocal said, shown, heard_at
            heard_at = time.monotonic()
            shown += len(text)
            said = (said + text)[-_REASON_CHARS:]
            write(text)

        while True:
            reason = "it stopped answering"
            try:
                asyncio.run(self._tail(submission_id, shown, hear))
            except _UNHEARD as error:
                reason = _briefly(error)
            try:
                job = self._client.get_job_info(submission_id)
                heard_at = time.monotonic()
                if job.status.is_terminal():
                    return job, reason_in(said)
            except _UNHEARD as error:
                reason = _briefly(error)
            if time.monotonic() - heard_at > _LOST_S:
                raise MoECompressError(
                    f"job {submission_id}: {self.address} has been away for {_LOST_S:.0f} s ({reason}); the job may go"
                    " on; follow it again"
                )
            time.sleep(_POLL_S)

    def stop(self, submission_id: str) -> bool:
        """Ends a job and waits until it has; False where it had ended before.

        Raises:
            MoECompressError: the server fails.
        """
        with self._asking():
            if not self._client.stop_job(submission_id):
                return False
            while not self._client.get_job_status(submission_id).is_terminal():
                time.sleep(_POLL_S)
            return True

    def _attempts(self, name: str) -> dict[int, JobDetails]:
        """What was submitted under a name, by its place."""
        mine = re.compile(rf"{re.escape(name)}(?:\.(\d+))?")
        with self._asking():
            jobs = self._client.list_jobs()
        found = ((mine.fullmatch(job.submission_id or ""), job) for job in jobs)
        return {int(match[1] or 1): job for match, job in found if match}

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except _FAILED as error:
            raise MoECompressError(f"--address {self.address}: fails ({_briefly(error)}); run it again") from error

    async def _tail(self, submission_id: str, shown: int, hear: Callable[[str], None]) -> None:
        """Hands on what a job says after the first `shown` characters, until it ends or falls silent."""
        lines = self._client.tail_job_logs(submission_id)
        while True:
            try:
                async with asyncio.timeout(_SILENCE_S):  # wait_for may swallow Ctrl-C
                    text = await anext(lines)
            except StopAsyncIteration:
                return
            if len(text) > shown:
                hear(text[shown:])
            shown = max(0, shown - len(text))


def _briefly(error: BaseException) -> str:
    """An error of somebody else's, briefly."""
    return one_line(error)[-200:] or type(error).__name__

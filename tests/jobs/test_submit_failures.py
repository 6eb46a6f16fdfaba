"""Job servers that fail under whoever submits, asks or stops: the input is not blamed, and the same command will do."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import ray
from ray.job_submission import JobSubmissionClient

from cluster.submission import JobServer
from moe_compress.errors import MoECompressError, RecipeError


class FakeServer:
    """Answers as a job server does, but for the requests that are to fail.

    Attributes:
        failing: a request, such as `GET /api/jobs/` -> an HTTP status, or `hangs up`, once it has done as it was asked.
        jobs: what was submitted.
    """

    def __init__(self) -> None:
        self.failing: dict[str, str] = {}
        self.jobs: list[dict[str, Any]] = []

    def answer(self, request: str, body: dict[str, Any]) -> Any:
        if request == "GET /api/version":
            return {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
        if request == "GET /api/jobs/":
            return self.jobs
        if request == "POST /api/jobs/" and self.failing.get(request) != "500":
            job = {"submission_id": body["submission_id"], "entrypoint": body["entrypoint"]}
            self.jobs.append({"type": "SUBMISSION", "status": "RUNNING", **job})
            return {"job_id": None, "submission_id": body["submission_id"]}
        return {}


@contextmanager
def serving(fake: FakeServer) -> Iterator[str]:
    """Its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            request = f"{self.command} {self.path}"
            said = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = json.dumps(fake.answer(request, json.loads(said or b"{}"))).encode()
            failure = fake.failing.get(request)
            if failure == "hangs up":
                return
            self.send_response(int(failure or 200))
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which submitting sets
    return FakeServer()


FAILURES = ("hangs up", "500")


def assert_to_be_run_again(error: pytest.ExceptionInfo[MoECompressError], address: str) -> None:
    assert error.value.exit_code == 1
    assert str(error.value).startswith(f"--address {address}: fails (")
    assert str(error.value).endswith("); run it again")


@pytest.mark.parametrize("failure", FAILURES)
def test_in_submitting(failure: str, fake: FakeServer) -> None:
    with serving(fake) as address:
        server = JobServer(address)
        fake.failing = {"POST /api/jobs/": failure}
        with pytest.raises(MoECompressError) as failed:
            server.submit("mine", "true", {})
        assert_to_be_run_again(failed, address)
        fake.failing = {}
        took_it = failure == "hangs up"  # after it took the job
        assert server.submit("mine", "true", {}) == ("mine", not took_it)
        assert len(fake.jobs) == 1


@pytest.mark.parametrize("failure", FAILURES)
def test_in_asking_and_stopping(failure: str, fake: FakeServer) -> None:
    with serving(fake) as address:
        server = JobServer(address)
        server.submit("mine", "true", {})
        fake.failing = dict.fromkeys(("GET /api/jobs/", "POST /api/jobs/mine/stop"), failure)
        for ask in (lambda: server.find("mine"), lambda: server.submit("x", "true", {}), lambda: server.stop("mine")):
            with pytest.raises(MoECompressError) as failed:
                ask()
            assert_to_be_run_again(failed, address)


@pytest.mark.parametrize(
    "environment",
    [{"working_dir": "/no/such/folder"}, {"env_vars": {"A": 1}}, {"pip": 3}],
    ids=lambda each: next(iter(each)),
)
def test_an_environment_that_is_wrong_is_blamed(environment: dict[str, Any], fake: FakeServer) -> None:
    with serving(fake) as address, pytest.raises(RecipeError, match="--runtime-env: cannot be sent"):
        JobServer(address).submit("mine", "true", environment)
    assert fake.jobs == []


def test_files_that_cannot_be_sent_are_blamed(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "secret.txt")

    monkeypatch.setattr(JobSubmissionClient, "submit_job", refuse)
    said = r"--runtime-env: cannot be sent \(.*secret\.txt"
    with serving(fake) as address, pytest.raises(RecipeError, match=said):
        JobServer(address).submit("mine", "true", {})

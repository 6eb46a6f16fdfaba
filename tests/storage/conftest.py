"""A real server of the S3 protocol on loopback, which tells what it was asked and fails, stalls when it is told to."""

from __future__ import annotations

import logging
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("moto.server")
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from moe_compress.storage import StoredPath, as_path, upload


@dataclass(slots=True)
class Request:
    """One request, answered."""

    method: str
    key: str  # "bucket/key"
    query: str
    status: int
    num_bytes: int  # of the answer


@dataclass
class Store:
    """The server.

    Attributes:
        requests: what it answered, in order.
        before: called with (method, key, query) of each request; a number it returns is answered instead.
    """

    port: int
    requests: list[Request] = field(default_factory=list)
    before: Callable[[str, str, str], int | None] = lambda method, key, query: None

    @property
    def options(self) -> str:
        return f"?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def address(self, key: str) -> str:
        """What a recipe calls an object or folder."""
        return f"s3://bucket/{key}{self.options}"

    def path(self, key: str) -> StoredPath:
        path = as_path(self.address(key))
        assert isinstance(path, StoredPath)
        return path

    def put(self, source: Path, key: str) -> str:
        """Uploads a file or the files of a folder; returns the address."""
        for file in source.iterdir() if source.is_dir() else [source]:
            upload(file, self.path(f"{key}/{file.name}" if source.is_dir() else key))
        return self.address(key)

    def fetched(self, suffix: str = "") -> int:
        """Bytes of the objects that were read, of those whose name ends so."""
        return sum(
            r.num_bytes for r in self.requests if r.method == "GET" and r.key.endswith(suffix) and "list" not in r.query
        )


def _recording(store: Store, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = (environ["REQUEST_METHOD"], environ["PATH_INFO"].lstrip("/"), environ["QUERY_STRING"])
        refused = store.before(*request)
        if refused is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{refused} Refused", [("Content-Length", "0")])
            return [b""]
        status: list[str] = []

        def start(line: str, headers: Any, *rest: Any) -> Any:
            status.append(line)
            return start_response(line, headers, *rest)

        body = b"".join(app(environ, start))
        store.requests.append(Request(*request, int(status[0].split()[0]), len(body)))
        return [body]

    return call


@pytest.fixture(scope="session")
def server() -> Iterator[Store]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = Store(0)
    running = make_server(
        "127.0.0.1", 0, _recording(store, DomainDispatcherApplication(create_backend_app)), threaded=True
    )
    store.port = running.server_port
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield store
    running.shutdown()


@pytest.fixture
def store(
    server: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Store]:
    """The server with an empty bucket, and an empty cache of this node."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("MOE_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MOE_COMPRESS_CACHE_GB", raising=False)
    for path, method in (("moto-api/reset", "POST"), ("bucket", "PUT")):
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{server.port}/{quote(path)}", method=method))
    server.requests.clear()
    yield server
    server.before = lambda method, key, query: None

"""Speed of the ways to and from an object store, as ratios against pyarrow's own streams on the same bytes.

    python -m tests.benchmarks.bench_storage [s3://bucket/folder?options] [--megabytes 256]

Without an address a server of the S3 protocol is started on loopback, which is slow: then the ratios tell something and
the speeds do not. Also prints what reading a checkpoint from the disk costs per tensor.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from moe_compress.checkpoint.reader import CheckpointReader, resolve_checkpoint
from moe_compress.storage import StoredPath, as_path, local, remove_folder, upload

CHUNK_BYTES = 16 * 2**20


@contextmanager
def loopback() -> Iterator[str]:
    """A server of the S3 protocol in a process of its own; the address of a folder in a bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT"))
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield f"s3://bucket/bench?endpoint_override=127.0.0.1:{port}&scheme=http"
    finally:
        server.kill()
        server.wait()


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def plain_upload(file: Path, path: StoredPath) -> None:
    served, name = path.store
    with file.open("rb") as reading, served.open_output_stream(name) as stream:
        while block := reading.read(CHUNK_BYTES):
            stream.write(block)


def plain_download(path: StoredPath) -> None:
    served, name = path.store
    with served.open_input_file(name) as file:
        while file.read(CHUNK_BYTES):
            pass


def read_all(folder: Path) -> None:
    for entry in CheckpointReader(folder).entries.values():
        entry.read()


def fetch(path: StoredPath) -> None:
    with local(path):
        pass


def run(address: str, megabytes: int, console: Console) -> None:
    """Prints the table."""
    target = as_path(address)
    assert isinstance(target, StoredPath)
    with tempfile.TemporaryDirectory() as name:
        os.environ["MOE_COMPRESS_CACHE"] = f"{name}/cache"
        folder = Path(name) / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        shard = folder / "model.safetensors"
        save_file({f"layer.{i}": torch.randn(2**20) for i in range(megabytes // 4)}, shard)
        size = shard.stat().st_size / 1e6
        upload(folder / "config.json", target / "model" / "config.json")
        there = target / "model" / shard.name
        took = {
            "upload, pyarrow": seconds(lambda: plain_upload(shard, target / "plain")),
            "upload": seconds(lambda: upload(shard, there)),
            "download, pyarrow": seconds(lambda: plain_download(there)),
            "download of a file": seconds(lambda: fetch(there)),
            "tensors, first pass": seconds(lambda: read_all(resolve_checkpoint(address_of(target)))),
            "tensors, second pass": seconds(lambda: read_all(resolve_checkpoint(address_of(target)))),
            "tensors, from the disk": seconds(lambda: read_all(folder)),
        }
        table = Table("", "MB/s", "of pyarrow's", title=f"{size:.0f} MB, {target}")
        for what, time_s in took.items():
            plain = took["upload, pyarrow" if what.startswith("upload") else "download, pyarrow"]
            table.add_row(what, f"{size / time_s:.0f}", f"{plain / time_s:.2f}")
        console.print(table)
        remove_folder(target)


def address_of(target: StoredPath) -> str:
    return (target / "model").uri


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", nargs="?")
    parser.add_argument("--megabytes", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.address:
        run(arguments.address, arguments.megabytes, Console())
    else:
        with loopback() as served:
            run(served, arguments.megabytes, Console())

"""Object stores through pyarrow: which filesystem serves a path, and calls that outlive a store's bad minutes."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from ..errors import StorageError, one_line

Result = TypeVar("Result")

PATIENCE_S = 60.0
"""How long a call is tried again; the store's client tries for some seconds in each of our attempts."""

_PATIENCE_WITH_NAMES_S = 10.0
_SILENCE_S = 300.0
"""How long S3 may say nothing while it copies 5 GB or puts the parts of an upload together."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_FINAL = (
    *(
        "ACCESS_DENIED",
        "NO_SUCH_BUCKET",
        "INVALID_ACCESS_KEY_ID",
        "SIGNATURE_DOES_NOT_MATCH",
        "INVALID_CLIENT_TOKEN_ID",
    ),
    *("MISSING_AUTHENTICATION_TOKEN", "UNRECOGNIZED_CLIENT", "HTTP status 403", "HTTP status 401"),
)
"""What no patience mends, as the AWS client words it."""


@lru_cache(maxsize=64)
def filesystem(root: str) -> tuple[pafs.FileSystem, str]:
    """(filesystem, path of the bucket in it) of `scheme://bucket?options`; one a process.

    Raises:
        StorageError: nothing here serves it.
    """
    # The client may ask the bucket for its region.
    return retrying(f"{shown(root)}: cannot be reached", lambda: _client(root), _PATIENCE_WITH_NAMES_S)


@lru_cache(maxsize=64)
def patient_filesystem(root: str) -> pafs.FileSystem:
    """The filesystem again, for requests that a store answers when it has done long work: _SILENCE_S instead of 3 s.

    All else is better asked a second time after those 3 s. Addresses have no option for it.

    Raises:
        StorageError: nothing here serves it.
    """
    served, _ = filesystem(root)
    if not isinstance(served, pafs.S3FileSystem):
        return served
    make, (options,) = served.__reduce__()
    return make(options | {"request_timeout": _SILENCE_S})


def _client(root: str) -> tuple[pafs.FileSystem, str]:
    try:
        try:
            return pafs.FileSystem.from_uri(_with_whole_puts(root))
        except pa.ArrowInvalid as error:
            if "Unrecognized filesystem type" not in str(error):
                raise
            from fsspec.core import url_to_fs

            served, base = url_to_fs(root)
            return pafs.PyFileSystem(pafs.FSSpecHandler(served)), base.rstrip("/")
    except (ValueError, ImportError) as error:  # pyarrow's are ValueErrors
        raise StorageError(
            errno.EINVAL, f"{shown(root)}: no filesystem for it ({_briefly(error)}); correct the address"
        ) from error


def _with_whole_puts(root: str) -> str:
    """Small objects of S3 go in one request, which leaves nothing half-done behind."""
    if not root.startswith("s3://") or "allow_delayed_open" in root:
        return root
    return f"{root}{'&' if '?' in root else '?'}allow_delayed_open=true"


def retrying(what: str, call: Callable[[], Result], patience_s: float | None = None) -> Result:
    """The result of a call that may be repeated, tried again with growing pauses while the store fails.

    Args:
        what: for the error, such as "s3://bucket/key: cannot be read".
        call: idempotent.
        patience_s: how long; None for PATIENCE_S.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: the store refuses, or fails for longer than that.
    """
    deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return call()
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, f"{what}: there is no such object") from error
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            reason = _briefly(error)
            if any(word in reason for word in _FINAL):
                raise StorageError(
                    errno.EACCES, f"{what} ({reason}); check the name of the bucket and the credentials"
                ) from error
            if time.monotonic() + pause_s > deadline:
                raise StorageError(
                    errno.EIO, f"{what} ({reason}); check the store and the network, then run the same command again"
                ) from error
        time.sleep(pause_s * random.uniform(0.5, 1))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def shown(uri: str) -> str:
    """An address for people: without options and secrets."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"


def _briefly(error: Exception) -> str:
    """An error of somebody else's, briefly."""
    text = one_line(error)
    return text.partition(" (Request ID")[0].partition("; Details:")[0][:240]

"""Storage that refuses for a while: what wrote to it is done again, later and later, before it is given up."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import MoECompressError, StorageError

Result = TypeVar("Result")

DELAYS_S = (0.5, 1, 2, 4, 8, 16)
"""Pauses before each further try: half a minute together."""

_FINAL = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EFBIG, errno.ENOSPC)
"""What does not pass by itself."""

_GIVEN_UP = "moe_compress_given_up"
"""Marks the reason of an error that was waited for: whoever called the function that waited need not."""


def patiently(function: Callable[..., Result], *args: Any) -> Result:
    """Calls an idempotent function until storage lets it do its work.

    Args:
        function: what to do.
        args: what to call it with.

    Raises:
        MoECompressError, OSError: of the last try; what does not pass by itself, and any other error, at once.
    """
    delays_s = iter(DELAYS_S)
    while True:
        try:
            return function(*args)
        except (MoECompressError, OSError) as error:
            reason = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(reason, OSError) or reason.errno in _FINAL or hasattr(reason, _GIVEN_UP):
                raise
            if isinstance(reason, StorageError):  # object stores have been waited for
                raise
            delay_s = next(delays_s, None)
            if delay_s is None:
                setattr(reason, _GIVEN_UP, True)
                raise
        time.sleep(delay_s)

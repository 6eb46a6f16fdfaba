"""Settings of a process that does numerical work: reproducible bytes, small memory, few page faults."""

from __future__ import annotations

import ctypes
import os

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MMAP_BYTES = 4 * 2**20


def settle(threads: int) -> None:
    """Fixes the number of numerical threads and makes freed memory go back to the system.

    The order of floating-point sums, and so the bytes of a job's result, may depend on the number of threads. As for
    memory: glibc keeps freed blocks of up to 32 MB, and oneDNN a thousand compiled products of a megabyte each;
    together they would cost several layers. Memory that went back comes again page by page, half the time of an
    elementwise operation, hence huge pages. The environment is read at the first tensor and the first product.
    """
    torch.set_num_threads(threads)
    choose_accelerator()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "192")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc only
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_ARENA_MAX, 2)


def choose_accelerator() -> None:
    """Tells DeepSpeed, which accelerate imports where it is installed, that there is no GPU; else it warns of that."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def device_bytes() -> int:
    """Memory of the GPU that this process sees first, or else of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


def give_back() -> None:
    """Returns what is free between blocks in use to the system as well; takes a millisecond or two."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc only
        trim(0)

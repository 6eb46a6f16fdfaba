"""Object stores: paths of them, ranges and whole objects through a cache of the node, uploads; locks, also of disks."""

from .cache import FOLDER_VARIABLE, LIMIT_VARIABLE, Cache, node_cache, node_scratch, node_staging
from .disk_lock import is_locked, locked
from .lock import StoredLock
from .objects import check_writable, copy, files_in, local, local_folder, remove_folder, upload, writing
from .paths import StoredPath, address, as_path, is_stored
from .ranges import BLOCK_BYTES, open_ranges, prefetch, read_range
from .unfinished import abort_unfinished, unfinished_uploads

__all__ = [
    "BLOCK_BYTES",
    "FOLDER_VARIABLE",
    "LIMIT_VARIABLE",
    "Cache",
    "StoredLock",
    "StoredPath",
    "abort_unfinished",
    "address",
    "as_path",
    "check_writable",
    "copy",
    "files_in",
    "is_locked",
    "is_stored",
    "local",
    "local_folder",
    "locked",
    "node_cache",
    "node_scratch",
    "node_staging",
    "open_ranges",
    "prefetch",
    "read_range",
    "remove_folder",
    "unfinished_uploads",
    "upload",
    "writing",
]

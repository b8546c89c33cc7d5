"""Everything that is read from or written to a file or object store goes through here.

A store is named by a URL: a local folder, or anything fsspec has a driver for (`s3://`, `gs://`,
`az://`, `memory://` in tests). Credentials come from the environment or the platform, as each
driver documents; a URL that carries any is refused.

Only this package retries: transient errors (timeouts, broken connections, 5xx, "slow down")
with growing pauses, a bounded number of times; anything else fails at once. What comes out are
`StorageError`, `NotFoundError` and `AlreadyExistsError`, with the URL in the message.

What never changes can be kept on a local disk once it was read: `DiskCache`, `open_cached_store`.
"""

from pipeline.storage._cached_store import CachedStore, open_cached_store
from pipeline.storage._disk_cache import DiskCache
from pipeline.storage._inputs import InputStream, find_inputs, open_input, read_input, stat_input
from pipeline.storage._store import Entry, Store, open_store

__all__ = [
    "CachedStore",
    "DiskCache",
    "Entry",
    "InputStream",
    "Store",
    "find_inputs",
    "open_cached_store",
    "open_input",
    "open_store",
    "read_input",
    "stat_input",
]

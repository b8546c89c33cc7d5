"""webdataset shards -> samples, in the order of the shard, with nothing lost in silence.

The grouping of files into samples is webdataset's own. The archive itself is read here, because
webdataset and `tarfile` take a damaged header, a cut-off file and a missing end for the end of the
shard. Only bytes are taken: no member is ever unpickled, decompressed or written to disk, and no
URL is opened by anything but `storage`.
"""

from pipeline.source._samples import SourceOptions, read_shard
from pipeline.source._shards import expand_shards, shard_id

__all__ = ["SourceOptions", "expand_shards", "read_shard", "shard_id"]

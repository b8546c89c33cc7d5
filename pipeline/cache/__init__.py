"""The cache on disk: layout, rows, writing, committing, snapshots and reading, in bytes.

Nothing here knows torch or a codec; `pipeline.carved_cache` joins the two.
"""

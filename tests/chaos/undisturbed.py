"""Carve folders of shards with no Ray and no fault: `undisturbed.py CONFIG [IN OUT]...`."""

import sys

import torch

from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.carve_shard import ShardCarver
from pipeline.config import load_config
from pipeline.job import resolve_job
from pipeline.source import expand_shards
from pipeline.storage import open_store
from tests.chaos import plugin_path


def carve_all(config: str, input_shards: str, output: str) -> None:
    job = resolve_job(load_config(config, input_shards=input_shards, output_url=output))
    store = open_store(output)
    claim_identity(store, job.identity)
    carver = ShardCarver(job)
    carver.load()
    for shard in expand_shards(input_shards):
        carver.carve(shard)
    carver.close()
    build_snapshot(store)


if __name__ == "__main__":
    plugin_path.install()
    torch.set_num_threads(1)
    config_path, *places = sys.argv[1:]
    for here, there in zip(places[::2], places[1::2], strict=True):
        carve_all(config_path, here, there)

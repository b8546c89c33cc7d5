"""Ray over a cache: its parts by ray.data, its dataset in the workers of Ray Train."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import torch

from pipeline import CarvedDataset, open_cache
from pipeline.cache import row
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.carved_cache import CarvedCache
from pipeline.codecs import Codec
from pipeline.storage import open_store
from pipeline.types import PackedTokens
from tests.cache.rows import IDENTITY, commit_rows, make_row, make_writer

pytestmark = [
    pytest.mark.ray,
    # Ray warns of options of its own as it sets them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

NUM_ROWS = 30


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CarvedCache:
    """A cache, beside whose parts lies what a crash left."""
    store = open_store(str(tmp_path_factory.mktemp("parts")))
    claim_identity(store, IDENTITY)
    rows = [make_row(f"k{i:02d}", seed=i, num_tokens=10 + i) for i in range(NUM_ROWS)]
    commit_rows(store, "a", rows[:20], row_group_bytes=12_000)
    commit_rows(store, "b", rows[20:])
    with make_writer(store, "c") as left:
        left.write(make_row("left", seed=99))
        left.finish([])
    build_snapshot(store)
    return open_cache(store.url)


def unpacked(rows: dict[str, np.ndarray], *, codec: Codec) -> dict[str, Any]:
    """Decode a block of a cache's rows, each to (K, D) features in position order."""
    found = []
    for key, packed in zip(rows["key"], rows["packed"], strict=True):
        cut = row.aux_length(packed, where=key)
        tokens, aux = packed[cut:], packed[:cut]
        stored = row.unpack_row(tokens, aux, tokens_length=len(tokens), where=key)
        features = codec.unpack(
            [
                PackedTokens(
                    tokens=stored.tokens,
                    aux=stored.codec_aux,
                    num_tokens=stored.num_tokens,
                    head=stored.head,
                )
            ]
        )
        found.append(features.numpy()[np.argsort(stored.positions)])
    return {"key": rows["key"], "features": found}


@pytest.mark.slow
def test_ray_data_reads_the_committed_parts_and_decodes_them(
    cache: CarvedCache, ray_cluster: None
) -> None:
    parts = [cache.reader.store.url_of(path) for path in cache.reader.files]
    rows = ray.data.read_parquet(parts).select_columns(["key", "packed"])

    decoded = rows.map_batches(unpacked, fn_kwargs={"codec": cache.codec}, batch_size=8)
    found = {one["key"]: torch.tensor(one["features"]) for one in decoded.take_all()}

    assert len(list(Path(cache.reader.store.url).rglob("part-*"))) == len(parts) + 1
    assert sorted(found) == list(cache)
    assert all(torch.equal(found[key], cache[key].features) for key in cache)


def train_rank(config: dict[str, Any]) -> None:
    """Train as a worker of Ray Train: the dataset asks torch.distributed which one it is."""
    import ray.train.torch

    dataset = CarvedDataset(
        open_cache(config["url"]), batch_size=4, shuffle=True, ends=config["ends"]
    )
    model = ray.train.torch.prepare_model(torch.nn.Linear(64, 1))
    seen = []
    for batch in dataset:
        tokens = batch.packed()
        model(tokens.features).square().mean().backward()
        seen.append(batch.keys)
    rank = ray.train.get_context().get_world_rank()
    Path(config["output"], f"{rank}.json").write_text(json.dumps(seen))


@pytest.mark.slow
def test_the_workers_of_ray_train_share_the_rows(
    cache: CarvedCache, ray_cluster: None, tmp_path: Path
) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = {"url": cache.reader.store.url, "ends": "pad", "output": str(tmp_path)}
    trainer = TorchTrainer(
        train_rank,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(tmp_path / "runs")),
    )

    trainer.fit()

    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [len(keys) for keys in first] == [len(keys) for keys in second] == [4, 4, 4, 3]
    assert Counter(key for keys in first + second for key in keys) == Counter(cache)

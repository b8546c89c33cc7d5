"""The connector that lets vLLM load tokens from a cache by key.

Every test runs on a stand-in of vLLM's base class, and on that class itself where its unpacked
package is at hand (`tests/engine_source.py`).
"""

import dataclasses
import importlib
import logging
import pickle
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, Qwen2_5_VLConfig

from pipeline.errors import ConfigError
from tests.carved_images import make_cache, make_image
from tests.engine_source import running_source, unpacked

BASE = "vllm.distributed.ec_transfer.ec_connector.base"
FACTORY = "vllm.distributed.ec_transfer.ec_connector.factory"
MIXIN = "vllm.v1.worker.ec_connector_model_runner_mixin"
INPUTS = "vllm.multimodal.inputs"
CONFIG = "vllm.config.ec_transfer"
REAL = (
    "vllm.utils.import_utils",
    "vllm.utils.collection_utils",
    "vllm.utils.jsontree",
    INPUTS,
    CONFIG,
    BASE,
    FACTORY,
    MIXIN,
    "vllm.v1.core.sched.scheduler",
)
CONNECTOR = "pipeline.consumers.vllm_ec_connector"
QWEN = Qwen2_5_VLConfig(text_config={"hidden_size": 64})
RECTANGLE = [7, 9, 10, 19, 21, 22]
ABSTRACT = (
    "build_connector_meta",
    "has_cache_item",
    "save_caches",
    "start_load_caches",
    "update_state_after_alloc",
)


def stand_in() -> ModuleType:
    """Return a module with the part of vLLM's base classes that a connector builds on."""

    def made(self: Any, vllm_config: Any, role: Any) -> None:
        self._connector_metadata, self._role = None, role
        self.is_consumer = vllm_config.ec_transfer_config.is_ec_consumer

    def bind_connector_metadata(self: Any, metadata: Any) -> None:
        self._connector_metadata = metadata

    def _get_connector_metadata(self: Any) -> Any:
        return self._connector_metadata

    module = ModuleType(BASE)
    methods = {
        **{name: abstractmethod(lambda self, *_: None) for name in ABSTRACT},
        "__init__": made,
        "bind_connector_metadata": bind_connector_metadata,
        "_get_connector_metadata": _get_connector_metadata,
    }
    module.ECConnectorBase = type("ECConnectorBase", (ABC,), methods)  # type: ignore[attr-defined]
    module.ECConnectorMetadata = type("ECConnectorMetadata", (ABC,), {})  # type: ignore[attr-defined]
    module.ECConnectorRole = SimpleNamespace(SCHEDULER=0, WORKER=1)  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="module")
def source() -> Iterator[dict[str, ModuleType]]:
    root = unpacked("vllm", "0.33.0")
    with running_source(root, ("vllm",), REAL) as modules:
        yield modules


@pytest.fixture(params=["stand-in", "source"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The connector's module, on either base class."""
    base = stand_in() if request.param == "stand-in" else request.getfixturevalue("source")[BASE]
    parents = [BASE.rsplit(".", n)[0] for n in range(1, BASE.count(".") + 1)]
    for name in parents:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, BASE, base)
    monkeypatch.delitem(sys.modules, CONNECTOR, raising=False)
    loaded = importlib.import_module(CONNECTOR)
    # Pickle looks classes up here; after the test the next one imports anew.
    monkeypatch.setitem(sys.modules, CONNECTOR, loaded)
    return loaded


@pytest.fixture
def images() -> list[Any]:
    return [make_image("a/0"), make_image("a/1", positions=RECTANGLE, seed=1)]


@pytest.fixture
def url(tmp_path: Path, images: list[Any]) -> str:
    make_cache(str(tmp_path), images)
    return str(tmp_path)


def engine_config(options: dict[str, Any], *, hf_config: Any = QWEN, role: str = "ec_consumer"):
    transfer = SimpleNamespace(
        ec_role=role,
        is_ec_producer=role in ("ec_producer", "ec_both"),
        is_ec_consumer=role in ("ec_consumer", "ec_both"),
        ec_connector_extra_config=options,
    )
    model = SimpleNamespace(hf_config=hf_config, dtype=torch.bfloat16)
    return SimpleNamespace(ec_transfer_config=transfer, model_config=model)


def connect(module: ModuleType, options: dict[str, Any], **config: Any) -> Any:
    return module.CarvedCacheConnector(engine_config(options, **config), module.ECConnectorRole)


def feature(key: str, count: int, *, data: Any = ("image_grid_thw",), offset: int = 4) -> Any:
    place = SimpleNamespace(offset=offset, length=count, get_num_embeds=lambda: count)
    data = None if data is None else dict.fromkeys(data)
    return SimpleNamespace(identifier=key, mm_position=place, data=data)


def request_for(*features: Any) -> Any:
    return SimpleNamespace(request_id="r", mm_features=list(features))


def test_tokens_travel_from_the_cache_to_the_encoder_cache(module, url, images):
    scheduler, worker = connect(module, {"cache_url": url}), connect(module, {"cache_url": url})
    request = request_for(feature("a/1", 6), feature("a/0", 24, offset=11), feature("new", 5))
    already = torch.zeros(1)
    encoder_cache = {"other": already}

    for index in (0, 1, 2):
        scheduler.update_state_after_alloc(request, index)
    meta = pickle.loads(pickle.dumps(scheduler.build_connector_meta(None)))
    worker.bind_connector_metadata(meta)
    worker.start_load_caches(encoder_cache)
    worker.save_caches(encoder_cache, "a/0")

    assert meta.keys == ("a/1", "a/0")
    assert scheduler.build_connector_meta(None).keys == ()
    assert list(encoder_cache) == ["other", "a/1", "a/0"]
    assert torch.equal(encoder_cache["a/1"], images[1].features.bfloat16())
    assert torch.equal(encoder_cache["a/0"], images[0].features.bfloat16())


def test_what_a_worker_has_is_not_read_again(module, url):
    worker = connect(module, {"cache_url": url})
    kept = torch.zeros(6, 64)
    encoder_cache = {"a/1": kept}

    worker.bind_connector_metadata(module.KeysToLoad(keys=("a/1",)))
    worker.start_load_caches(encoder_cache)

    assert encoder_cache["a/1"] is kept


def test_keys_of_the_cache_are_known_and_others_are_not(module, url):
    connector = connect(module, {"cache_url": url})

    assert connector.has_cache_item("a/0")
    assert not connector.has_cache_item("a")
    assert not connector.has_cache_item("lora:a/0")


def test_a_budget_of_the_connector_cuts_the_rows(module, url, images):
    connector = connect(module, {"cache_url": url, "keep_tokens": 2})
    encoder_cache: dict[str, torch.Tensor] = {}

    connector.bind_connector_metadata(module.KeysToLoad(keys=("a/1",)))
    connector.start_load_caches(encoder_cache)

    # Ranks of these images run against their positions.
    assert torch.equal(encoder_cache["a/1"], images[1].features[-2:].bfloat16())
    assert connector.ensure_cache_available(request_for(feature("a/1", 2)), 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (feature("missing", 6), "no image 'missing' in .*, and none in the request"),
        (feature("a/1", 7), "image 'a/1' has 6 tokens and the prompt has room for 7"),
        (feature("a/1", 24, data=["pixel_values"]), "has 6 tokens and the prompt has room for 24"),
    ],
)
def test_a_request_that_cannot_be_served_fails_alone(module, url, bad, message, caplog):
    connector = connect(module, {"cache_url": url})

    with caplog.at_level(logging.ERROR):
        assert not connector.ensure_cache_available(request_for(feature("a/0", 24), bad), 0)
        assert connector.ensure_cache_available(request_for(feature("a/0", 24)), 0)

    assert connector.take_unavailable_requests() == {"r"}
    assert connector.take_unavailable_requests() == set()
    (record,) = caplog.records
    assert pytest.raises(AssertionError, match=message).matches(AssertionError(record.message))


@pytest.mark.parametrize(
    "fine",
    [
        feature("new", 24, data=["pixel_values", "image_grid_thw"]),
        feature("new", 24, data=["image_embeds", "image_grid_thw"]),
        feature("new", 24, data=None),
        feature("a/1", 6),
    ],
)
def test_requests_that_bring_what_the_cache_lacks_are_left_to_vllm(module, url, fine):
    connector = connect(module, {"cache_url": url})

    assert connector.ensure_cache_available(request_for(fine), 0)
    assert connector.take_unavailable_requests() == set()


def test_images_whose_keys_and_values_vllm_has_are_not_asked_for(module, url):
    request = request_for(feature("missing", 6, offset=4))

    assert connect(module, {"cache_url": url}).ensure_cache_available(request, 10)
    assert not connect(module, {"cache_url": url}).ensure_cache_available(request, 9)


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({}, {}, "names no cache_url"),
        ({"url": "x"}, {}, "has url; known: cache_url, keep_tokens, snapshot_number"),
        ({"cache_url": None}, {"role": "ec_both"}, "ec_role='ec_both': a cache is only read"),
        (
            {"cache_url": None},
            {"hf_config": Qwen2_5_VLConfig(text_config={"hidden_size": 32})},
            "tokens 64 wide and the qwen2_5_vl takes 32",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_at_start(module, url, options, config, message):
    if "cache_url" in options:
        options = {**options, "cache_url": url}

    with pytest.raises(ConfigError, match=message):
        connect(module, options, **config)


def test_a_model_that_wants_features_in_the_request_is_refused_at_start(module, url):
    with pytest.raises(ConfigError, match="cannot size the prompt of a llava without its features"):
        connect(module, {"cache_url": url}, hf_config=LlavaConfig())


def test_the_stand_in_asks_for_what_vllm_asks_for(source):
    assert source[BASE].ECConnectorBase.__abstractmethods__ == set(ABSTRACT)


def test_vllm_finds_makes_and_drives_the_connector(source, url, images, monkeypatch):
    """The factory, the worker's side of a step and the scheduler's bookkeeping are vLLM's own."""
    monkeypatch.delitem(sys.modules, CONNECTOR, raising=False)
    transfer_class = dataclasses.dataclass(source[CONFIG].ECTransferConfig)
    config = engine_config({})
    config.ec_transfer_config = transfer_class(
        ec_connector="CarvedCacheConnector",
        ec_connector_module_path=CONNECTOR,
        ec_role="ec_consumer",
        ec_connector_extra_config={"cache_url": url},
    )
    factory, role = source[FACTORY].ECConnectorFactory, source[BASE].ECConnectorRole
    scheduler_side = factory.create_connector(config, role.SCHEDULER)
    worker_side = factory.create_connector(config, role.WORKER)
    inputs = source[INPUTS]
    grid = inputs.MultiModalFieldElem(
        data=torch.tensor([1, 4, 6]), field=inputs.MultiModalBatchedField()
    )
    request = SimpleNamespace(
        request_id="r",
        mm_features=[
            inputs.MultiModalFeatureSpec(
                data=inputs.MultiModalKwargsItem({"image_grid_thw": grid}),
                modality="image",
                identifier=key,
                mm_position=inputs.PlaceholderRange(offset=3, length=6),
            )
            for key in ("a/1", "missing")
        ],
    )
    scheduler_class = source["vllm.v1.core.sched.scheduler"].Scheduler
    scheduler = SimpleNamespace(
        ec_connector=scheduler_side,
        encoder_cache_manager=SimpleNamespace(allocate=lambda request, index: None),
    )
    mixin = source[MIXIN]
    monkeypatch.setattr(mixin, "has_ec_transfer", lambda: True)
    monkeypatch.setattr(mixin, "get_ec_transfer", lambda: worker_side)
    monkeypatch.setattr(mixin, "ECConnectorOutput", SimpleNamespace)

    assert scheduler_class._ec_transfer_pending(scheduler, request, 0)
    assert scheduler_side.take_unavailable_requests() == {"r"}
    del request.mm_features[1]
    assert not scheduler_class._ec_transfer_pending(scheduler, request, 0)
    scheduler_class._allocate_encoder_inputs(scheduler, request, [0], [])
    step = SimpleNamespace(
        ec_connector_metadata=scheduler_side.build_connector_meta(None), finished_req_ids=set()
    )
    encoder_cache: dict[str, torch.Tensor] = {}
    runner = mixin.ECConnectorModelRunnerMixin
    with runner.maybe_get_ec_connector_output(step, encoder_cache) as output:
        runner.maybe_save_ec_to_connector(encoder_cache, "a/1")

    assert list(encoder_cache) == ["a/1"]
    assert torch.equal(encoder_cache["a/1"], images[1].features.bfloat16())
    assert (output.finished_sending, output.finished_recving) == (None, None)

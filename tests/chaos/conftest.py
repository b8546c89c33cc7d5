"""What all storms share: a cluster of two nodes, a store behind a faulty link, the truth."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.chaos.cluster import TwoNodes
from tests.chaos.forge import Forge
from tests.chaos.library import Library
from tests.chaos.plan import StormPlan
from tests.chaos.storm import Findings, Storm
from tests.chaos.world import World
from tests.servers.fault_proxy import FaultProxy
from tests.servers.radosgw import Radosgw


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("storms", "storms (where tests/chaos is named on the command line)")
    group.addoption("--seed", action="append", type=int, help="of the long run: these storms alone")
    group.addoption("--storm-log", help="append what each storm was like to this file")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A cluster that knows the way to a gateway which need not be there yet."""
    folder = tmp_path_factory.mktemp("storms")
    with contextlib.ExitStack() as stack:
        forge = stack.enter_context(Forge(folder))
        proxy = stack.enter_context(FaultProxy(target_port=0))
        way = Radosgw(folder).environment(proxy.url)
        cluster = stack.enter_context(TwoNodes(way))
        library = Library(folder, forge)
        yield World(folder=folder, forge=forge, cluster=cluster, library=library, proxy=proxy)


@pytest.fixture
def rage(request: pytest.FixtureRequest, world: World) -> Callable[..., Findings]:
    """Run a storm and note what it was like."""

    def run(plan: StormPlan, **options: bool) -> Findings:
        if plan.store == "s3" and world.gateway is None:
            world.gateway = request.getfixturevalue("radosgw")
            world.proxy.target_port = world.gateway.port
        storm = Storm(plan, world, **options)
        try:
            return storm.run()
        finally:
            if log := request.config.getoption("--storm-log", default=None):
                with Path(log).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(storm.findings)) + "\n")

    return run

"""What storms share."""

from dataclasses import dataclass
from pathlib import Path

from tests.chaos.cluster import TwoNodes
from tests.chaos.forge import Forge
from tests.chaos.library import Library
from tests.chaos.plan import Store
from tests.chaos.raw import BucketFolder, LocalFolder, RawFolder
from tests.servers.fault_proxy import FaultProxy
from tests.servers.radosgw import Radosgw

RUN_S = 900.0  # that a run may take; a machine may be busy


@dataclass(kw_only=True)
class World:
    """A cluster, a store behind a faulty link, and the truth.

    Args:
        folder: for corpora, caches and logs.
        forge: starts the runs.
        cluster: they connect to.
        library: what must come out.
        proxy: the way of runs and actors to the gateway.
        gateway: S3; None until a storm needs it.
    """

    folder: Path
    forge: Forge
    cluster: TwoNodes
    library: Library
    proxy: FaultProxy
    gateway: Radosgw | None = None

    def place(self, store: Store, path: str) -> RawFolder:
        """Return a folder on a store."""
        if store == "local":
            return LocalFolder(self.folder / path)
        return BucketFolder("storms", path, self.gateway.environment())

    def run_environment(self, store: Store) -> dict[str, str]:
        """Return what a run needs."""
        way = {} if store == "local" else self.gateway.environment(self.proxy.url)
        return {"RAY_ADDRESS": self.cluster.address, **way}

    def reader_environment(self, store: Store) -> dict[str, str]:
        """Return what a reader needs; no fault is on its way."""
        return {} if store == "local" else dict(self.gateway.environment())

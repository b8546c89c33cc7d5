"""OpenStack Swift with its S3 interface: answers a conditional put 501, not implemented."""

from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers.process import ServerProcess, free_ports, listens, require_programs, run_to_end
from tests.servers.s3_server import S3Server

_KINDS = ("account", "container", "object")
_PYTHON = "/usr/bin/python3"  # Debian's own, which its Swift belongs to
_PROGRAMS = (_PYTHON, "swift-proxy-server", *(f"swift-{k}-server" for k in _KINDS), "memcached")

# Where things are: one copy of everything on one device.
_MAKE_RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *pairs = sys.argv[1:]
for kind, port in (pair.split("=") for pair in pairs):
    ring = RingBuilder(2, 1, 1)
    place = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1"}
    ring.add_dev({**place, "weight": 1})
    ring.rebalance()
    ring.get_ring().save(f"{folder}/{kind}.ring.gz")
"""
_SWIFT = """
[swift-hash]
swift_hash_path_suffix = tests
[storage-policy:0]
name = default
default = yes
"""
_COMMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = root
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
"""
_BACKEND = """
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
_PROXY = """
[pipeline:main]
pipeline = catch_errors proxy-logging cache listing_formats s3api tempauth proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:proxy-logging]
use = egg:swift#proxy_logging
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
"""


class Swift(S3Server):
    """Use it in a `with` block. Signatures are checked.

    Args:
        folder: an empty one, for its files.

    Attributes:
        port: of the proxy server, on loopback.
    """

    access_key = "test:tester"
    secret_key = "testing"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = dict(zip(("proxy", "memcached", *_KINDS), free_ports(5), strict=True))
        self.port = self._ports["proxy"]
        self._processes: dict[str, ServerProcess] = {}

    def __enter__(self) -> Self:
        require_programs(
            _PROGRAMS,
            "on Debian: apt-get install --no-install-recommends swift-proxy swift-account "
            "swift-container swift-object memcached",
        )
        try:
            self._start_all()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._processes:
            self._processes.popitem()[1].kill()

    def _start_all(self) -> None:
        (self.folder / "devices" / "d1").mkdir(parents=True)
        (self.folder / "swift.conf").write_text(_SWIFT)
        self._make_rings()
        port = str(self._ports["memcached"])
        self._start("memcached", ["memcached", "-l", "127.0.0.1", "-p", port, "-u", "root"])
        for kind in (*_KINDS, "proxy"):
            config = self.folder / f"{kind}-server.conf"
            values = {"port": self._ports[kind], "memcached": port, "kind": kind}
            text = _COMMON + (_PROXY if kind == "proxy" else _BACKEND)
            config.write_text(text.format(folder=self.folder, **values))
            self._start(kind, [f"swift-{kind}-server", str(config), "--verbose"])
        for kind, process in self._processes.items():
            process.wait_until(lambda port=self._ports[kind]: listens(port))

    def _start(self, kind: str, command: list[str]) -> None:
        self._processes[kind] = ServerProcess(command, log=self.folder / f"{kind}.log")

    def _make_rings(self) -> None:
        pairs = [f"{kind}={self._ports[kind]}" for kind in _KINDS]
        run_to_end([_PYTHON, "-c", _MAKE_RINGS, str(self.folder), *pairs])

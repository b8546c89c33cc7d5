"""CRC-32C (Castagnoli, RFC 3720 appendix B.4), the checksum of all bytes in a cache."""

from fastcrc import crc32


def crc32c(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """Return the checksum of some bytes, or of all bytes where `before` is that of those before."""
    return int(crc32.iscsi(data, before))

"""Put this process into a network namespace that holds nothing but loopback.

Ray, cloud clients and model libraries try to reach the world when they start, and Ray listens on
every interface. Inside such a namespace tests are offline by construction. It takes the right to
make namespaces (root has it); elsewhere the silent environment of `conftest.py` must do.
"""

import ctypes
import fcntl
import socket
import struct

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 0x1


def isolate() -> bool:
    """Enter a new namespace with loopback up; return False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
    return True

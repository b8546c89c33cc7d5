"""How much memory a process of its own takes: what `ru_maxrss` does not tell.

That is no less than the peak of the process that started it, since `exec` hands it on.
"""

from pathlib import Path


def memory_bytes(name: str) -> int:
    """Return what Linux says of this process's memory: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))

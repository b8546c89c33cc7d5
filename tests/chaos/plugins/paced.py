"""The encoder of the storms: the fake one, and it takes its time, so that kills land in work."""

import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.encoders import Pixels
from pipeline.types import VisualTokens
from tests.fakes import FakeEncoder

_LONGEST_WAIT_S = 900.0


@dataclass(kw_only=True)
class Paced(FakeEncoder):
    """Sleeps while it has the device, from 0.2 to 1.8 times `pause_s` an image, by its pixels.

    Loaded, it leaves its pid at the gate and waits until the gate is open: the actors of a run
    begin together, however long each takes to start.
    """

    pause_s: float = 0.0
    gate: str = ""  # a folder that all actors see; "": none

    def describe(self, signals: frozenset[str] = frozenset()) -> Mapping[str, Any]:
        # Neither pause nor gate: they change no stored value.
        return {**super().describe(signals), "model": "paced"}

    def load(self, **options: Any) -> None:
        super().load(**options)
        if self.gate:
            Path(self.gate, f"{os.getpid()}.ready").touch()
            deadline = time.monotonic() + _LONGEST_WAIT_S
            while not Path(self.gate, "open").exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.gate} stays shut")
                time.sleep(0.01)

    def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
        for image in prepared:
            share = (zlib.crc32(image.tobytes()) & 0xFFFF) / 0xFFFF
            time.sleep(self.pause_s * (0.2 + 1.6 * share))
        return super().encode_pixels(prepared)

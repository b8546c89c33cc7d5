"""What a carver is. See `docs/design.md` for the contract that tests hold every carver to."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Carver(ABC):
    """A pure, deterministic function from all tokens of an image to the few worth storing.

    A subclass is a frozen dataclass whose fields are its options, every one with a default.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    nested: ClassVar[bool] = True
    """True if carving to K tokens equals the K best-ranked tokens of any larger result."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals that `carve` reads; may depend on the options."""
        return frozenset()

    @abstractmethod
    def carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        """Carve each image of a batch, independently of its batch-mates.

        Args:
            tokens: B images of one grid with the signals named in `needs`.

        Returns:
            One result per image, in order.
        """

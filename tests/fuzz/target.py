"""What is fuzzed: inputs by number, and what must hold for each."""

from abc import ABC, abstractmethod
from random import Random


class BrokenPromiseError(Exception):
    """An input was neither refused by name nor read rightly."""


class Target(ABC):
    """One reader under test.

    An input depends on the target's name, the run's seed and its number, and on nothing else, so
    any can be made again.
    """

    name: str
    memory_bytes = 1 << 30  # address space above what the process has when it starts

    def make(self, seed: int, number: int) -> object:
        """Return an input."""
        return self.mutated(Random(f"{self.name}/{seed}/{number}"))

    @abstractmethod
    def mutated(self, random: Random) -> object:
        """Return a damaged input."""

    @abstractmethod
    def check(self, made: object) -> str:
        """Read an input; return in a word how that ended.

        Raises:
            BrokenPromiseError: wrongly.
        """

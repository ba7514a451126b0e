"""What must be closed at its end: by `close`, or by itself as a context manager."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """Abstract: closed where a ``with`` ends, whatever happened there."""

    @abstractmethod
    def close(self) -> None:
        """End threads, give memory and files back. Closing again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

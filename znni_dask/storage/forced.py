"""Folders whose files are on the disk when they are written, not only handed to the system.

A journal that is forced to the disk must tell of no chunk that is not there yet, also where the
power fails.
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from zarr.storage import LocalStore, WrapperStore

if TYPE_CHECKING:
    from zarr.abc.buffer import Buffer


class ForcedStore(WrapperStore[LocalStore]):
    """A Zarr store in a folder; what is set is on the disk when that returns."""

    @classmethod
    def at(cls, folder: Path) -> ForcedStore:
        """The store in a folder, which may be made later."""
        return cls(LocalStore(folder))

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file; it is kept when this returns, with the folders that lead to it."""
        await self._store.set(key, value)
        await asyncio.to_thread(self._force, self._store.root / key)

    def _force(self, path: Path) -> None:
        for place in (path, *path.parents):  # folders may be as new as the file
            force(place)
            if place == self._store.root.parent:
                break


def force(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot be asked, mostly of folders
            raise
    finally:
        os.close(number)

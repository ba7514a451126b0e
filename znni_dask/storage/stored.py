"""What every kind of volume is on disk: an array, opened where it is read, and what was found of
its axes."""

from __future__ import annotations

import errno
import lzma
import math
import struct
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from znni_dask.errors import OutputError, RunError, ZnniError
from znni_dask.geometry import ceil_divide
from znni_dask.storage.clouds import (
    is_forbidden,
    is_unreachable,
    lacks_credentials,
    of_clouds,
    refusals,
)
from znni_dask.storage.urls import without_secrets

Three = tuple[float, float, float]
Units = tuple[str | None, str | None, str | None]
_UNREADABLE = (  # what formats, codecs and file systems raise; damaged metadata break in any way
    *(OSError, EOFError, BufferError, ImportError, RuntimeError, SyntaxError, tokenize.TokenError),
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
    *(struct.error, zlib.error, lzma.LZMAError, ZnniError),
)


@dataclass(frozen=True)
class Decoding:
    """The memory that reading takes beside the values read.

    Of the chunks that a read touches, ``at_once`` are decoded at a time, each held ``copies``
    times, and ``held`` are kept twice over meanwhile. ``fixed`` bytes come on top.
    """

    chunks: tuple[int, ...] | None = None
    at_once: int = 1
    copies: int = 2
    held: int = 0
    fixed: int = 0


@dataclass(frozen=True, eq=False)
class Stored:
    """An array on disk, opened in the process that first reads it: handles do not travel.

    ``opener`` (picklable) returns what has shape, dtype and indices: a zarr array, a memory map, …
    """

    opener: Callable[[], Any] = field(repr=False)  # it may hold credentials
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    decoding: Decoding = Decoding()

    @classmethod
    def of(
        cls, opener: Callable[[], Any], array: Any = None, decoding: Decoding | None = None
    ) -> Stored:
        """An array that is open already here."""
        array = opener() if array is None else array
        stored = cls(opener, tuple(array.shape), np.dtype(array.dtype), decoding or Decoding())
        stored.__dict__["opened"] = array
        return stored

    @cached_property
    def opened(self) -> Any:
        """The array; raises `RunError` where it is not the one that was opened first."""
        array = self.opener()
        if tuple(array.shape) != self.shape or array.dtype != self.dtype:
            raise RunError(
                f"it changed meanwhile: it was {self.dtype} of shape {self.shape}, it is "
                f"{array.dtype} of shape {tuple(array.shape)}"
            )
        return array

    def __getitem__(self, index: tuple[slice | int, ...]) -> Any:
        return self.opened[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return Stored, (self.opener, self.shape, self.dtype, self.decoding)

    def decoding_bytes(self, lengths: Sequence[int]) -> int:
        """Memory beside the result that reading a region of such lengths takes at most."""
        told = self.decoding
        if told.chunks is None:
            return told.fixed
        touched = math.prod(
            min(ceil_divide(n, c) + 1, ceil_divide(whole, c))
            for n, c, whole in zip(lengths, told.chunks, self.shape, strict=True)
        )
        return self.chunks_bytes(touched)

    def chunks_bytes(self, touched: int) -> int:
        """Memory beside the result that reading so many chunks takes at most."""
        told = self.decoding
        alive = told.copies * min(touched, told.at_once) + 2 * min(touched, told.held)
        return told.fixed + alive * math.prod(told.chunks or ()) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Found:
    """An array on disk with what its file says of it; scale and translation in (z, y, x).

    ``path`` is how messages call it, ``level`` the dataset taken of a multiscale image.
    """

    array: Stored
    axes: str
    path: str
    scale: Three = (1.0, 1.0, 1.0)
    translation: Three = (0.0, 0.0, 0.0)
    units: Units = (None, None, None)
    level: str | None = None


def axis_letters(names: Iterable[str | None] | None, dimensions: int) -> str:
    """Letters for the axes: as named, else the last ones of tczyx; "?" where neither does."""
    letters = [str(name).lower() for name in names or ()]
    if letters and all(letter in tuple("tczyx") for letter in letters):
        return "".join(letters)
    return "tczyx"[-dimensions:] if 2 <= dimensions <= 5 else "?"


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names as a message shows them."""
    shown = ", ".join(repr(name) for name in names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (shown or "none") + more


def unreadable() -> tuple[type[Exception], ...]:
    """The exceptions by which reading fails: of Python, and of the libraries for clouds that are
    loaded, whose own have no parent among those."""
    return (*_UNREADABLE, *of_clouds())


def reason(error: BaseException, asked: str = "read") -> str:
    """Why reading failed, or what else was ``asked``, and what to do where that is known."""
    if isinstance(error, ZnniError):
        return str(error)
    said = without_secrets(f"{type(error).__name__}: {error}")
    if lacks_credentials(error):
        public = (
            ", or give storage_options; public data needs {'anon': True} (S3) or "
            "{'token': 'anon'} (Google)"
        )
        return (
            f"credentials are missing or were refused ({said}): log in as the cloud's own tools do"
            + (public if asked == "read" else "")
        )
    if is_forbidden(error):
        return f"this user has no permission to {asked} it ({said})"
    if is_unreachable(error):
        return f"it cannot be reached ({said}): look at the address and the network"
    if isinstance(error, ImportError) or "imagecodecs" in said:
        return _not_installed(said)
    if "codec" in said.lower() and not isinstance(error, OSError):
        return f"{said}; it is stored with a codec that is not installed: install it, or recode it"
    if "filter" in said and isinstance(error, OSError):  # HDF5's word for a codec
        return f"{said}; if it is a compression filter that is missing: pip install hdf5plugin"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return f"{said}: allow this process more open files (ulimit -n)"
    return said


@contextmanager
def refused(asked: str, place: object) -> Iterator[None]:
    """What a store refuses while it is ``asked`` to "read" or "write" a place of an output becomes
    an `OutputError`."""
    try:
        yield
    except refusals() as error:
        why = reason(error, asked)
        raise OutputError(f"cannot {asked} {place}: {why}") from None


def _not_installed(said: str) -> str:
    if "imagecodecs" in said:
        return f"{said}: pip install 'znni_dask[tiff]'"
    if "h5py" in said:
        return "HDF5 needs the package h5py: pip install 'znni_dask[hdf5]'"
    return f"{said}: stores at URLs need pip install 'znni_dask[cloud]'"

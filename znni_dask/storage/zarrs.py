"""Zarr v2 and v3 arrays and OME-Zarr images, local or behind a URL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, Store, SuffixByteRequest
from zarr.codecs import ShardingCodecIndexLocation
from zarr.storage import FsspecStore, LocalStore, StorePath, WrapperStore

from znni_dask.errors import VolumeError
from znni_dask.storage import ngff
from znni_dask.storage.stored import Decoding, Found, Stored, axis_letters

Options = Mapping[str, Any]
METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
_START = ShardingCodecIndexLocation.start


class _Whole(WrapperStore[Store]):
    """A store that fails where a file is shorter than it should be and zarr would go on.

    zarr takes a chunk beyond the end of its shard for one never written, and Blosc reads beyond
    the end of what it is given: ``blosc`` says that chunks are Blosc's, ``index`` how many chunks
    a shard's index has at the start of the file.
    """

    blosc = False
    index = 0

    async def get(self, key: str, prototype: Any, byte_range: ByteRequest | None = None) -> Any:
        """The bytes of a key; raises `EOFError` where they are not as many as there should be."""
        value = await self._store.get(key, prototype, byte_range)
        if value is None or isinstance(byte_range, OffsetByteRequest):
            return value
        if byte_range is None:
            wanted = self._length(key, value)
        elif isinstance(byte_range, SuffixByteRequest):
            wanted = byte_range.suffix
        else:
            wanted = byte_range.end - byte_range.start
        if len(value) < wanted:
            raise EOFError(f"{key} is truncated: {len(value):,} bytes where {wanted:,} are due")
        if byte_range is not None and len(value) > wanted:
            raise EOFError(
                f"the server sent {len(value):,} bytes of {key} where {wanted:,} were asked for: "
                "sharded arrays need a server that sends ranges of files"
            )
        return value

    def _length(self, key: str, value: Any) -> int:
        """The bytes that a chunk or shard says it has; 0 where it does not say."""
        if key.rsplit("/", 1)[-1] in METADATA:
            return 0
        if self.blosc:
            return int.from_bytes(value[12:16].to_bytes(), "little") if len(value) >= 16 else 16
        if self.index:
            pairs = np.frombuffer(value[: 16 * self.index].to_bytes(), "<u8").reshape(-1, 2)
            there = pairs[pairs[:, 0] != np.iinfo(np.uint64).max]
            return int(there.sum(axis=1).max(initial=0))
        return 0


def _checked(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """The array, its store told what to look after."""
    store = array.store
    if not isinstance(store, _Whole):
        return array
    codecs = getattr(array.metadata, "codecs", ())
    if array.shards is None:
        store.blosc = any(type(c).__name__.startswith("Blosc") for c in array.compressors[-1:])
    elif any(getattr(codec, "index_location", None) == _START for codec in codecs):
        store.index = math.prod(s // c for s, c in zip(array.shards, array.chunks, strict=True))
    return array


def _store(place: str, options: Options | None) -> Store:
    if "://" in place:
        return _Whole(
            FsspecStore.from_url(place, storage_options=dict(options or {}), read_only=True)
        )
    return _Whole(LocalStore(place, read_only=True))


def _open_array(place: str, inside: str, options: Options | None) -> zarr.Array[Any]:
    return _checked(zarr.open_array(_store(place, options), path=inside, mode="r"))


def find(place: str, shown: str, level: int | str | None, options: Options | None) -> Found:
    """The array or image at a folder or URL; raises `VolumeError` where there is none."""
    node = _node(place, shown, options)
    if not isinstance(node, zarr.Group):
        if level is not None:
            raise VolumeError(f"level {level} of {shown}: it is an array, only images have levels")
        return _found(partial(_open_array, place, "", options), _checked(node), shown, None)
    chosen = ngff.choose_level(node, shown, level)
    try:
        array = _open_array(place, chosen.path, options)
    except (FileNotFoundError, zarr.errors.ContainsGroupError) as error:
        raise VolumeError(
            f"cannot read {shown}: its metadata tell of an array {chosen.path!r} that is not there"
        ) from error
    found = _found(partial(_open_array, place, chosen.path, options), array, shown, chosen.axes)
    return replace(
        found,
        scale=chosen.scale,
        translation=chosen.translation,
        units=chosen.units,
        level=chosen.path,
    )


def _node(place: str, shown: str, options: Options | None) -> zarr.Array[Any] | zarr.Group:
    try:
        return zarr.open(StorePath(_store(place, options)), mode="r")
    except FileNotFoundError as error:
        raise VolumeError(
            f"there is no Zarr array or OME-Zarr image at {shown}: neither zarr.json nor .zarray "
            "nor .zgroup was found there"
        ) from error


def _found(opener: partial[Any], array: Any, shown: str, axes: str | None) -> Found:
    if axes is None:
        names = getattr(array.metadata, "dimension_names", None)
        names = names or array.attrs.get("_ARRAY_DIMENSIONS")  # xarray's, in Zarr v2
        axes = axis_letters(names, array.ndim)
    return Found(Stored.of(opener, array, _decoding(array)), axes, shown)


def _decoding(array: Any) -> Decoding:
    """What zarr holds while it reads.

    As many chunks are read and decoded at once as its `async.concurrency` says. Of so many
    shards it first reads the encoded chunks, and gathers the decoded ones, before it copies.
    """
    parallel = int(zarr.config.get("async.concurrency") or 1)
    codecs = len([*array.compressors, *array.filters])
    copies = 2 if codecs < 2 else 3
    if array.shards is None:
        return Decoding(tuple(array.chunks), parallel, copies)
    inside = math.prod(s // c for s, c in zip(array.shards, array.chunks, strict=True))
    at_once = parallel * min(parallel, inside)
    return Decoding(tuple(array.chunks), at_once, copies, held=parallel * inside)

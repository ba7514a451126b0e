"""How often chunks are decoded by a run: one large volume, every way of storing it.

    python benchmarks/reading.py [--size 1024]

A network whose halo is 45 is planned within 2 GiB, and its blocks are read as a run reads them:
in the planned order, several at a time, through the cache of decoded chunks. Nothing is computed
or written. Voxels decoded are counted over voxels of the volume; beside the measured figure stand
what the same blocks cost when each reads for itself, and what blocks of one chunk do. The result
is kept under `benchmarks/results/` with the machine's fingerprint.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import zarr

from machine import keep
from znni_dask.geometry import Box, Size, text, triple
from znni_dask.job import Job
from znni_dask.kernels.warm import compile_kernels
from znni_dask.machine import MemoryMeter, anonymous_bytes, cores
from znni_dask.network.build import Builder
from znni_dask.patches import Layout
from znni_dask.planner import Request, plan
from znni_dask.reading import Reads
from znni_dask.selection import Selection
from znni_dask.storage.volume import Volume, open_volume

KINDS = ("zarr", "sharded zarr", "hdf5", "tiff")
ALLOWED_BYTES = 2 << 30


def layout(size: Size) -> Layout:
    """A network whose halo is 45, over a volume. It is one layer, whose work does not depend on the
    patch, so that how blocks are read decides."""
    b = Builder(1)
    return Layout(b.network(b.conv(b.input, 1, 3, dilation=45)), size, "reflect")


def slabs(size: Size, depth: int) -> Iterator[np.ndarray]:
    """The values of a volume, ``depth`` sections at a time: noise of four bits."""
    random = np.random.default_rng(0)
    for z in range(0, size[0], depth):
        slab = (min(depth, size[0] - z), *size[1:])
        yield random.integers(100, 116, slab, dtype=np.uint8)


def stored(kind: str, folder: Path, size: Size, chunk: int) -> Volume:
    """The volume, stored in chunks of one length; of TIFF in strips of as many rows."""
    chunks = (chunk, chunk, chunk)
    if kind == "tiff":
        import tifffile

        path = folder / "volume.tif"
        sections = itertools.chain.from_iterable(slabs(size, chunk))
        tifffile.imwrite(
            path, sections, shape=size, dtype=np.uint8, compression="lzw", rowsperstrip=chunk
        )
        return open_volume(path)
    if kind == "hdf5":
        import h5py

        path = folder / "volume.h5"
        with h5py.File(path, "w") as file:
            array = file.create_dataset("v", size, np.uint8, chunks=chunks, compression="lzf")
            fill(array, size, chunk)
        return open_volume(path)
    path = folder / f"{kind.split()[0]}.zarr"
    shards = tuple(2 * c for c in chunks) if kind == "sharded zarr" else None
    fill(
        zarr.create_array(str(path), shape=size, dtype="u1", chunks=chunks, shards=shards),
        size,
        2 * chunk,
    )
    return open_volume(path)


def fill(array: object, size: Size, depth: int) -> None:
    for i, slab in enumerate(slabs(size, depth)):
        array[i * depth : i * depth + len(slab)] = slab  # type: ignore[index]


def planned(volume: Volume, laid: Layout, unit: int, allowed_bytes: int) -> Job:
    """A run of the network that is planned, but reads only."""
    request = Request(
        layout=laid,
        unit=(unit, unit, unit),
        voxel_bytes=1,
        encoding_bytes=5,
        read_bytes=volume.read_bytes,
        write_bytes=16 << 20,
        baseline_bytes=anonymous_bytes(),
        allowed_bytes=allowed_bytes,
        threads=cores(),
        cells=volume.cells,
        hull=Box((0, 0, 0), laid.output_size),
    )
    return Job(laid, volume, Selection(volume), None, plan(request))


def read_all(job: Job) -> tuple[int, int]:
    """Read all blocks as a run does; the voxels decoded, and those needed."""
    cache = job.cache(job.plan)

    def read(place: tuple[int, Box]) -> tuple[int, int]:
        moment, block = place
        where, region = job.reads.place(block), job.laid.region(block)
        with cache.turn(job.turn(moment, where)) as reader:
            job.volume.read_extended(region, job.laid.boundary, job.nan, moment, reader.read)
        return reader.decoded_voxels, job.reads.needed_voxels(where, region)

    with ThreadPoolExecutor(job.plan.blocks_in_flight) as pool:
        made = list(pool.map(read, job.blocks()))
    return sum(d for d, _ in made), sum(n for _, n in made)


def measure(
    kind: str, folder: Path, size: Size, chunk: int = 128, allowed_bytes: int = ALLOWED_BYTES
) -> dict[str, object]:
    """One row of the result."""
    volume = stored(kind, folder, size, chunk)
    laid = layout(size)
    job = planned(volume, laid, 64, allowed_bytes)
    begin = time.perf_counter()
    with MemoryMeter() as meter:
        decoded, needed = read_all(job)
    seconds = time.perf_counter() - begin
    by_chunks = Reads(laid, triple([chunk] * 3), volume.cells).best(0)
    return {
        "kind": kind,
        "size": size,
        "chunk": volume.chunks,
        "block": job.plan.block,
        "blocks_in_flight": job.plan.blocks_in_flight,
        "reading": asdict(job.plan.reading),
        "amplification": decoded / needed,
        "amplification_of_these_blocks_alone": job.reads.best(0).amplification,
        "amplification_of_blocks_of_a_chunk_alone": by_chunks.amplification,
        "seconds": seconds,
        "decoded_gigabytes_per_second": decoded * volume.dtype.itemsize / seconds / 1e9,
        "peak_bytes_of_reading": meter.peak_bytes,
        "predicted_bytes_of_a_run": job.plan.predicted_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="for the volumes; by default a temporary one")
    options = parser.parse_args()
    compile_kernels()
    rows = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            row = measure(kind, Path(folder), triple([options.size] * 3))
        rows.append(row)
        print(
            f"{kind:12} blocks of {text(row['block'])}: decoded {row['amplification']:.2f} times "
            f"({row['amplification_of_these_blocks_alone']:.2f} each for itself, "
            f"{row['amplification_of_blocks_of_a_chunk_alone']:.1f} in blocks of a chunk), "
            f"{row['seconds']:.1f} s, {row['decoded_gigabytes_per_second']:.2f} GB/s"
        )
    print(f"kept in {keep('reading', {'rows': rows})}")


if __name__ == "__main__":
    main()

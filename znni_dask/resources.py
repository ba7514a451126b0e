"""What a run has of memory and threads, and how what is left of the memory is used.

Both planners share it: of patches and of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, inf, prod
from typing import NamedTuple, TypeVar

from znni_dask.costs import Costs
from znni_dask.errors import MemoryLimitError, OptionError
from znni_dask.geometry import Box, Size, text, turned, volume
from znni_dask.kernels.memory import allocated_bytes
from znni_dask.machine import CPU, CPU_GPU, GPU, show_bytes
from znni_dask.network.network import Network
from znni_dask.plan import Plan, Reading
from znni_dask.primitives.base import ITEM_BYTES, Primitive
from znni_dask.primitives.offloaded import Offloading
from znni_dask.reading import Reads
from znni_dask.schedule import Schedules
from znni_dask.storage.cells import Cells
from znni_dask.windows import Laid

SLOTS = 2  # patches under way on a device at once: one computed, one copied there or back
DEVICE_SLACK_BYTES = 4 << 20  # what is lost between arrays of a device
OVERHEAD_BYTES = 48 << 20  # scheduler, messages and allocator slack beside what is counted
_WEIGHT_COPIES = 3  # the plugin as sent, as kept by the scheduler, as received
MOST_BLOCKS_IN_FLIGHT = 3  # one being read, one computed, one written
_WORTH_FEWER_IN_FLIGHT = 1.1  # times slower that overlapping reads and writes may make computing

C = TypeVar("C")


class Need(NamedTuple):
    """Memory that is needed: of the whole process, and of a device that computes, if one does."""

    process_bytes: int
    device_bytes: int = 0

    def plus(self, nbytes: int) -> Need:
        """With so much more of the process."""
        return Need(self.process_bytes + nbytes, self.device_bytes)


class Limit(NamedTuple):
    """Memory ``where`` so much is needed and so much allowed."""

    where: str
    needed_bytes: int
    allowed_bytes: int

    @property
    def over_bytes(self) -> int:
        """How much more is needed than there is; not positive where there is enough."""
        return self.needed_bytes - self.allowed_bytes

    def refusal(self, message: str) -> MemoryLimitError:
        """The error that says so, and knows how much of the process's memory would be enough."""
        return MemoryLimitError(message, 0 if self.where else self.needed_bytes)


@dataclass(frozen=True, eq=False, kw_only=True)
class Resources:
    """What a run has, and what its reading and writing takes.

    ``unit`` is the output's chunk or shard; ``read_bytes`` the memory that reading a box of a
    size takes, directly or (``by_cells=True``) by the volume's ``cells``; ``write_bytes`` the
    memory that writing takes beside the values. A voxel as it is stored, with all outputs, takes
    ``voxel_bytes``, and ``encoding_bytes`` while it is encoded. ``baseline_bytes`` is what the
    process uses before it computes. ``block`` is that of a run that is resumed; ``in_order``
    whether who made a block makes the next one, too. Only the outputs within ``hull`` are made; to
    tell which of them are selected takes ``selected_bytes`` for each voxel of a block. ``costs``
    are what the machine takes. The ``device`` is who computes, as plans call it, and has
    ``device_bytes`` of memory if it is not the CPU alone. So many ``workers`` make the blocks, each
    of which keeps no more than ``most_cache_bytes`` of what it decoded.
    """

    unit: Size
    voxel_bytes: int
    encoding_bytes: int
    read_bytes: Callable[..., int]
    write_bytes: int
    baseline_bytes: int
    allowed_bytes: int
    threads: int
    hull: Box
    cells: Cells | None = None
    block: Size | None = None
    in_order: bool = True
    selected_bytes: int = 0
    costs: Costs = field(default_factory=Costs)
    device: str = CPU
    device_bytes: int = 0
    workers: int = 1
    most_cache_bytes: float = inf

    def limit(self, need: Need) -> Limit:
        """Of the process's memory and the device's what is exceeded most, or nearly."""
        process = Limit("", need.process_bytes, self.allowed_bytes)
        if self.device == CPU:
            return process
        device = Limit(" of the GPU's memory", need.device_bytes, self.device_bytes)
        return max(process, device, key=lambda limit: limit.over_bytes)

    def waiting(self, block: Size) -> float:
        """How many times longer workers are there than they work, on blocks of a size: the last
        ones may be fewer than they are, as may be all.

        >>> ceil(5 / 4) * 4 / 5  # of five blocks on four workers
        1.6
        """
        hull = self.hull
        count = prod(
            (stop - 1) // b - start // b + 1
            for start, stop, b in zip(hull.start, hull.stop, block, strict=True)
        )
        return ceil(count / self.workers) * self.workers / count

    def together(self, computing: float, moving: float) -> float:
        """Seconds of what is computed and of what is read and written meanwhile: one after another
        where the same cores do both."""
        return max(computing, moving) if self.device == GPU else computing + moving

    def touching_seconds(self, nbytes: int) -> float:
        """Until the process came to hold so many bytes; none where a device computes meanwhile."""
        fresh = 0 if self.device == GPU else nbytes - self.baseline_bytes
        return self.costs.touching_seconds(fresh, self.threads)

    @property
    def answers(self) -> int:
        """Patches whose answers are there at once."""
        return {CPU: 1, CPU_GPU: 1 + SLOTS}.get(self.device, SLOTS)

    def turned(self, axis: int, weights_bytes: int) -> Resources:
        """The same where axes 0 and ``axis`` are swapped, and so are weights of so many bytes."""
        if axis == 0:
            return self
        read_bytes = self.read_bytes

        def read_turned(size: Size, by_cells: bool = False) -> int:
            return int(read_bytes(turned(size, axis), by_cells))

        return replace(
            self,
            unit=turned(self.unit, axis),
            read_bytes=read_turned,
            baseline_bytes=self.baseline_bytes + weights_bytes,
            hull=self.hull.turned(axis),
            cells=self.cells and self.cells.turned(axis),
            block=self.block and turned(self.block, axis),
        )

    def block_bytes(self, size: Size, region: Size, by_cells: bool = False) -> int:
        """Memory that a block of ``size`` takes while it is in flight, its computing not counted;
        ``region`` is the size of what it reads."""
        written = self.voxel_bytes * volume(size)
        most = max(self.read_bytes(region, by_cells=by_cells) + written, written + self.write_bytes)
        return most + self.selected_bytes * volume(size)


def most_in_flight(
    find: Callable[[int], C | None], cost: Callable[[C], float]
) -> tuple[C, int] | None:
    """The best that fits, and its blocks in flight.

    ``find`` gives the best that fits with so many blocks in flight. More in flight, which hides
    reading and writing, is given up only for what computes much faster.
    """
    best: tuple[C, int] | None = None
    for in_flight in range(MOST_BLOCKS_IN_FLIGHT, 0, -1):
        found = find(in_flight)
        if found and (best is None or cost(found) * _WORTH_FEWER_IN_FLIGHT < cost(best[0])):
            best = (found, in_flight)
    return best


def shared_reading(
    resources: Resources, reads: Reads, needed_bytes: Callable[[bool], int]
) -> tuple[Reading, int]:
    """How blocks share what is decoded, in the memory that is left, and the bytes needed in all;
    ``needed_bytes`` are those needed without, where volumes are read directly or by cells."""
    by_cells = needed_bytes(True)
    reading = reads.best(min(resources.allowed_bytes - by_cells, resources.most_cache_bytes))
    if reading.cache_bytes:
        return reading, by_cells + reading.cache_bytes
    return reading, needed_bytes(False)


def moving_seconds(laid: Laid, resources: Resources, reads: float, writes: float) -> float:
    """Seconds for every output wanted in which all that lies behind is read so many times, and all
    is written so many times."""
    hull, network = resources.hull, laid.network
    spans = (laid.reach(axis, hull.start[axis], hull.stop[axis]) for axis in range(3))
    behind = prod(stop - start for start, stop in spans) * network.in_channels / hull.voxels
    made = network.out_channels
    return resources.costs.moving_seconds(reads * behind, writes * made, resources.threads)


def check_given(resources: Resources, given: Plan) -> None:
    """Raise `OptionError` where a plan that was given back cannot be one of this run."""
    block, unit = given.block, resources.unit
    if any(b < 1 or b % u for b, u in zip(block, unit, strict=True)):
        raise OptionError(
            f"the plan's blocks of {text(block)} are not whole chunks of the output, {text(unit)}"
        )
    if resources.block not in (None, block):
        raise OptionError(
            f"the unfinished run has blocks of {text(resources.block)}, the plan of {text(block)}: "
            "finish it without the plan, or start anew with --overwrite"
        )
    if given.threads < 1:
        raise OptionError(f"the plan has {given.threads} threads: at least one is wanted")
    if not 1 <= given.blocks_in_flight <= MOST_BLOCKS_IN_FLIGHT:
        raise OptionError(
            f"the plan has {given.blocks_in_flight} blocks in flight: 1 to {MOST_BLOCKS_IN_FLIGHT}"
        )
    if given.device != resources.device:
        raise OptionError(f"the plan is for {given.device}: here {resources.device} computes")


def check_room(resources: Resources, need: Need) -> None:
    """Raise `MemoryLimitError` where a plan that was given back needs more than is allowed."""
    limit = resources.limit(need)
    if limit.over_bytes > 0:
        raise limit.refusal(
            f"the plan needs {show_bytes(limit.needed_bytes)}{limit.where}, "
            f"{show_bytes(limit.allowed_bytes)} are allowed: allow as much, or run without the plan"
        )


def computing_need(
    resources: Resources, schedules: Schedules, sizes: Mapping[str, Size], patch: Size
) -> Need:
    """Memory that the process takes while it computes patches, blocks in flight not counted."""
    if resources.device == CPU:
        computing = computing_bytes(schedules, sizes, patch, resources.threads)
        return Need(resources.baseline_bytes + computing)
    layers = device_need(schedules, sizes, patch)
    process = resources.baseline_bytes + OVERHEAD_BYTES + layers.process_bytes
    return Need(process, device_bytes(schedules, sizes, patch))


def device_bytes(schedules: Schedules, sizes: Mapping[str, Size], patch: Size) -> int:
    """Memory of a device that computes patches."""
    computing = sum(schedules.workspace_bytes(sizes, threads=1))
    return DEVICE_SLACK_BYTES + device_need(schedules, sizes, patch).device_bytes + computing


def device_need(schedules: Schedules, sizes: Mapping[str, Size], patch: Size) -> Need:
    """Memory of layers that a device computes, but for what it computes in: of the process, their
    weights included, and of the device."""
    given, made = slot_bytes(schedules, sizes, patch)
    network = network_bytes(schedules.layout.network)
    slots = SLOTS * (allocated_bytes(given) + 2 * allocated_bytes(made))  # answers once more, taken
    libraries = sum({type(p): p.process_bytes for p in schedules.primitives.values()}.values())
    held = schedules.prepared_bytes + schedules.arena(sizes).bytes + SLOTS * (given + made)
    return Need(network + slots + libraries, held)


def lent_need(lent: Offloading, computing: Iterable[Primitive]) -> Need:
    """Memory of sub-layers that a device computes for the host by such primitives, their libraries
    included: of the process, and of the device."""
    libraries = {type(p): p for p in computing}.values()
    process = lent.load.host_bytes + sum(p.process_bytes for p in libraries)
    device = DEVICE_SLACK_BYTES + lent.device_bytes + sum(p.library_bytes for p in libraries)
    return Need(process, device)


def slot_bytes(schedules: Schedules, sizes: Mapping[str, Size], patch: Size) -> tuple[int, int]:
    """Memory of the input of patches, moved by all offsets, and of their answers, on a device or
    beside it."""
    network = schedules.layout.network
    first, moves = sizes[network.input.name], schedules.offsets(patch)
    reach = (n + max(move[axis] for move in moves) for axis, n in enumerate(first))
    values = network.in_channels * prod(reach), network.out_channels * volume(patch)
    given, made = (schedules.samples * ITEM_BYTES * n for n in values)
    return given, made


def computing_bytes(
    schedules: Schedules, sizes: Mapping[str, Size], patch: Size, threads: int
) -> int:
    """Memory that computing patches on the CPU takes, and what the network takes all the time."""
    answers = schedules.samples * ITEM_BYTES * schedules.layout.network.out_channels * volume(patch)
    return OVERHEAD_BYTES + layers_bytes(schedules, sizes, threads) + answers


def layers_bytes(schedules: Schedules, sizes: Mapping[str, Size], threads: int) -> int:
    """Memory that layers take on the CPU, their weights and arrays."""
    arrays = allocated_bytes(schedules.arena(sizes).bytes)
    return network_bytes(schedules.layout.network) + schedules.spent_bytes(sizes, threads) + arrays


def network_bytes(network: Network) -> int:
    """Memory that the weights of a network take all the time."""
    return _WEIGHT_COPIES * ITEM_BYTES * network.parameters

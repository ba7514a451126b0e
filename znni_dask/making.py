"""Making what is planned: blocks of every pass, then its coarser levels, noted in the journal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from znni_dask.cluster import Cluster, Crew
from znni_dask.errors import RunError, is_full
from znni_dask.feeding import make_blocks
from znni_dask.geometry import Box, Size
from znni_dask.job import Job, Made
from znni_dask.journal import Journal
from znni_dask.passes import PlannedPass
from znni_dask.plan import Plan
from znni_dask.pyramid import make_levels, voxels
from znni_dask.recompute import MeasuredError
from znni_dask.timeline import Timeline

Progress = Callable[[int, int], None]
_SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Pass:
    """One pass over the volume: the network's outputs made in it, and how.

    ``voxels`` and ``blocks`` were made by this run; of ``unselected`` blocks it found that they
    hold nothing that the mask selects. ``decoded_voxels`` of the volume's chunks were decoded;
    ``needed_voxels`` lie behind the blocks that were made, each counted once. Computing took so
    many ``layer_seconds``. No worker's process took more than ``peak_bytes`` of anonymous memory
    while it made blocks. ``levels`` are the sizes of the coarser levels, ``level_blocks`` the
    blocks made of them. Of ``shrunk`` blocks a device had less room than was planned for.
    """

    outputs: tuple[str, ...]
    size: Size
    channels: int
    voxels: int
    blocks: int
    unselected: int
    decoded_voxels: int
    needed_voxels: int
    layer_seconds: Mapping[str, float]
    peak_bytes: int
    plan: Plan
    measured_error: MeasuredError | None = None
    levels: tuple[Size, ...] = ()
    level_blocks: int = 0
    shrunk: int = 0

    @property
    def read_amplification(self) -> float:
        """How often a voxel that is needed was decoded on average; 0 where nothing was made."""
        return self.decoded_voxels / self.needed_voxels if self.needed_voxels else 0.0

    @property
    def predicted_seconds(self) -> dict[str, float]:
        """What computing was expected to take, layer by layer."""
        found: defaultdict[str, float] = defaultdict(float)
        for choice in (choice for stage in self.plan.stages for choice in stage.choices):
            found[choice.layer] += choice.voxel_seconds * self.voxels
        return dict(found)

    @property
    def record(self) -> dict[str, Any]:
        """The plan beside what came of it, as JSON takes it: of what this run made."""
        plan = self.plan
        return {
            "voxels": self.voxels,
            "blocks": self.blocks,
            "threads": plan.threads,
            "patch": plan.patch,
            "block": plan.block,
            "primitives": plan.primitives,
            "layer_seconds": dict(self.layer_seconds),
            "predicted_layer_seconds": self.predicted_seconds,
            "peak_bytes": self.peak_bytes,
            "predicted_bytes": plan.predicted_bytes,
            "allowed_bytes": plan.allowed_bytes,
            "read_amplification": self.read_amplification,
            "predicted_read_amplification": plan.reading.amplification,
        }


@dataclass
class _Tally:
    """What the blocks of a pass tell, added up."""

    voxels: int = 0
    blocks: int = 0
    unselected: int = 0
    decoded_voxels: int = 0
    needed_voxels: int = 0
    layer_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak_bytes: int = 0
    shrunk: int = 0

    def add(self, made: Made) -> None:
        """Count one block."""
        self.voxels += made.voxels
        self.blocks += made.voxels > 0
        self.unselected += made.voxels == 0
        self.decoded_voxels += made.decoded_voxels
        self.needed_voxels += made.needed_voxels
        self.peak_bytes = max(self.peak_bytes, made.peak_bytes)
        self.shrunk += made.shrunk
        for layer, seconds in made.layer_seconds.items():
            self.layer_seconds[layer] += seconds


def make_all(
    cluster: Cluster,
    crew: Crew,
    passes: list[PlannedPass],
    journal: Journal,
    progress: Progress | None,
    timeline: Timeline | None = None,
) -> tuple[Pass, ...]:
    """Make the blocks of all passes that are missing, one pass after another."""
    total = sum(_hull(one.job).voxels * one.job.volume.times for one in passes)
    total += sum(voxels(one.stored[0], _hull(one.job)) for one in passes)
    done = 0
    made: list[Pass] = []
    failures: list[tuple[Box, BaseException]] = []

    def told(voxels: int) -> None:
        nonlocal done
        done += voxels
        if progress and voxels:
            progress(done, total)

    for number, one in enumerate(passes):
        held = partial(journal.holds, number)
        within, laid = _hull(one.job), one.job.laid
        before = journal.blocks_of(number, laid.output_size)
        done += sum(block.shared_voxels(within) for block in before)
        missing = ((t, b) for t, b in one.job.blocks() if not held(t, b))
        tally = _Tally()

        def finished(
            moment: int,
            block: Box,
            outcome: Made | BaseException,
            number: int = number,
            within: Box = within,
            tally: _Tally = tally,
        ) -> None:
            if isinstance(outcome, Made):
                journal.add(number, moment, block)
                tally.add(outcome)
                if timeline:
                    timeline.add(outcome.worker, outcome.spans)
            else:
                failures.append((block, outcome))
            told(block.shared_voxels(within))

        make_blocks(cluster, crew, one.job, missing, finished)
        level_blocks = 0
        if not failures:  # what is missing now would be missing in all levels
            level_blocks, failed = make_levels(
                cluster,
                crew,
                one.job.targets,
                within,
                one.pyramid,
                journal,
                range(number, len(passes) * len(one.stored[0].levels), len(passes)),
                told,
            )
            failures.extend(failed)
        made.append(_told_of(one, tally, level_blocks))
        if any(is_full(error) for _, error in failures):
            break
    if failures:
        raise RunError(_failed(failures, sum(one.blocks + one.level_blocks for one in made)))
    return tuple(made)


def _told_of(one: PlannedPass, tally: _Tally, level_blocks: int) -> Pass:
    return Pass(
        outputs=one.outputs,
        size=one.job.laid.output_size,
        channels=one.job.laid.network.out_channels,
        **vars(tally),
        plan=one.job.plan,
        measured_error=one.measured_error,
        levels=tuple(level.size for level in one.stored[0].levels[1:]),
        level_blocks=level_blocks,
    )


def _hull(job: Job) -> Box:
    """The outputs among which those that are selected lie."""
    return job.selection.hull(job.laid)


def _failed(failures: list[tuple[Box, BaseException]], made: int) -> str:
    shown = "\n  ".join(
        f"block z, y, x = {box}: {error}" for box, error in failures[:_SHOWN_FAILURES]
    )
    more = len(failures) - _SHOWN_FAILURES
    return (
        f"{len(failures)} of {made + len(failures)} blocks failed, the others are written:"
        f"\n  {shown}"
        + (f"\n  and {more} more" if more > 0 else "")
        + "\nThe same command tries again what is missing"
        + (", once there is space on the disk" if any(is_full(e) for _, e in failures) else "")
    )

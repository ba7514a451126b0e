"""The plan: what was decided, as a value that can be printed, saved and edited.

A plan never changes the answer, only how it is reached: the patch computed at once, the block
written at once, and for every layer the primitive that computes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

from znni_dask.errors import OptionError
from znni_dask.geometry import Size, triple, turned
from znni_dask.geometry import text as shown
from znni_dask.machine import CPU, CPU_GPU, GPU, show_bytes


@dataclass(frozen=True)
class Choice:
    """The primitive (by its name in the table) that computes one layer, and the seconds that it is
    expected to take for a voxel of the output, changes of its output's form included. Where a block
    is made slab by slab, so many ``planes`` are made at once; else 0."""

    layer: str
    primitive: str
    voxel_seconds: float = 0.0
    planes: int = 0


@dataclass(frozen=True)
class Stage:
    """A run of layers on one device, of so many ``samples`` (patches or windows) at once."""

    device: str
    choices: tuple[Choice, ...]
    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"{self.samples} samples at once")


@dataclass(frozen=True)
class Reading:
    """How the blocks of a run share what is decoded of the volume.

    Blocks are made column by column, ``column`` blocks (z, y, x) each; columns, and the blocks of
    each, with the axes of ``axes`` from slowest to fastest. ``cache_bytes`` of decoded chunks are
    kept meanwhile. ``amplification`` is predicted: voxels decoded over voxels needed.
    """

    axes: Size
    column: Size
    cache_bytes: int
    amplification: float

    def turned(self, axis: int) -> Reading:
        """The same where axes 0 and ``axis`` are swapped."""
        numbers = turned((0, 1, 2), axis)
        axes = triple(numbers[a] for a in self.axes)
        return replace(self, axes=axes, column=turned(self.column, axis))


@dataclass(frozen=True)
class Plan:
    """How a network is applied to a volume on one worker.

    ``patch`` and ``block`` are sizes of the output (z, y, x); a block is a whole number of
    output chunks or shards. A patch is what is computed at once, or a slab of what is made slab by
    slab: so are columns of ``blocks_in_column`` blocks behind one another along ``axis``, each of
    which goes on where the one before it ended. Up to ``blocks_in_flight`` blocks are read,
    computed and written at the same time, one of them computed, by ``threads`` threads, in the
    order that ``reading`` says. ``predicted_bytes`` is the peak of the whole process,
    ``allowed_bytes`` the limit it was planned for; where a GPU computes, ``device_bytes`` are the
    peak of its memory, and ``allowed_device_bytes`` the limit. ``voxels_per_second`` of the output
    are expected to be made, reading and writing included.
    """

    patch: Size
    block: Size
    stages: tuple[Stage, ...]
    threads: int
    blocks_in_flight: int
    reading: Reading
    predicted_bytes: int
    allowed_bytes: int
    flops_per_voxel: float
    voxels_per_second: float
    blocks_in_column: int = 1
    axis: int = 0
    device_bytes: int = 0
    allowed_device_bytes: int = 0

    @property
    def device(self) -> str:
        """Where all is computed: "cpu" or "gpu"; in two stages, or by both `apart`, "cpu+gpu", or
        "gpu+ram" where the GPU computes of the first one, too, what the host holds."""
        first, *rest = self.stages
        return CPU_GPU if rest and first.device == CPU else first.device

    @property
    def apart(self) -> bool:
        """Whether each of two stages computes all layers, of whole patches for itself."""
        first, *rest = ([choice.layer for choice in stage.choices] for stage in self.stages)
        return len(rest) == 1 and first == rest[0]

    @property
    def ends_on_gpu(self) -> bool:
        """Whether answers come from a GPU, where several patches may be under way at once."""
        return self.stages[-1].device == GPU

    def turned(self, axis: int) -> Plan:
        """The plan for where axes 0 and ``axis`` are swapped."""
        return replace(
            self,
            patch=turned(self.patch, axis),
            block=turned(self.block, axis),
            reading=self.reading.turned(axis),
            axis=axis - self.axis,
        )

    @property
    def primitives(self) -> dict[str, str]:
        """The primitive of every layer, over all stages; both where the host has one and the GPU
        another."""
        found: dict[str, list[str]] = {}
        for choice in (choice for stage in self.stages for choice in stage.choices):
            found.setdefault(choice.layer, []).append(choice.primitive)
        return {layer: " / ".join(names) for layer, names in found.items()}

    @property
    def granules(self) -> dict[str, int]:
        """Planes of every layer that are made at once where blocks are made slab by slab; nothing
        where they are made patch by patch."""
        choices = [choice for stage in self.stages for choice in stage.choices]
        return {c.layer: c.planes for c in choices if c.planes}

    def _repr_html_(self) -> str:
        """The plan as Jupyter shows it."""
        told = {
            "patch": shown(self.patch),
            "block": f"{shown(self.block)}, {self.blocks_in_flight} in flight",
            "threads": str(self.threads),
            "speed": f"{self.voxels_per_second:,.0f} voxels/s",
            "memory": f"{show_bytes(self.predicted_bytes)} of {show_bytes(self.allowed_bytes)}",
        }
        rows = [
            f"<tr><th>{key}</th><td colspan='2'>{value}</td></tr>" for key, value in told.items()
        ]
        rows.append("<tr><th>layer</th><th>primitive</th><th>ns a voxel</th></tr>")
        rows += [
            f"<tr><td>{escape(choice.layer)}</td><td>{escape(choice.primitive)}</td>"
            f"<td>{1e9 * choice.voxel_seconds:,.1f}</td></tr>"
            for stage in self.stages
            for choice in stage.choices
        ]
        return f"<table>{''.join(rows)}</table>"

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON; raises `OptionError` where it is not one."""
        found = cls.several_from_json(text)
        if len(found) != 1:
            raise OptionError(f"this is not a plan: it holds {len(found)}")
        return found[0]

    @classmethod
    def several_from_json(cls, text: str) -> tuple[Plan, ...]:
        """The plans of all passes as `znni plan --format json` tells them, or a single one; raises
        `OptionError` where it is neither."""
        try:
            told = json.loads(text)
            found = told if isinstance(told, list) else [told]
            return tuple(cls._from_mapping(one.get("plan", one)) for one in found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OptionError(f"this is not a plan: {type(error).__name__}: {error}") from None

    @classmethod
    def _from_mapping(cls, values: Mapping[str, Any]) -> Plan:
        stages = tuple(
            Stage(
                str(stage["device"]),
                tuple(_choice(told) for told in stage["choices"]),
                _at_least_one(stage, "samples"),
            )
            for stage in values["stages"]
        )
        if not stages:
            raise ValueError("it has no stages")
        return cls(
            patch=triple(values["patch"]),
            block=triple(values["block"]),
            stages=stages,
            threads=int(values["threads"]),
            blocks_in_flight=int(values["blocks_in_flight"]),
            reading=Reading(
                axes=triple(values["reading"]["axes"]),
                column=triple(values["reading"]["column"]),
                cache_bytes=int(values["reading"]["cache_bytes"]),
                amplification=float(values["reading"]["amplification"]),
            ),
            predicted_bytes=int(values["predicted_bytes"]),
            allowed_bytes=int(values["allowed_bytes"]),
            flops_per_voxel=float(values["flops_per_voxel"]),
            voxels_per_second=float(values["voxels_per_second"]),
            blocks_in_column=_at_least_one(values, "blocks_in_column"),
            axis=_axis(values),
            device_bytes=int(values.get("device_bytes", 0)),
            allowed_device_bytes=int(values.get("allowed_device_bytes", 0)),
        )


@dataclass(frozen=True)
class Alternative:
    """Another patch, or other windows at once: how fast it would be with the primitives that are
    fastest for it, and the memory that these need, one block in flight."""

    patch: Size
    block: Size
    samples: int
    voxels_per_second: float
    needed_bytes: int

    def loses(self, plan: Plan) -> str:
        """Why the plan is another one."""
        if self.needed_bytes > plan.allowed_bytes:
            return "needs more memory than is allowed"
        slower = plan.voxels_per_second / self.voxels_per_second
        if slower > 1:
            return f"{slower:.2f} times slower"
        return "about as fast, with fewer blocks or more reading"


def _at_least_one(told: Mapping[str, Any], name: str) -> int:
    """A number as JSON tells it, 1 where it does not."""
    number = 1 if told.get(name) is None else int(told[name])
    if number < 1:
        raise ValueError(f"{name} is {number}")
    return number


def _axis(told: Mapping[str, Any]) -> int:
    """The axis of columns as JSON tells it, 0 where it does not."""
    axis = int(told.get("axis") or 0)
    if not 0 <= axis <= 2:
        raise ValueError(f"axis is {axis}, and not 0, 1 or 2")
    return axis


def _choice(told: Mapping[str, Any]) -> Choice:
    """A choice as JSON tells it."""
    seconds, planes = float(told.get("voxel_seconds", 0.0)), int(told.get("planes", 0))
    if planes < 0:
        raise ValueError(f"{planes} planes at once")
    return Choice(str(told["layer"]), str(told["primitive"]), seconds, planes)

"""What a user asks for, checked: a network, a volume, and how the one is applied to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from znni_dask import options
from znni_dask.application import Application
from znni_dask.devices.opening import AUTO
from znni_dask.errors import OptionError
from znni_dask.geometry import Size
from znni_dask.importers import load_network
from znni_dask.network.network import Network
from znni_dask.passes import Request
from znni_dask.plan import Plan
from znni_dask.selection import roi_box
from znni_dask.statistics import check_alike
from znni_dask.storage.encoding import Encoding
from znni_dask.storage.ngff import VERSIONS
from znni_dask.storage.volume import Volume, open_volume


class Options(TypedDict, total=False):
    """The options of `asked` as a type; `run` says what each means."""

    boundary: str
    memory: str | float | None
    patch: Size | int | None
    threads: int | None
    device: str
    device_memory: str | float | None
    dtype: str
    value_range: tuple[float, float]
    chunks: Size | int | None
    shards: Size | int | None
    ome: str
    pyramid: bool
    nan: float | None
    axes: str | None
    channels: Sequence[int] | None
    level: int | str | None
    outputs: Sequence[str] | None
    patchwise: Size | int | None
    overlap: float
    weights: str
    step: Size | int | None
    halo: Size | int | None
    precision: str
    roi: str | Sequence[slice] | None
    mask: str | Path | None
    normalize: str
    percentiles: tuple[float, float]
    stats_level: int | str | None
    plan: str | Path | Plan | Sequence[Plan] | None


@dataclass(frozen=True, eq=False)
class Asked:
    """What is applied to what. Statistics are taken of ``surveyed``; ``groups`` are the outputs
    that are made together, ``sources`` what is read."""

    application: Application
    surveyed: Volume
    request: Request
    groups: list[tuple[str, ...]]
    sources: list[str | Path]


def asked(
    network: str | Path | Network,
    input: str | Path,
    *,
    boundary: str = "reflect",
    memory: str | float | None = None,
    patch: Size | int | None = None,
    threads: int | None = None,
    device: str = AUTO,
    device_memory: str | float | None = None,
    dtype: str = "float32",
    value_range: tuple[float, float] = (0.0, 1.0),
    chunks: Size | int | None = None,
    shards: Size | int | None = None,
    ome: str = VERSIONS[-1],
    pyramid: bool = True,
    nan: float | None = None,
    axes: str | None = None,
    channels: Sequence[int] | None = None,
    level: int | str | None = None,
    outputs: Sequence[str] | None = None,
    patchwise: Size | int | None = None,
    overlap: float = 0.5,
    weights: str = "constant",
    step: Size | int | None = None,
    halo: Size | int | None = None,
    precision: str = "float32",
    roi: str | Sequence[slice] | None = None,
    mask: str | Path | None = None,
    normalize: str = "none",
    percentiles: tuple[float, float] = (1, 99),
    stats_level: int | str | None = None,
    plan: str | Path | Plan | Sequence[Plan] | None = None,
) -> Asked:
    """What is asked for; raises `InputError` where it cannot be."""
    options.check_replacement(nan)
    options.check_means(memory, threads)
    wanted = options.device(device, device_memory)
    window = options.size("patchwise", patchwise)
    source = open_volume(input, axes, channels, level)
    normalization = options.normalization(normalize, percentiles, stats_level)
    surveyed = source if stats_level is None else open_volume(input, axes, channels, stats_level)
    application = Application(
        load_network(network, window),
        source,
        boundary,
        nan,
        options.windows(window, overlap, weights, options.size("step", step)),
        options.size("halo", halo),
        None if roi is None else roi_box(roi, source.size),
        None if mask is None else open_volume(mask),
        normalization,
        precision,
    )
    check_alike(source, surveyed)
    plans = options.plans(plan, patch, threads)
    request = Request(
        encoding=Encoding(dtype, *value_range),
        patch=options.size("patch", patch),
        chunks=options.size("chunks", chunks),
        shards=options.size("shards", shards),
        memory=memory,
        threads=threads,
        device=wanted,
        version=ome,
        pyramid=pyramid,
        plans=plans,
    )
    groups = application.passes(outputs)
    if plans and len(plans) != len(groups):
        raise OptionError(f"{len(plans)} plans are given, {len(groups)} passes are to be made")
    sources = [input] if mask is None else [input, mask]
    return Asked(application, surveyed, request, groups, sources)

"""OME-NGFF metadata, read and written: OME-Zarr 0.4 and 0.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from znni_dask.errors import VolumeError
from znni_dask.storage.stored import unreadable

VERSIONS = ("0.4", "0.5")
ZARR_FORMAT: dict[str, Literal[2, 3]] = {"0.4": 2, "0.5": 3}
_SPACE = "zyx"
Three = tuple[float, float, float]


@dataclass(frozen=True)
class Level:
    """One resolution of an image: where it lies and what its axes mean."""

    path: str
    axes: str
    scale: Three
    translation: Three
    units: tuple[str | None, str | None, str | None]


def choose_level(group: Any, place: str, level: int | str | None = None) -> Level:
    """One resolution of the image in a zarr group, by its index or path; by default the first.

    Raises `VolumeError` where there is no image, or no such level.
    """
    attributes = dict(group.attrs)
    ome = attributes.get("ome", attributes)
    images = ome.get("multiscales") if isinstance(ome, Mapping) else None
    if not images:
        raise VolumeError(
            f"{place} is a Zarr group without OME multiscales: name one of its arrays or images "
            f"({_members(group)})"
        )
    try:
        paths = [str(dataset["path"]) for dataset in images[0]["datasets"]]
        number = _number(paths, level)
        if number is not None:
            return _level(images[0], number)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise VolumeError(f"{place}: its OME metadata cannot be read: {error!r}") from None
    there = ", ".join(f"{i} ({path!r})" for i, path in enumerate(paths))
    raise VolumeError(f"{place} has no level {level!r}: its levels are {there or 'none'}")


def _members(group: Any) -> str:
    try:
        return ", ".join(repr(name) for name in sorted(group.keys())) or "none"
    except unreadable():  # listing is more than many servers allow
        return "which ones cannot be listed here"


def _number(paths: list[str], level: int | str | None) -> int | None:
    """The dataset meant: a path before an index, for a command line has no numbers."""
    if level is None:
        return 0
    if str(level) in paths and not isinstance(level, int):
        return paths.index(str(level))
    number = int(level) if str(level).isdecimal() else -1
    return number if 0 <= number < len(paths) else None


def _level(image: Mapping[str, Any], number: int) -> Level:
    axes = [a if isinstance(a, Mapping) else {"name": a} for a in image["axes"]]
    names = "".join(str(a["name"]).lower() for a in axes)
    dataset = image["datasets"][number]
    scale = dict.fromkeys(names, 1.0)
    translation = dict.fromkeys(names, 0.0)
    inner = dataset.get("coordinateTransformations", [])
    for change in [*inner, *image.get("coordinateTransformations", [])]:
        values = [float(v) for v in change[change["type"]]] if change["type"] != "identity" else []
        for name, value in zip(names, values, strict=False):
            if change["type"] == "scale":
                scale[name] *= value
                translation[name] *= value
            else:
                translation[name] += value
    units = {str(a["name"]).lower(): a.get("unit") for a in axes}
    return Level(
        path=str(dataset["path"]),
        axes=names,
        scale=_three(scale, 1.0),
        translation=_three(translation, 0.0),
        units=(units.get("z"), units.get("y"), units.get("x")),
    )


def _three(values: Mapping[str, float], default: float) -> Three:
    z, y, x = (values.get(axis, default) for axis in _SPACE)
    return z, y, x


def image_attributes(
    version: str,
    name: str,
    axes: str,
    places: Sequence[tuple[Three, Three]],
    units: tuple[str | None, str | None, str | None],
    *,
    labels: bool = False,
) -> dict[str, Any]:
    """The attributes of an image with levels ``0``, ``1``, …, of which ``places`` are scale and
    translation. Coarser levels are means, or of labels one voxel of each cell."""
    space = dict(zip(_SPACE, units, strict=True))
    image: dict[str, Any] = {
        "name": name,
        "axes": [
            {"name": a, "type": {"c": "channel", "t": "time"}[a]}
            if a in "ct"
            else {"name": a, "type": "space"} | ({"unit": space[a]} if space[a] else {})
            for a in axes
        ],
        "datasets": [
            {"path": str(number), "coordinateTransformations": _transformations(axes, *place)}
            for number, place in enumerate(places)
        ],
    }
    if len(places) > 1:
        what = "the first voxel" if labels else "the mean"
        image["type"] = "nearest" if labels else "mean"
        image["metadata"] = {
            "description": f"every voxel is {what} of up to 2 × 2 × 2 voxels of the level before"
        }
    if version == "0.4":
        return {"multiscales": [{"version": version, **image}]}
    return {"ome": {"version": version, "multiscales": [image]}}


def _transformations(axes: str, scale: Three, translation: Three) -> list[dict[str, Any]]:
    steps = dict(zip(_SPACE, scale, strict=True))
    moved = dict(zip(_SPACE, translation, strict=True))
    return [
        {"type": "scale", "scale": [steps.get(a, 1.0) for a in axes]},
        {"type": "translation", "translation": [moved.get(a, 0.0) for a in axes]},
    ]

"""Voxel sizes that TIFF files tell: of ImageJ hyperstacks and of OME-TIFF."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

from znni_dask.storage.stored import Three, Units

# as OME-NGFF calls them
_UNITS = {
    **dict.fromkeys(("µm", "μm", "um", "micron", "microns", "micrometer"), "micrometer"),
    **dict.fromkeys(("nm", "nanometer", "nanometers"), "nanometer"),
    **dict.fromkeys(("mm", "millimeter"), "millimeter"),
    **dict.fromkeys(("cm", "centimeter"), "centimeter"),
    **dict.fromkeys(("m", "meter"), "meter"),
    **dict.fromkeys(("å", "Å", "angstrom"), "angstrom"),
    **dict.fromkeys(("inch", "in"), "inch"),
    **dict.fromkeys(("pm", "picometer"), "picometer"),
}
Placed = tuple[Three, Three, Units]
_NOTHING: Placed = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (None, None, None)


def placed(tiff: Any) -> Placed:
    """Scale, translation and units, (z, y, x), of an open TIFF file; ones where it tells none."""
    if tiff.is_ome:
        return _of_ome(tiff.ome_metadata)
    if tiff.is_imagej:
        return _of_imagej(tiff)
    return _NOTHING  # a resolution for printing is no voxel size


def _unit(name: Any) -> str | None:
    text = str(name or "").replace("\\u00B5", "µ").strip()
    return _UNITS.get(text, _UNITS.get(text.lower()))


def _positive(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 1.0
    return number if number > 0 and math.isfinite(number) else 1.0


def _of_imagej(tiff: Any) -> Placed:
    """ImageJ counts pixels per unit in the resolution tags, and tells the distance of slices."""
    told, tags = tiff.imagej_metadata or {}, tiff.pages[0].tags
    sizes = []
    for name in ("YResolution", "XResolution"):
        ratio = tags.valueof(name)
        count, per = ratio if isinstance(ratio, tuple) else (1, 1)
        sizes.append(_positive(per / count if count else 1))
    if "unit" not in told and "spacing" not in told:
        return _NOTHING
    scale = (_positive(told.get("spacing", 1.0)), sizes[0], sizes[1])
    unit = _unit(told.get("unit"))
    return scale, (0.0, 0.0, 0.0), (unit, unit, unit)


def _of_ome(text: str) -> Placed:
    """The physical sizes of the first image; micrometers unless it names others."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return _NOTHING
    pixels = next((e for e in root.iter() if e.tag.endswith("}Pixels")), None)
    if pixels is None:
        return _NOTHING
    sizes, units = [], []
    for axis in "ZYX":
        size = pixels.get(f"PhysicalSize{axis}")
        sizes.append(_positive(size))
        units.append(_unit(pixels.get(f"PhysicalSize{axis}Unit", "µm")) if size else None)
    z, y, x = sizes
    return (z, y, x), (0.0, 0.0, 0.0), (units[0], units[1], units[2])

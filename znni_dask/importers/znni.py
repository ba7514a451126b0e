"""`.znni` text files: the network format of ZNNi, one layer a line, weights drawn from a seed.

    INPUTS:1, LAYERS:4
    CONV 2,2,2 80
    POOL 2,2,2
    CONV 3,3,3 80
    CONV 3,3,3 3

Kernels and windows are in (z, y, x). A ReLU follows every CONV. FOOL and POOL name the same
layer: whether it is computed as fragments is the plan's choice.
"""

from __future__ import annotations

import re
from pathlib import Path

from znni_dask.errors import NetworkError
from znni_dask.geometry import triple
from znni_dask.network.chains import Row, chain
from znni_dask.network.network import Network

_HEADER = re.compile(r"INPUTS\s*:\s*(\d+)\s*,\s*LAYERS\s*:\s*(\d+)\s*$")
_CONV = re.compile(r"CONV\s+(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s+(\d+)\s*$")
_POOL = re.compile(r"[PF]OOL\s+(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*$")


def load(path: str | Path, seed: int = 0) -> Network:
    """Read a `.znni` file; raises `NetworkError` with the line that cannot be read."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NetworkError(f"cannot read network {path}: {error}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    header = _HEADER.match(lines[0]) if lines else None
    if not header:
        found = repr(lines[0][:40]) if lines else "an empty file"
        raise NetworkError(
            f"{path}: the first line must read like INPUTS:1, LAYERS:10, not {found}"
        )
    rows = [_row(path, number, line) for number, line in enumerate(lines[1:], start=2)]
    if len(rows) != int(header[2]):
        raise NetworkError(f"{path}: LAYERS:{header[2]} promised, {len(rows)} layers found")
    return chain(int(header[1]), rows, seed)


def _row(path: Path, number: int, line: str) -> Row:
    if match := _CONV.match(line):
        row = Row("CONV", triple(int(v) for v in match.groups()[:3]), int(match[4]))
    elif match := _POOL.match(line):
        row = Row("POOL", triple(int(v) for v in match.groups()), 1)
    else:
        raise NetworkError(
            f"{path}, line {number}: {line[:60]!r} is neither CONV z,y,x maps nor POOL z,y,x"
        )
    if min(*row.kernel, row.maps) < 1:
        raise NetworkError(f"{path}, line {number}: {line[:60]!r} has a size of zero")
    return row

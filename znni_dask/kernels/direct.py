"""Compiled loops of direct convolution and transposed convolution.

Arrays are (batch, channel, z, y, x), float32, contiguous. ``offset`` (z, y, x) is where the first
tap of output 0 lies in the input given; taps that fall outside that input are padding. Work is
numbered so that a range ``[first, last)`` of items can be given to any thread.

A convolution adds taps to *runs* of outputs, `CHANNELS` output channels at a time, in a buffer
that stays in the first-level cache; each run of the input is read once for all of them. A run
goes on from row to row of a plane: the few voxels between rows are computed too and dropped, and
short rows cost no more than long ones. Sums are made of parts, lest small products be added to
large sums one by one. Where the plane is padded, the stretch that a run reads is copied with its
padding first. Runs go in blocks of `LANES` voxels, so a last block may read
(never write) up to ``LANES - 1`` voxels beyond the input: arrays given must be followed by
`SLACK_BYTES`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

CHANNELS = 4
RUN = 512
LANES = 16
TOGETHER = 64  # products at least that are summed apart, before they are added to the others
SLACK_BYTES = 4 * LANES
OPTIONS = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz"},
}


@njit(**OPTIONS)
def convolve(x, weight, bias, out, offset, stride, dilation, least, first, last):
    """Convolution with stride 1 in y and x.

    Items are (batch, group, block of `CHANNELS` output channels, z). ``weight`` is (groups,
    blocks, in / groups, z, y, x, CHANNELS), ``bias`` (groups, blocks, CHANNELS), both padded with
    zeros to whole blocks. Results below ``least`` become that.
    """
    groups, blocks, fan_in, kz, ky, kx = weight.shape[:6]
    _, channels, size_z, size_y, size_x = x.shape
    _, _, out_z, out_y, out_x = out.shape
    values = x.reshape(-1)
    inside = (
        min(offset[1], offset[2]) >= 0
        and out_y + (ky - 1) * dilation[1] + offset[1] <= size_y
        and out_x + (kx - 1) * dilation[2] + offset[2] <= size_x
    )
    pitch = size_x if inside else out_x + (kx - 1) * dilation[2]
    length = (out_y - 1) * pitch + out_x
    reach = (ky - 1) * dilation[1] * pitch + (kx - 1) * dilation[2]
    runs, part = np.empty(CHANNELS * RUN, np.float32), np.zeros(CHANNELS * RUN, np.float32)
    padded = np.zeros(0 if inside else RUN + reach + LANES, np.float32)
    for item in range(first, last):
        z = item % out_z
        block = item // out_z % blocks
        group = item // (out_z * blocks) % groups
        batch = item // (out_z * blocks * groups)
        for begin in range(0, length, RUN):
            count = min(RUN, length - begin)
            _start(runs, bias[group, block])
            for f in range(fan_in):
                channel = group * fan_in + f
                for tz in range(kz):
                    iz = z * stride[0] + tz * dilation[0] + offset[0]
                    if iz < 0 or iz >= size_z:
                        continue
                    if inside:
                        source = values
                        plane = ((batch * channels + channel) * size_z + iz) * size_y * size_x
                        start = plane + offset[1] * size_x + offset[2] + begin
                    else:
                        source = padded
                        start = 0
                        _pad(padded, x[batch, channel, iz], begin, count + reach, pitch, offset)
                    for ty in range(ky):
                        taps = weight[group, block, f, tz, ty]
                        row = start + ty * dilation[1] * pitch
                        _add_taps(part, source, row, taps, dilation[2], count)
                if _is_whole(f, fan_in, kz * ky * kx):
                    _add_part(runs, part, count)
            _store(out, runs, batch, group, groups, block, z, 0, begin, count, pitch, least)


@njit(**OPTIONS)
def convolve_strided(x, weight, bias, out, offset, stride, dilation, least, first, last):
    """Convolution with any stride, row by row; arguments as of `convolve`."""
    groups, blocks, fan_in, kz, ky, kx = weight.shape[:6]
    _, _, size_z, size_y, _ = x.shape
    _, _, out_z, out_y, out_x = out.shape
    runs, part = np.empty(CHANNELS * RUN, np.float32), np.zeros(CHANNELS * RUN, np.float32)
    line = np.zeros(RUN + LANES, np.float32)
    for item in range(first, last):
        z = item % out_z
        block = item // out_z % blocks
        group = item // (out_z * blocks) % groups
        batch = item // (out_z * blocks * groups)
        for y in range(out_y):
            for begin in range(0, out_x, RUN):
                count = min(RUN, out_x - begin)
                _start(runs, bias[group, block])
                for f in range(fan_in):
                    for tz in range(kz):
                        iz = z * stride[0] + tz * dilation[0] + offset[0]
                        if iz < 0 or iz >= size_z:
                            continue
                        for ty in range(ky):
                            iy = y * stride[1] + ty * dilation[1] + offset[1]
                            if iy < 0 or iy >= size_y:
                                continue
                            row = x[batch, group * fan_in + f, iz, iy]
                            for tx in range(kx):
                                first_x = begin * stride[2] + tx * dilation[2] + offset[2]
                                _gather(line, row, first_x, stride[2], count)
                                tap = weight[group, block, f, tz, ty, tx]
                                _add_tap(part, line, 0, tap, count)
                    if _is_whole(f, fan_in, kz * ky * kx):
                        _add_part(runs, part, count)
                _store(out, runs, batch, group, groups, block, z, y, begin, count, out_x, least)


@njit(**OPTIONS)
def _start(runs, bias):
    """Begin runs with the bias of each channel."""
    for c in range(CHANNELS):
        runs[c * RUN : (c + 1) * RUN] = bias[c]


@njit(**OPTIONS)
def _is_whole(f, fan_in, taps):
    """Whether a part of the sum ends with channel ``f``."""
    together = (TOGETHER + taps - 1) // taps
    return (f + 1) % together == 0 or f + 1 == fan_in


@njit(**OPTIONS)
def _add_part(runs, part, count):
    """Add a part of the sum, and begin the next; taps were added in whole blocks."""
    length = (count + LANES - 1) // LANES * LANES
    for c in range(CHANNELS):
        for i in range(c * RUN, c * RUN + length):
            runs[i] += part[i]
            part[i] = 0


@njit(**OPTIONS)
def _store(out, runs, batch, group, groups, block, z, y, begin, count, pitch, least):
    """Write a run that begins ``begin`` voxels after row ``y``, rows ``pitch`` voxels apart,
    leaving out what lies between rows; nothing below ``least``."""
    _, channels, _, _, out_x = out.shape
    per_group = channels // groups
    for c in range(min(CHANNELS, per_group - block * CHANNELS)):
        plane = out[batch, group * per_group + block * CHANNELS + c, z]
        at = 0
        while at < count:
            row, column = divmod(begin + at, pitch)
            width = min(out_x - column, count - at)
            for i in range(width):
                value = runs[c * RUN + at + i]
                plane[y + row, column + i] = least if value < least else value
            at += pitch - column


@njit(**OPTIONS)
def _pad(padded, plane, begin, count, pitch, offset):
    """Voxels ``begin`` to ``begin + count`` of the plane with its padding, rows of ``pitch``."""
    size_y = plane.shape[0]
    at = 0
    while at < count:
        row, column = divmod(begin + at, pitch)
        width = min(pitch - column, count - at)
        iy, ix = row + offset[1], column + offset[2]
        target = padded[at : at + width]
        if iy < 0 or iy >= size_y:
            target[:] = 0
        else:
            _gather(target, plane[iy], ix, 1, width)
        at += width


@njit(**OPTIONS)
def _gather(line, row, first_x, stride, count):
    """``line[i] = row[first_x + i · stride]``, 0 where that lies outside the row."""
    low, high = reach(first_x, stride, count, row.shape[0])
    line[: min(low, count)] = 0
    for i in range(low, high):
        line[i] = row[first_x + i * stride]
    line[max(high, 0) : count] = 0


@njit(**OPTIONS)
def _add_taps(runs, values, start, taps, dilation, count):
    """Add all taps of a kernel row to runs whose inputs all exist, three taps in one pass."""
    blocks = (count + LANES - 1) // LANES
    kx = taps.shape[0]
    t = 0
    while t + 3 <= kx:
        a, b, c = start + t * dilation, start + (t + 1) * dilation, start + (t + 2) * dilation
        a0, a1, a2, a3 = taps[t, 0], taps[t, 1], taps[t, 2], taps[t, 3]
        b0, b1, b2, b3 = taps[t + 1, 0], taps[t + 1, 1], taps[t + 1, 2], taps[t + 1, 3]
        c0, c1, c2, c3 = taps[t + 2, 0], taps[t + 2, 1], taps[t + 2, 2], taps[t + 2, 3]
        for block in range(blocks):
            at = block * LANES
            for i in range(LANES):
                u, v, w = values[a + at + i], values[b + at + i], values[c + at + i]
                runs[at + i] += a0 * u + b0 * v + c0 * w
                runs[RUN + at + i] += a1 * u + b1 * v + c1 * w
                runs[2 * RUN + at + i] += a2 * u + b2 * v + c2 * w
                runs[3 * RUN + at + i] += a3 * u + b3 * v + c3 * w
        t += 3
    while t < kx:
        _add_tap(runs, values, start + t * dilation, taps[t], count)
        t += 1


@njit(**OPTIONS)
def _add_tap(runs, values, source, tap, count):
    """Add one tap to runs."""
    w0, w1, w2, w3 = tap[0], tap[1], tap[2], tap[3]
    for block in range((count + LANES - 1) // LANES):
        at = block * LANES
        begin = source + at
        for i in range(LANES):
            v = values[begin + i]
            runs[at + i] += w0 * v
            runs[RUN + at + i] += w1 * v
            runs[2 * RUN + at + i] += w2 * v
            runs[3 * RUN + at + i] += w3 * v


@njit(**OPTIONS)
def reach(shift, stride, count, size_x):
    """The outputs of ``range(count)`` whose input i · stride + shift is in ``range(size_x)``."""
    low = max(0, (-shift + stride - 1) // stride)
    high = min(count, (size_x - shift + stride - 1) // stride)
    return low, high


@njit(**OPTIONS)
def placed(item, channels, planes):
    """The sample, channel and plane that an item is."""
    return item // (planes * channels), item // planes % channels, item % planes


@njit(**OPTIONS)
def convolve_transposed(x, weight, bias, out, offset, up, dilation, first, last):
    """Items are (batch, output channel, z); ``weight`` is (out, in / groups, z, y, x).

    ``offset`` counts in steps of the output: output ``q`` reads input ``i`` through tap ``t``
    where q + offset = i · up + t · dilation.
    """
    out_channels, fan_in, kz, ky, kx = weight.shape
    _, channels, size_z, size_y, size_x = x.shape
    _, _, out_z, out_y, out_x = out.shape
    per_group = out_channels // (channels // fan_in)
    line = np.empty(size_x, np.float32)
    for item in range(first, last):
        batch, c, z = placed(item, out_channels, out_z)
        group = c // per_group
        plane = out[batch, c, z]
        plane[:] = bias[c]
        for tz in range(kz):
            at_z = z + offset[0] - tz * dilation[0]
            iz = at_z // up[0]
            if at_z % up[0] != 0 or iz < 0 or iz >= size_z:
                continue
            for y in range(out_y):
                target = plane[y]
                for ty in range(ky):
                    at_y = y + offset[1] - ty * dilation[1]
                    iy = at_y // up[1]
                    if at_y % up[1] != 0 or iy < 0 or iy >= size_y:
                        continue
                    for tx in range(kx):
                        at_x = offset[2] - tx * dilation[2]
                        low = (-at_x) % up[2]  # the first output that this tap reaches
                        ix = (low + at_x) // up[2]
                        begin = max(0, -ix)
                        end = min(size_x - ix, (out_x - low + up[2] - 1) // up[2])
                        if end <= begin:
                            continue
                        total = line[: end - begin]
                        total[:] = 0
                        for f in range(fan_in):
                            w = weight[c, f, tz, ty, tx]
                            channel = group * fan_in + f
                            source = x[batch, channel, iz, iy, ix + begin : ix + end]
                            for i in range(end - begin):
                                total[i] += w * source[i]
                        for i in range(end - begin):
                            target[low + (begin + i) * up[2]] += total[i]

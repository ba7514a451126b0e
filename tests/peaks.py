"""The memory that work takes at its peak, in whatever company it runs."""

from __future__ import annotations

import json
import subprocess
import time
import tracemalloc

from znni_dask import machine

_SAME_BYTES = 4 << 10


def traced_peak(work, allowed=None):
    """Bytes that Python allocates at most while ``work()`` runs: the least of three times or more,
    until it came twice, because what other threads of this process allocate meanwhile (a cluster's
    that ends, say) is counted, too. Where it is more than is ``allowed`` they are waited for."""
    peaks = []
    while (
        len(peaks) < 3
        or (peaks[1] - peaks[0] > _SAME_BYTES and len(peaks) < 9)
        or (allowed is not None and peaks[0] > allowed and len(peaks) < 30)
    ):
        if len(peaks) >= 9:
            time.sleep(0.1)
        tracemalloc.start()
        try:
            work()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        peaks.sort()
    return peaks[0]


def peak_while_running(command):
    """Largest anonymous memory of the process and its children, sampled from outside, and what it
    printed last."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, machine.anonymous_bytes(process.pid))
        except machine.psutil.NoSuchProcess:
            break
        time.sleep(0.01)
    out, _ = process.communicate()
    assert process.returncode == 0
    return peak, json.loads(out.splitlines()[-1])

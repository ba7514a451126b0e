"""When what was done, on which lane of which worker: a trace that Chrome and Perfetto show.

The file is an array of events in the trace event format, an event a line, written as blocks are
made; a run that is killed leaves one that can be shown as well.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from znni_dask.closing import Closing
from znni_dask.errors import OutputError


class Span(NamedTuple):
    """Something that a lane did: when it began, in seconds since 1970, and how long it took."""

    lane: str
    what: str
    start_seconds: float
    seconds: float


class Spans:
    """What this thread does for a block; noted only where it is ``wanted``."""

    def __init__(self, wanted: bool = True) -> None:
        self._wanted = wanted
        self.found: list[Span] = []

    @contextmanager
    def of(self, what: str, lane: str | None = None) -> Iterator[None]:
        """Note what is done until this is left, on a ``lane`` or by this thread."""
        wall, begin = time.time(), time.perf_counter()
        yield
        lane = lane or f"thread {threading.current_thread().name.rpartition('-')[2]}"  # its number
        self.add([Span(lane, what, wall, time.perf_counter() - begin)])

    def taken(self) -> list[Span]:
        """What was noted since this was last asked."""
        found, self.found = self.found, []
        return found

    def add(self, spans: Iterable[Span]) -> None:
        """Note what others did."""
        if self._wanted:
            self.found.extend(spans)


class Timeline(Closing):
    """Writes the trace of a run to a file. Raises `OutputError` where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._lanes: dict[tuple[str, str], int] = {}
        self._workers: dict[str, int] = {}
        self._named: set[tuple[str, str, int]] = set()
        self._begin = time.time()
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"the timeline {path} cannot be written: {error}") from None
        self._file.write("[\n")

    def add(self, worker: str, spans: Iterable[Span]) -> None:
        """Note what a worker did."""
        for span in spans:
            place = self._place(worker, span.lane)
            begun, took = (round(1e6 * s) for s in (span.start_seconds - self._begin, span.seconds))
            self._write({"name": span.what, "ph": "X", "ts": begun, "dur": took, **place})

    def close(self) -> None:
        """End the file."""
        if not self._file.closed:
            self._file.write("{}]\n")
            self._file.close()

    def _place(self, worker: str, lane: str) -> dict[str, int]:
        """The numbers of a worker and of its lane, named where they come for the first time."""
        process = self._workers.setdefault(worker, len(self._workers))
        thread = self._lanes.setdefault((worker, lane), len(self._lanes))
        place = {"pid": process, "tid": thread}
        for kind, name in (("process_name", worker), ("thread_name", lane)):
            if (kind, name, thread) not in self._named:
                self._named.add((kind, name, thread))
                self._write({"name": kind, "ph": "M", "args": {"name": name}, **place})
        return place

    def _write(self, event: dict[str, object]) -> None:
        self._file.write(json.dumps(event) + ",\n")


def spans_of(path: Path) -> Iterator[tuple[str, Span]]:
    """What every worker did, of a trace that a `Timeline` wrote, as blocks were done; beginnings in
    seconds since that of the run."""
    workers: dict[int, str] = {}
    lanes: dict[int, str] = {}
    with path.open(encoding="utf-8") as file:
        for line in islice(file, 1, None):
            event = json.loads(line.rstrip(",]\n"))
            match event.get("ph"), event.get("name"):
                case "M", "process_name":
                    workers[event["pid"]] = event["args"]["name"]
                case "M", _:
                    lanes[event["tid"]] = event["args"]["name"]
                case "X", what:
                    begin, seconds = 1e-6 * event["ts"], 1e-6 * event["dur"]
                    yield workers[event["pid"]], Span(lanes[event["tid"]], what, begin, seconds)

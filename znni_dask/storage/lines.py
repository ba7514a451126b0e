"""Lines that outlast a crash: added one by one, found again as far as they were added.

In a folder they are a file, every line forced to the disk. Object stores cannot add to an object:
there lines are gathered, and what came since is put about once a second, into an object that grows
to a thousand lines before the next is begun. A line that was not put when the process ended counts
for nothing.
"""

from __future__ import annotations

import os
import threading
import uuid
from abc import abstractmethod
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TextIO

from znni_dask.closing import Closing
from znni_dask.errors import RunError
from znni_dask.storage.patience import Patience, is_passing
from znni_dask.storage.stored import reason
from znni_dask.storage.urls import Location, Url

_PAUSE_SECONDS = 1.0  # between two puts: a store may refuse an object that is replaced sooner
_MOST_LINES = 1000  # of an object
_HEAD = "head"


class Lines(Closing):
    """Abstract: lines at some place, the first of which says what the others are."""

    @abstractmethod
    def exist(self) -> bool:
        """Whether any were begun, or may have been."""

    @abstractmethod
    def read(self) -> list[str]:
        """All whole lines, the first of them first; none where none were begun."""

    @abstractmethod
    def begin(self, first: str) -> None:
        """Go on with the lines that are there, or begin some by their first."""

    @abstractmethod
    def add(self, line: str) -> None:
        """Keep another line; raises what the store refuses it by."""

    @abstractmethod
    def remove(self) -> None:
        """Take all away, if there are any."""


def lines_at(place: Location) -> Lines:
    """The lines at a place."""
    return ObjectLines(place) if isinstance(place, Url) else FileLines(place)


class FileLines(Lines):
    """Lines of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def exist(self) -> bool:
        """Whether there is the file."""
        return self._path.exists()

    def read(self) -> list[str]:
        """All whole lines; one that was cut off is none."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return _whole(text)

    def begin(self, first: str) -> None:
        """Open the file, at the end of its last whole line."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self._cut()
        self._file = self._path.open("a", encoding="utf-8")
        if fresh:
            self.add(first)

    def add(self, line: str) -> None:
        """Write a line; when this returns it is on the disk."""
        assert self._file is not None
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Take the file away."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _cut(self) -> int:
        """Take away a last line that was not finished; returns the length of what is left."""
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self._path, whole)
        return whole


class ObjectLines(Lines):
    """Lines in objects below a URL: the head, with the first line and a name of its own, and parts
    that bear this name, so that none is ever taken for a part of other lines."""

    def __init__(self, place: Url) -> None:
        self._place, self._head = place, place / _HEAD
        self._own = ""  # how parts of these lines begin, that this process puts
        self._parts = 0
        self._part: list[str] = []  # the lines of the last part
        self._added: SimpleQueue[str | None] = SimpleQueue()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._refused: Exception | None = None
        self._patience = Patience(is_passing)

    def exist(self) -> bool:
        """Whether there is the head."""
        return self._head.read() is not None

    def read(self) -> list[str]:
        """All lines that were put; those of parts in any order."""
        head = self._begun()
        if head is None:
            return []
        name, first = head
        parts = [part for part in self._place.below() if part.startswith(name)]
        found = [_whole(data.decode()) for data in self._place.read_all(parts)]
        return [first, *(line for lines in found for line in lines)]

    def begin(self, first: str) -> None:
        """Put the head, if there is none, and begin to put what is added."""
        head = self._patience(self._begun)
        if head is None:
            head = uuid.uuid4().hex, first
            whole = "".join(line + "\n" for line in head).encode()
            self._patience(lambda: self._head.write(whole))
        self._own = f"{head[0]}-{uuid.uuid4().hex}"
        self._ending.clear()
        self._thread = threading.Thread(target=self._keep_putting, name="znni journal", daemon=True)
        self._thread.start()

    def add(self, line: str) -> None:
        """Have a line put, at once or in a second; raises `RunError` where none can be put."""
        self._check()
        self._added.put(line)

    def remove(self) -> None:
        """Take the head away, without which the rest counts for nothing, and then the rest."""
        self._patience(lambda: self._place.remove([_HEAD] if self.exist() else []))
        self._patience(lambda: self._place.remove(self._place.below()))

    def close(self) -> None:
        """Put what is left; raises `RunError` where it cannot be."""
        if self._thread is not None:
            self._ending.set()
            self._added.put(None)
            self._thread.join()
            self._thread = None
            self._check()

    def _begun(self) -> tuple[str, str] | None:
        """Name and first line; None where there is no head, or none that was put to its end."""
        data = self._head.read()
        lines = _whole(data.decode()) if data else []
        return (lines[0], lines[1]) if len(lines) > 1 else None

    def _check(self) -> None:
        if self._refused is not None:
            raise RunError(
                f"the journal {self._place} cannot be written: {reason(self._refused, 'write')}. "
                "What was made is there, but for the last of it the journal does not tell of: the "
                "same command makes that again, and what is missing"
            ) from self._refused

    def _keep_putting(self) -> None:
        """What the thread does, until it ends or is refused."""
        try:
            while self._put(self._taken()):
                self._ending.wait(_PAUSE_SECONDS)
        except Exception as error:  # whatever it is, it is told in the thread that adds
            self._refused = error

    def _taken(self) -> list[str | None]:
        """What was added since; waits for something."""
        found = [self._added.get()]
        try:
            while True:
                found.append(self._added.get_nowait())
        except Empty:
            return found

    def _put(self, added: list[str | None]) -> bool:
        """Put lines; whether there will be more."""
        lines = [line for line in added if line is not None]
        while lines:
            room = _MOST_LINES - len(self._part)
            self._part += lines[:room]
            lines = lines[room:]
            part = self._place / f"{self._own}-{self._parts}"
            data = "".join(line + "\n" for line in self._part).encode()
            self._patience(lambda part=part, data=data: part.write(data))  # type: ignore[misc]
            if len(self._part) == _MOST_LINES:
                self._parts, self._part = self._parts + 1, []
        return None not in added


def _whole(text: str) -> list[str]:
    """The lines of a text that were finished."""
    *whole, _ = text.split("\n")
    return whole

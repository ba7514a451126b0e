"""Lines that outlast a crash: added one by one, found again as far as they were added.

A thread of its own puts them, so that nobody waits for the disk or the store, and puts them again
where these refuse them for a while. In a folder they are a file, and what came since the last time
is forced to the disk at once. Object stores cannot add to an object: there lines are gathered, and
put about once a second, into an object that grows to a thousand lines before the next is begun. A
line that was not put when the process ended counts for nothing.
"""

from __future__ import annotations

import threading
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

from znni_dask.closing import Closing
from znni_dask.errors import RunError
from znni_dask.storage.forced import force
from znni_dask.storage.patience import Patience, is_passing
from znni_dask.storage.stored import reason
from znni_dask.storage.urls import Location, Url

_PAUSE_SECONDS = 1.0  # between two puts: a store may refuse an object that is replaced sooner
_MOST_LINES = 1000  # of an object
_HEAD = "head"


class Lines(Closing):
    """Abstract: lines at some place, the first of which says what the others are."""

    def __init__(self, place: Location, patience: Patience) -> None:
        self._shown, self._patience = place, patience
        self._added: SimpleQueue[str | None] = SimpleQueue()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._refused: Exception | None = None

    @abstractmethod
    def exist(self) -> bool:
        """Whether any were begun, or may have been."""

    @abstractmethod
    def read(self) -> list[str]:
        """All whole lines, the first of them first; none where none were begun."""

    @abstractmethod
    def remove(self) -> None:
        """Take all away, if there are any."""

    @abstractmethod
    def _open(self, first: str) -> None:
        """Go on with the lines that are there, or put the first of some."""

    @abstractmethod
    def _put(self, lines: list[str]) -> None:
        """Put more lines: when this returns they outlast a crash, and where it raises it may be
        called again."""

    @property
    def _pause(self) -> float:
        """Seconds between two puts."""
        return 0.0

    def begin(self, first: str) -> None:
        """Go on with the lines that are there, or begin some by their first; from now on what is
        added is put. What is refused here is told at once: nothing has been made yet."""
        self._open(first)
        self._ending.clear()
        self._thread = threading.Thread(target=self._keep_putting, name="znni journal", daemon=True)
        self._thread.start()

    def add(self, line: str) -> None:
        """Have another line put, soon; raises `RunError` where none can be put."""
        self._check()
        self._added.put(line)

    def close(self) -> None:
        """Put what is left; raises `RunError` where it cannot be."""
        if self._thread is not None:
            self._ending.set()
            self._added.put(None)
            self._thread.join()
            self._thread = None
            self._check()

    def _check(self) -> None:
        if self._refused is not None:
            raise RunError(
                f"the journal {self._shown} cannot be written: {reason(self._refused, 'write')}. "
                "What was made is there, but for the last of it the journal does not tell of: the "
                "same command makes that again, and what is missing"
            ) from self._refused

    def _keep_putting(self) -> None:
        """What the thread does, until it ends or is refused."""
        going = True
        try:
            while going:
                added = self._taken()
                going = None not in added
                if lines := [line for line in added if line is not None]:
                    self._patience(lambda lines=lines: self._put(lines))  # type: ignore[misc]
                self._ending.wait(self._pause)
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


def lines_at(place: Location) -> Lines:
    """The lines at a place."""
    return ObjectLines(place) if isinstance(place, Url) else FileLines(place)


class FileLines(Lines):
    """Lines of a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Patience())
        self._path = path
        self._whole = 0  # length of what is put

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

    def remove(self) -> None:
        """Take the file away."""
        self._patience(lambda: self._path.unlink(missing_ok=True))

    def _open(self, first: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        self._whole = self._path.read_bytes().rfind(b"\n") + 1
        if not self._whole:
            self._put([first])
            force(self._path.parent)

    def _put(self, lines: list[str]) -> None:
        """Where the last whole line ends: what was cut off there is written over."""
        data = _text(lines)
        with self._path.open("r+b") as file:
            file.truncate(self._whole)
            file.seek(self._whole)
            file.write(data)
        force(self._path)
        self._whole += len(data)


class ObjectLines(Lines):
    """Lines in objects below a URL: the head, with the first line and a name of its own, and parts
    that bear this name, so that none is ever taken for a part of other lines."""

    def __init__(self, place: Url) -> None:
        super().__init__(place, Patience(is_passing))
        self._place, self._head = place, place / _HEAD
        self._own = ""  # how parts of these lines begin, that this process puts
        self._parts = 0
        self._part: list[str] = []  # the lines of the last part

    @property
    def _pause(self) -> float:
        return _PAUSE_SECONDS

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

    def remove(self) -> None:
        """Take the head away, without which the rest counts for nothing, and then the rest."""
        self._patience(lambda: self._place.remove([_HEAD] if self.exist() else []))
        self._patience(lambda: self._place.remove(self._place.below()))

    def _open(self, first: str) -> None:
        head = self._begun()
        if head is None:
            head = uuid.uuid4().hex, first
            self._head.write(_text(head))
        self._own = f"{head[0]}-{uuid.uuid4().hex}"

    def _begun(self) -> tuple[str, str] | None:
        """Name and first line; None where there is no head, or none that was put to its end."""
        data = self._head.read()
        lines = _whole(data.decode()) if data else []
        return (lines[0], lines[1]) if len(lines) > 1 else None

    def _put(self, lines: list[str]) -> None:
        """Into the last part, and where that is full into more."""
        parts, part = self._parts, [*self._part, *lines]
        while True:
            (self._place / f"{self._own}-{parts}").write(_text(part[:_MOST_LINES]))
            if len(part) < _MOST_LINES:
                break
            parts, part = parts + 1, part[_MOST_LINES:]
        self._parts, self._part = parts, part


def _text(lines: Sequence[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def _whole(text: str) -> list[str]:
    """The lines of a text that were finished."""
    *whole, _ = text.split("\n")
    return whole

"""The journal of a run: which blocks are written, kept beside the output until all are.

One line of JSON each: first what defines the answer and the grid of blocks, then every block that
is finished, written only after its chunks are. A run that was interrupted, at whatever moment,
goes on with the blocks that are missing; a line cut off in the middle counts for nothing. A run
that would give another answer is refused. Beside an output in an object store the journal lies in
that store (`znni_dask.storage.lines`), so that a resume finds it on whatever machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from znni_dask.errors import OutputError, RunError
from znni_dask.geometry import Box, Size, add, triple
from znni_dask.normalization import Statistics
from znni_dask.storage.clouds import refusals
from znni_dask.storage.lines import Lines, lines_at
from znni_dask.storage.stored import reason, refused
from znni_dask.storage.urls import Location

_VERSION = 1
Place = tuple[int, int, Size]  # pass, time point, first voxel of the block


def journal_of(output: Location) -> Location:
    """Where the journal of an output lies."""
    return output.with_name(output.name + ".journal")


def is_unfinished(output: Location) -> bool:
    """Whether there is a journal of an output, which tells of a run that was begun. Raises
    `OutputError` where that cannot be found out."""
    path = journal_of(output)
    with refused("read", f"the journal {path}"):
        return lines_at(path).exist()


def forget(output: Location) -> None:
    """Take the journal of an output away, if there is one."""
    path = journal_of(output)
    with refused("write", f"the journal {path}"):
        lines_at(path).remove()


def in_json(described: Mapping[str, Any]) -> dict[str, Any]:
    """A description as it reads back from a file, where tuples are lists."""
    return dict(json.loads(json.dumps(described)))


@dataclass(eq=False)
class Journal:
    """The journal of one output. ``blocks`` is the size of the blocks of every pass,
    ``statistics`` those by which the volume is normalised. Use it as a context manager, or
    `close` it."""

    path: Location
    described: Mapping[str, Any]
    blocks: Sequence[Size]
    statistics: Mapping[str, Any] | None = None
    done: set[Place] = field(default_factory=set)
    resumed: bool = False  # whether it told of blocks when it was found
    _lines: Lines | None = None

    @classmethod
    def begun(cls, path: Location) -> Journal | None:
        """The journal at ``path``; None where there is none, or none of which a line is finished.
        Raises `OutputError` where it cannot be read."""
        try:
            with refused("read", f"the journal {path}"):
                lines = lines_at(path).read()
        except UnicodeDecodeError as error:
            raise OutputError(f"cannot read the journal {path}: {error}") from None
        if not lines:
            return None
        try:
            head = json.loads(lines[0])
            if head["version"] != _VERSION:
                raise ValueError(f"version {head['version']} is not known")
            journal = cls(path, head["described"], [triple(b) for b in head["blocks"]])
            journal.statistics = head["statistics"]
            for line in lines[1:]:
                number, time, start = json.loads(line)
                journal.done.add((int(number), int(time), triple(start)))
            journal.resumed = bool(journal.done)
            return journal
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise OutputError(
                f"the journal {path} is damaged ({error}): start anew with --overwrite"
            ) from None

    def begin(self) -> None:
        """Open the journal for writing; a new one begins with what defines the answer."""
        head = {
            "version": _VERSION,
            "described": self.described,
            "blocks": self.blocks,
            "statistics": self.statistics,
        }
        with refused("write", f"the journal {self.path}"):
            self._lines = lines_at(self.path)
            self._lines.begin(json.dumps(head))

    def check(self, described: Mapping[str, Any]) -> None:
        """Raise `OutputError` where a run described so would give another answer."""
        asked = in_json(described)
        differing = sorted(
            key for key in {*asked, *self.described} if asked.get(key) != self.described.get(key)
        )
        if differing:
            raise OutputError(
                f"{self.path} tells of an unfinished run that differs from this one in "
                f"{', '.join(differing)}: repeat that one's command to finish it, start anew with "
                "--overwrite, or choose another place"
            )

    def known_statistics(self) -> Statistics:
        """The statistics by which the volume is normalised, of a run that normalises it."""
        try:
            return Statistics.told(self.statistics or {})
        except (KeyError, TypeError, ValueError):
            raise OutputError(
                f"the journal {self.path} is damaged (its statistics cannot be read): start anew "
                "with --overwrite"
            ) from None

    def add(self, number: int, time: int, block: Box) -> None:
        """Have it noted that a block is written; in the file alone, as a run comes to each but
        once. Raises `RunError` where nothing more can be noted."""
        assert self._lines is not None
        self._lines.add(json.dumps([number, time, block.start]))

    def holds(self, number: int, time: int, block: Box) -> bool:
        """Whether a block was written when the journal was found."""
        return (number, time, block.start) in self.done

    def blocks_of(self, number: int, size: Size) -> Iterator[Box]:
        """The blocks of a pass that were written when the journal was found, at whatever time
        point, of an answer of ``size``."""
        block = self.blocks[number]
        for other, _, start in self.done:
            if other == number:
                yield Box(start, add(start, block)).clipped(size)

    def end(self) -> None:
        """All blocks are written: the journal is not needed any more. Raises `RunError` where it
        cannot be taken away."""
        self.close()
        try:
            lines_at(self.path).remove()
        except refusals() as error:
            raise RunError(
                f"the journal {self.path} cannot be taken away: {reason(error, 'write')}. "
                "Everything is made: the same command ends the run"
            ) from error

    def close(self) -> None:
        """Write the last of it; the journal stays."""
        if self._lines is not None:
            lines, self._lines = self._lines, None
            lines.close()

    def __enter__(self) -> Journal:
        self.begin()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        with suppress(*() if kind is None else (RunError,)):  # what came first is told
            self.close()

"""The journal of a run: which blocks are written, kept beside the output until all are.

One line of JSON each: first what defines the answer and the grid of blocks, then every block that
is finished, written only after its chunks are. A run that was interrupted, at whatever moment,
goes on with the blocks that are missing; a line cut off in the middle counts for nothing. A run
that would give another answer is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from znni_dask.errors import OutputError
from znni_dask.geometry import Box, Size, add, triple
from znni_dask.normalization import Statistics

_VERSION = 1
Place = tuple[int, int, Size]  # pass, time point, first voxel of the block


def journal_of(output: Path) -> Path:
    """Where the journal of an output lies."""
    return output.with_name(output.name + ".journal")


def in_json(described: Mapping[str, Any]) -> dict[str, Any]:
    """A description as it reads back from a file, where tuples are lists."""
    return dict(json.loads(json.dumps(described)))


@dataclass(eq=False)
class Journal:
    """The journal of one output. ``blocks`` is the size of the blocks of every pass,
    ``statistics`` those by which the volume is normalised. Use it as a context manager, or
    `close` it."""

    path: Path
    described: Mapping[str, Any]
    blocks: Sequence[Size]
    statistics: Mapping[str, Any] | None = None
    done: set[Place] = field(default_factory=set)
    resumed: bool = False  # whether it told of blocks when it was found
    _file: TextIO | None = None

    @classmethod
    def begun(cls, path: Path) -> Journal | None:
        """The journal at ``path``; None where there is none, or none of which a line is finished.
        Raises `OutputError` where it cannot be read."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"cannot read the journal {path}: {error}") from None
        if not lines or not lines[0].endswith("\n"):
            return None
        try:
            head = json.loads(lines[0])
            if head["version"] != _VERSION:
                raise ValueError(f"version {head['version']} is not known")
            journal = cls(path, head["described"], [triple(b) for b in head["blocks"]])
            journal.statistics = head["statistics"]
            for line in lines[1:]:
                if line.endswith("\n"):  # else it was being written when the run ended
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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self._cut()
            self._file = self.path.open("a", encoding="utf-8")
            if fresh:
                head = {
                    "version": _VERSION,
                    "described": self.described,
                    "blocks": self.blocks,
                    "statistics": self.statistics,
                }
                self._write(head)
        except OSError as error:
            raise OutputError(f"cannot write the journal {self.path}: {error}") from None

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
        """Note that a block is written."""
        self._write([number, time, block.start])
        self.done.add((number, time, block.start))

    def holds(self, number: int, time: int, block: Box) -> bool:
        """Whether a block is written."""
        return (number, time, block.start) in self.done

    def blocks_of(self, number: int, size: Size) -> Iterator[Box]:
        """The blocks of a pass that are written, at whatever time point, of an answer of
        ``size``."""
        block = self.blocks[number]
        for other, _, start in self.done:
            if other == number:
                yield Box(start, add(start, block)).clipped(size)

    def end(self) -> None:
        """All blocks are written: the journal is not needed any more."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; the journal stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Journal:
        self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _cut(self) -> int:
        """Take away a last line that was not finished; returns the length of what is left."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        return whole

    def _write(self, line: object) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

"""Every error that znni_dask raises on purpose.

    ZnniError
    ├── InputError            what the user handed in cannot be used (command line: exit code 2)
    │   ├── NetworkError      the network: unreadable, unsupported, inconsistent
    │   ├── VolumeError       the volume: missing, unreadable, of the wrong kind
    │   ├── OutputError       the place or form of the output
    │   ├── OptionError       an option or argument
    │   └── MemoryLimitError  no plan fits the memory allowed
    ├── RunError              blocks failed while running (command line: exit code 1)
    └── DeviceError           a device failed, or has no room (command line: exit code 1)

A message says what was asked, what was found and what to do.
"""

from __future__ import annotations

import errno


class ZnniError(Exception):
    """Base of all errors raised on purpose."""


class InputError(ZnniError):
    """What the user handed in cannot be used; nothing has been written."""


class NetworkError(InputError):
    """The network cannot be read, is not supported or contradicts itself."""


class VolumeError(InputError):
    """The volume cannot be read or does not suit the network."""


class OutputError(InputError):
    """The output cannot be written where or as it was asked for."""


class OptionError(InputError):
    """An option or argument has a value that cannot be used."""


class MemoryLimitError(InputError):
    """No plan fits into the memory allowed. ``needed_bytes`` of the process's would be enough; 0
    where that is not known, or it is a device's that is short."""

    def __init__(self, message: str, needed_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class RunError(ZnniError):
    """Blocks failed while running; what finished before is kept."""


class DeviceError(ZnniError):
    """A device failed or was lost, or has less room than was planned for."""


def is_full(outcome: object) -> bool:
    """Whether what came of a task is an error that says, or came of one that says, that no space is
    left."""
    error = outcome if isinstance(outcome, BaseException) else None
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False

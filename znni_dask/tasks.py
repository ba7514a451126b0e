"""How many items of work are sent to a worker in one task.

Arithmetic only, for those who hand work out (`feeding`) and for runs on paper (`simulation`).
"""

from __future__ import annotations

MOST_ITEMS = 64
TASK_SECONDS = 0.03  # that items sent together take at least: to send a task takes some 10 ms
HANDED_OUT = (
    50  # tasks a second, for all workers together, that leave the client idle half the time
)
_AT_THE_END = 4  # what is left of a run is shared by so many, lest one is last


def wanted_seconds(workers: int) -> float:
    """How long a task takes, where its items take less, so that so many workers are kept busy."""
    return max(TASK_SECONDS, workers / HANDED_OUT)


def together(item_seconds: float, workers: int, left: int, more: bool) -> int:
    """Of items that take so long, of which so many are ``left`` of a worker's run: as many as take
    some time together, the more of it the more workers there are to be sent any. Where there are no
    ``more`` runs, some are left for those who will have nothing else.

    >>> together(5.0, 4, 64, more=True), together(5.0, 1000, 64, more=True)
    (1, 4)
    >>> together(0.001, 4, 64, more=False), together(0.5, 1000, 64, more=False)
    (30, 16)
    """
    quick, many = (
        int(min(seconds / item_seconds, MOST_ITEMS)) if item_seconds else MOST_ITEMS
        for seconds in (TASK_SECONDS, wanted_seconds(workers))
    )
    if not more:
        many = min(many, left // _AT_THE_END)
    return max(min(max(quick, many), left), 1)

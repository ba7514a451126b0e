"""Compiled calls shared among threads without the interpreter, and so without its lock.

Threads meet at one array of numbers, the *board*. Its first word is the state: bit 0 says whether a
call is open, the bits above how many helpers are at it, those from bit 32 on which turn it is. A
helper joins by changing exactly the state that it saw, so that none begins a call that was closed
meanwhile; who opened it closes it and waits for those who joined. Pieces are handed out by a
counter, to whoever is free.

===========  ======================================================================
word         what it holds
===========  ======================================================================
`STATE`      the state, in a cache line of its own
`NEXT`       the number of the next piece, in a line of its own
`CALL`       address of the function (0: threads compute in the interpreter), number
             of its arguments, items, pieces
`ARGUMENTS`  what the first thread passes
`STEPS`      what is added for every thread after it
===========  ======================================================================

A function takes its arguments, and the first and the end of the items of a piece: addresses and
numbers of 64 bits, which are passed alike.
"""

from __future__ import annotations

from functools import cache

from znni_dask.kernels.compiled import Library, library_of_text

OPEN, LEAD, CLOSE, SERVE, LEAVE = "open", "lead", "close", "serve", "leave"
MOST_ARGUMENTS = 24
STATE, NEXT, CALL, ARGUMENTS = 0, 8, 16, 24
STEPS = ARGUMENTS + MOST_ARGUMENTS
WORDS = STEPS + MOST_ARGUMENTS
TURN, JOINED = 0, 1  # what `SERVE` tells: the last turn taken part in; whether it is still in it
TURN_BITS = 32

_PARAMETERS = {  # addresses, then numbers
    OPEN: (("board",), ("turn",)),
    LEAD: (("board",), ("looks",)),
    CLOSE: (("board",), ("looks",)),
    SERVE: (("board", "told"), ("member", "looks")),
    LEAVE: (("board",), ()),
}

_LEAD = f"""
define void @{OPEN}(ptr %board, i64 %turn) {{
  %high = shl i64 %turn, {TURN_BITS}
  %state = or i64 %high, 1
  store atomic i64 %state, ptr %board release, align 8
  ret void
}}

define void @{LEAD}(ptr %board, i64 %looks) {{
  call void @pieces(ptr %board, i64 0)
  call void @{CLOSE}(ptr %board, i64 %looks)
  ret void
}}

define void @{CLOSE}(ptr %board, i64 %looks) {{
entry:
  %closed = atomicrmw and ptr %board, i64 -2 acq_rel
  br label %look
look:
  %left = phi i64 [ %looks, %entry ], [ %fewer, %again ]
  %state = load atomic i64, ptr %board acquire, align 8
  %helpers = and i64 %state, {(1 << TURN_BITS) - 1}
  %alone = icmp eq i64 %helpers, 0
  br i1 %alone, label %done, label %again
again:
  %fewer = sub i64 %left, 1
  %over = icmp sle i64 %fewer, 0
  br i1 %over, label %done, label %look
done:
  ret void
}}
"""
_SERVE = f"""
define void @{SERVE}(ptr %board, ptr %told, i64 %member, i64 %looks) {{
entry:
  %joined = getelementptr i64, ptr %told, i64 {JOINED}
  store i64 0, ptr %joined
  %turn.place = getelementptr i64, ptr %told, i64 {TURN}
  %before = load i64, ptr %turn.place
  br label %look
look:
  %seen = phi i64 [ %before, %entry ], [ %seen, %again ], [ %turn, %helped ]
  %left = phi i64 [ %looks, %entry ], [ %fewer, %again ], [ %looks, %helped ]
  %state = load atomic i64, ptr %board acquire, align 8
  %turn = lshr i64 %state, {TURN_BITS}
  %new = icmp ne i64 %turn, %seen
  %open = trunc i64 %state to i1
  %wanted = and i1 %new, %open
  br i1 %wanted, label %join, label %again
again:
  %fewer = sub i64 %left, 1
  %over = icmp sle i64 %fewer, 0
  br i1 %over, label %done, label %look
join:
  %more = add i64 %state, 2
  %pair = cmpxchg ptr %board, i64 %state, i64 %more acq_rel acquire
  %in = extractvalue {{ i64, i1 }} %pair, 1
  br i1 %in, label %help, label %again
help:
  store i64 %turn, ptr %turn.place
  %call = getelementptr i64, ptr %board, i64 {CALL}
  %function = load i64, ptr %call
  %interpreted = icmp eq i64 %function, 0
  br i1 %interpreted, label %stay, label %take
stay:
  store i64 1, ptr %joined
  ret void
take:
  call void @pieces(ptr %board, i64 %member)
  br label %helped
helped:
  call void @{LEAVE}(ptr %board)
  br label %look
done:
  ret void
}}

define void @{LEAVE}(ptr %board) {{
  %before = atomicrmw sub ptr %board, i64 2 acq_rel
  ret void
}}
"""


@cache
def sharing_library() -> Library:
    """The compiled functions.

    `OPEN` opens a call, as turn ``turn``; `LEAD` takes pieces of it and closes it, `CLOSE` only
    closes it. That waits for helpers, but looks no more than ``looks`` times: then the caller
    waits, until nothing but the turn is left in the state. `SERVE` takes part in calls until it has
    looked ``looks`` times in vain, or has joined one of the interpreter's, which it leaves by
    `LEAVE`.
    """
    return library_of_text(sharing_text(), _PARAMETERS)


def sharing_text() -> str:
    """They as they are written: atomic operations, and calls through addresses."""
    return "\n".join((_pieces(), _LEAD, _SERVE))


def _pieces() -> str:
    """The function that takes pieces while there are any, with a call for every number of
    arguments."""
    words = "\n".join(
        f"  %{name}.place = getelementptr i64, ptr %board, i64 {CALL + number}\n"
        f"  %{name} = load i64, ptr %{name}.place"
        for number, name in enumerate(("address", "count", "items", "pieces"))
    )
    cases = " ".join(f"i64 {n}, label %of.{n}" for n in range(MOST_ARGUMENTS + 1))
    return f"""
define internal void @pieces(ptr %board, i64 %member) {{
entry:
{words}
  %function = inttoptr i64 %address to ptr
  %next = getelementptr i64, ptr %board, i64 {NEXT}
  br label %turn
turn:
  %piece = atomicrmw add ptr %next, i64 1 monotonic
  %there = icmp slt i64 %piece, %pieces
  br i1 %there, label %call, label %done
call:
  %until = add i64 %piece, 1
  %low = mul i64 %items, %piece
  %high = mul i64 %items, %until
  %first = udiv i64 %low, %pieces
  %end = udiv i64 %high, %pieces
  switch i64 %count, label %done [ {cases} ]
{"".join(map(_call, range(MOST_ARGUMENTS + 1)))}
done:
  ret void
}}"""


def _call(count: int) -> str:
    """The function called with so many arguments."""
    given = "".join(
        f"""
  %argument.{count}.{n} = getelementptr i64, ptr %board, i64 {ARGUMENTS + n}
  %begin.{count}.{n} = load i64, ptr %argument.{count}.{n}
  %step.{count}.{n} = getelementptr i64, ptr %board, i64 {STEPS + n}
  %each.{count}.{n} = load i64, ptr %step.{count}.{n}
  %far.{count}.{n} = mul i64 %each.{count}.{n}, %member
  %given.{count}.{n} = add i64 %begin.{count}.{n}, %far.{count}.{n}"""
        for n in range(count)
    )
    passed = "".join(f"i64 %given.{count}.{n}, " for n in range(count))
    return f"""
of.{count}:{given}
  call void %function({passed}i64 %first, i64 %end)
  br label %turn"""

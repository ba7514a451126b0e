"""Compiled calls that take turns: some items by one, as many by the next, while what all of them
read is near."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from znni_dask.kernels.compiled import Library, library_of_text

TAKE = "take"
_PARAMETERS = {TAKE: (("turns",), ("count", "items", "size", "first", "end"))}


class Turn(NamedTuple):
    """One of the calls, in the order in which compiled code reads it: the address of a function,
    the five addresses that it is given before first and end of some items, and its items."""

    function: int
    told: int
    source: int
    weights: int
    biases: int
    out: int
    items: int


@cache
def turns_library() -> Library:
    """The compiled function.

    Items of `TAKE` are (group, turn) of ``count`` turns; a group is ``size`` of ``items`` items, or
    the same share of a turn that has other items.
    """
    return library_of_text(turns_text(), _PARAMETERS)


def turns_text() -> str:
    """It as it is written: a loop over calls through addresses."""
    loads = "\n".join(
        f"  %{name}.place = getelementptr i64, ptr %turn, i64 {number}\n"
        f"  %{name} = load i64, ptr %{name}.place"
        for number, name in enumerate(Turn._fields)
    )
    given = ", ".join(f"i64 %{name}" for name in Turn._fields[1:-1])
    ends = "\n".join(
        f"""  %{name}.all = mul i64 %{number}, %size
  %{name}.over = icmp sgt i64 %{name}.all, %all
  %{name}.some = select i1 %{name}.over, i64 %all, i64 %{name}.all
  %{name}.share = mul i64 %{name}.some, %items
  %{name} = udiv i64 %{name}.share, %all"""
        for name, number in (("begin", "group"), ("until", "next.group"))
    )
    return f"""
define void @{TAKE}(ptr %turns, i64 %count, i64 %all, i64 %size, i64 %first, i64 %end) {{
entry:
  br label %test
test:
  %unit = phi i64 [ %first, %entry ], [ %next, %call ]
  %there = icmp slt i64 %unit, %end
  br i1 %there, label %call, label %done
call:
  %group = udiv i64 %unit, %count
  %number = urem i64 %unit, %count
  %next.group = add i64 %group, 1
  %far = mul i64 %number, {len(Turn._fields)}
  %turn = getelementptr i64, ptr %turns, i64 %far
{loads}
{ends}
  %to = inttoptr i64 %function to ptr
  call void %to({given}, i64 %begin, i64 %until)
  %next = add i64 %unit, 1
  br label %test
done:
  ret void
}}
"""

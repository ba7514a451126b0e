"""The command ``znni``: info, plan, infer, verify, measure, worker.

Exit codes: 0 done; 1 blocks failed, or a verification does not hold; 2 the input cannot be used
(nothing was written); 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from znni_dask import report, report_cluster, timings
from znni_dask.arguments import asked, parser
from znni_dask.calibration import calibrate
from znni_dask.devices.opening import Wanted, gpu_of
from znni_dask.errors import DeviceError, InputError, OutputError, RunError
from znni_dask.forecast import forecasts
from znni_dask.importers import load_network
from znni_dask.inspection import facts
from znni_dask.kernels import compiled
from znni_dask.machine import GPU, cores
from znni_dask.options import computing_threads
from znni_dask.outlook import Outlook, outlooks
from znni_dask.page import page_of_plans, page_of_run, require_pictures
from znni_dask.running import run
from znni_dask.sketch import Sketch
from znni_dask.storage.urls import without_secrets
from znni_dask.verify import verify
from znni_dask.worker import serve

_PLAIN_SECONDS = 5.0
_FILE_WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = parser().parse_args(arguments)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        return _COMMANDS[options.command](options)
    except InputError as error:
        errors.print(f"znni: {error}")
        return 2
    except (DeviceError, RunError) as error:
        errors.print(f"znni: {error}")
        return 1
    except KeyboardInterrupt:
        goes_on = "; the same command goes on with the blocks that are missing"
        errors.print("znni: interrupted" + (goes_on if options.command == "infer" else ""))
        return 130


def _console() -> Console:
    """Standard output; where it is no terminal, wide enough for whole tables."""
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, markup=False, width=_FILE_WIDTH)


def _info(options: argparse.Namespace) -> int:
    network = load_network(options.network, options.patchwise)
    console = _console()
    for line in report.network_lines(network):
        console.print(line, soft_wrap=True)
    for found in facts(network, cores(), options.patchwise):
        for line in report.facts_lines(found):
            console.print(line, soft_wrap=True)
        if found.geometry is not None:
            console.print(report.geometry_table(found.geometry))
    console.print(report.layer_table(network))
    return 0


def _infer(options: argparse.Namespace) -> int:
    console, trace = _console(), options.timeline
    with TemporaryDirectory() if options.html else nullcontext() as folder:
        if options.html:
            require_pictures()
            _write(options.html, "")  # a place that cannot be written is told of before the run
            trace = trace or f"{folder}/timeline.json"
        with _telling_of_compilation(console), _progress(console) as progress:
            summary = run(
                options.network,
                options.input,
                options.output,
                overwrite=options.overwrite,
                client=options.scheduler,
                workers=options.workers,
                progress=progress,
                timeline=trace,
                **asked(options),
            )
        for line in report.run_lines(summary):
            console.print(line, soft_wrap=True)
        if options.html:
            _write(options.html, page_of_run(_title(options), summary, Path(trace)))
    return 0


def _plan(options: argparse.Namespace) -> int:
    asked_for = options.network, options.input
    expected: list[Outlook | None]
    if options.cluster:
        both = outlooks(*asked_for, Sketch.read(options.cluster), **asked(options))
        found, expected = [one for one, _ in both], [there for _, there in both]
    else:
        found = [*forecasts(*asked_for, **asked(options))]
        expected = [None] * len(found)
    if options.html:
        _write(options.html, page_of_plans(_title(options), found))
    told = [*zip(found, expected, strict=True)]
    if options.format == "json":
        described = [
            one.described() | ({"cluster": there.described()} if there else {})
            for one, there in told
        ]
        sys.stdout.write(json.dumps(described, indent=2) + "\n")
        return 0
    console = _console()
    for one, there in told:
        console.print(report.forecast_table(one))
        if one.others:
            console.print(report.alternatives_table(one))
        for line in report.forecast_lines(one):
            console.print(line, soft_wrap=True)
        if there:
            console.print(report_cluster.groups_table(there))
            console.print(report_cluster.outlook_table(there))
            for line in report_cluster.outlook_lines(there):
                console.print(line, soft_wrap=True)
    return 0


def _title(options: argparse.Namespace) -> str:
    return f"{options.network} on {without_secrets(options.input)}"


def _write(place: str, made: str) -> None:
    try:
        Path(place).write_text(made, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{place} cannot be written: {error}") from None


def _verify(options: argparse.Namespace) -> int:
    found = verify(
        options.network,
        options.input,
        options.output,
        places=options.places,
        size=options.size,
        seed=options.seed,
        threads=options.threads,
    )
    console = _console()
    for line in report.verification_lines(found):
        console.print(line, soft_wrap=True)
    return 0 if found.holds else 1


def _measure(options: argparse.Namespace) -> int:
    console = _console()
    threads = computing_threads(options.threads)

    def telling(who: str) -> Callable[[int, int], None]:
        return lambda done, total: console.print(f"{done} of {total} networks measured, {who}")

    with _telling_of_compilation(console):
        made = calibrate(threads, telling(f"with {threads} threads"))
        found = timings.kept().joined(made.found)
    if (gpu := gpu_of(Wanted(GPU))).free_bytes:
        room = gpu.allowed_bytes(Wanted(GPU))
        found = found.joined(calibrate(1, telling(f"on the {gpu.name}"), room).found)
    place = timings.keep_timings(found)
    console.print(report.timings_table(found))
    console.print(f"kept in {place}; plans are made by it from now on", soft_wrap=True)
    return 0


def _worker(options: argparse.Namespace) -> int:
    serve(options.scheduler, options.memory, options.threads, options.name)
    return 0


@contextmanager
def _telling_of_compilation(console: Console) -> Iterator[None]:
    """Tell once, where kernels are compiled, why nothing is computed meanwhile."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not told:
                told.append(record.getMessage())
                console.print(told[0], soft_wrap=True)

    listener, level = Listener(), compiled.LOG.level
    compiled.LOG.addHandler(listener)
    compiled.LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        compiled.LOG.removeHandler(listener)
        compiled.LOG.setLevel(level)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a plain line now and then."""
    if not console.is_terminal:
        yield _plain(console)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("voxels", total=None, rate="")
        begin = time.perf_counter()

        def show(done: int, total: int) -> None:
            rate = done / (time.perf_counter() - begin)
            bar.update(task, completed=done, total=total, rate=f"{rate:,.0f} voxels/s")

        yield show


def _plain(console: Console) -> Callable[[int, int], None]:
    begin = shown = time.perf_counter()

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.perf_counter()
        if now - shown >= _PLAIN_SECONDS or done == total:
            shown = now
            console.print(report.progress_line(done, total, now - begin))

    return show


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "info": _info,
    "plan": _plan,
    "infer": _infer,
    "verify": _verify,
    "measure": _measure,
    "worker": _worker,
}

if __name__ == "__main__":
    sys.exit(main())

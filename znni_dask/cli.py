"""The command ``znni``: info, infer, verify, measure.

Exit codes: 0 done; 1 blocks failed, or a verification does not hold; 2 the input cannot be used
(nothing was written); 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from znni_dask import report, timings
from znni_dask.calibration import calibrate
from znni_dask.errors import InputError, RunError
from znni_dask.geometry import Size, triple
from znni_dask.importers import load_network
from znni_dask.inspection import facts
from znni_dask.kernels import compiled
from znni_dask.machine import cores
from znni_dask.network.layers import FULL, PRECISIONS
from znni_dask.normalization import METHODS
from znni_dask.options import computing_threads
from znni_dask.patches import BOUNDARIES
from znni_dask.run import run
from znni_dask.storage.encoding import DTYPES
from znni_dask.storage.ngff import VERSIONS
from znni_dask.verify import verify
from znni_dask.windows import WEIGHTS

_PLAIN_SECONDS = 5.0
_FILE_WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = _parser().parse_args(arguments)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except InputError as error:
        errors.print(f"znni: {error}")
        return 2
    except RunError as error:
        errors.print(f"znni: {error}")
        return 1
    except KeyboardInterrupt:
        errors.print("znni: interrupted; the same command goes on with the blocks that are missing")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="znni",
        description="Trained 3D ConvNets applied to volumes far larger than memory.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="show a network: geometry and layers")
    _add_network(info)
    info.add_argument(
        "--patchwise",
        type=_window,
        metavar="Z,Y,X",
        help="the windows to which the network is to be applied",
    )
    info.set_defaults(command=_info)

    _add_infer(commands.add_parser("infer", help="apply a network to a volume"))
    check = commands.add_parser("verify", help="recompute random places of an output")
    _add_network(check)
    check.add_argument("input", help="the volume the output was made from")
    check.add_argument("output", help="the output of znni infer")
    check.add_argument("--places", type=int, default=8, metavar="N")
    check.add_argument("--size", type=_size, metavar="Z,Y,X", help="of a place (default 32³)")
    check.add_argument("--seed", type=int, default=0)
    check.add_argument("--threads", type=int, metavar="N")
    check.set_defaults(command=_verify)
    study = commands.add_parser(
        "measure", help="measure once how fast this machine is, for better plans"
    )
    study.add_argument("--threads", type=int, metavar="N")
    study.set_defaults(command=_measure)
    return parser


def _add_infer(infer: argparse.ArgumentParser) -> None:
    _add_network(infer)
    infer.add_argument(
        "input", help="volume: Zarr or OME-Zarr (path or URL), TIFF stack, file.h5:/dataset, .npy"
    )
    infer.add_argument("output", help="OME-Zarr store to make")
    infer.add_argument("--boundary", choices=BOUNDARIES, default="reflect")
    infer.add_argument("--memory", metavar="SIZE", help="bound for the process, like 12GiB")
    infer.add_argument("--patch", type=_size, metavar="Z,Y,X", help="output computed at once")
    infer.add_argument("--threads", type=int, metavar="N")
    infer.add_argument("--axes", metavar="LETTERS", help="what the input's axes mean, out of tczyx")
    infer.add_argument(
        "--channels", type=_numbers, metavar="C,…", help="the input's channels to use, from 0"
    )
    infer.add_argument("--level", metavar="N", help="resolution of an OME-Zarr image (default 0)")
    infer.add_argument(
        "--output",
        dest="outputs",
        action="append",
        metavar="NAME",
        help="an output of the network to compute (may be repeated; default all)",
    )
    infer.add_argument(
        "--roi", metavar="Z0:Z1,Y0:Y1,X0:X1", help="box of voxels wanted, like 9:,:,:64"
    )
    infer.add_argument(
        "--mask", metavar="PATH", help="volume of the input's size: wanted is where it is not zero"
    )
    infer.add_argument("--nan", type=float, metavar="VALUE", help="replaces NaN and infinity")
    infer.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing output, or start an unfinished one anew",
    )
    _add_normalization(infer)
    _add_form(infer)
    _add_approximate(infer)
    infer.set_defaults(command=_infer)


def _add_normalization(infer: argparse.ArgumentParser) -> None:
    group = infer.add_argument_group("normalisation, by statistics of the whole volume")
    group.add_argument("--normalize", choices=METHODS, default="none")
    group.add_argument(
        "--percentiles",
        type=float,
        nargs=2,
        default=(1.0, 99.0),
        metavar=("LOW", "HIGH"),
        help="which become 0 and 1 (default 1 99)",
    )
    group.add_argument(
        "--stats-level", metavar="N", help="level of the OME-Zarr image they are taken of"
    )


def _add_form(infer: argparse.ArgumentParser) -> None:
    """Options of how the output is stored."""
    group = infer.add_argument_group("how the output is stored")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the output; labels: the number of the channel with the largest value",
    )
    group.add_argument(
        "--range",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="values that uint8 output maps to 0 and 255 (default 0 1)",
    )
    group.add_argument("--chunks", type=_size, metavar="Z,Y,X", help="of the output (default 64³)")
    group.add_argument("--shards", type=_size, metavar="Z,Y,X", help="of the output (default none)")
    group.add_argument(
        "--ome", choices=VERSIONS, default=VERSIONS[-1], help="version of OME-Zarr (default 0.5)"
    )
    group.add_argument(
        "--no-pyramid",
        dest="pyramid",
        action="store_false",
        help="make no coarser levels beside the output",
    )


def _add_approximate(infer: argparse.ArgumentParser) -> None:
    """Options that make the answer approximate."""
    group = infer.add_argument_group("approximate answers, only when asked for")
    group.add_argument(
        "--patchwise",
        type=_size,
        metavar="Z,Y,X",
        help="window for networks that reduce over space: approximate, blended where windows lap",
    )
    group.add_argument("--overlap", type=float, default=0.5, metavar="SHARE", help="of windows")
    group.add_argument("--weights", choices=WEIGHTS, default="constant", help="of windows")
    group.add_argument(
        "--step", type=_size, metavar="Z,Y,X", help="distance of a classifier's windows"
    )
    group.add_argument(
        "--halo",
        type=_size,
        metavar="Z,Y,X",
        help="less than the derived halo: approximate, its error is measured and reported",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=FULL,
        help="of convolutions, where that is faster: approximate like a halo (bfloat16: PyTorch)",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", help="ONNX or .znni file, or n337, n537, n726, n926")


def _size(text: str) -> Size:
    try:
        return triple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not z,y,x like 64,64,64") from None


def _window(text: str) -> Size:
    size = _size(text)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of windows")
    return size


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 0,2") from None


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
    console = _console()
    with _telling_of_compilation(console), _progress(console) as progress:
        summary = run(
            options.network,
            options.input,
            options.output,
            boundary=options.boundary,
            memory=options.memory,
            patch=options.patch,
            threads=options.threads,
            dtype=options.dtype,
            value_range=tuple(options.range),
            chunks=options.chunks,
            shards=options.shards,
            ome=options.ome,
            pyramid=options.pyramid,
            nan=options.nan,
            axes=options.axes,
            channels=options.channels,
            level=options.level,
            outputs=options.outputs,
            patchwise=options.patchwise,
            overlap=options.overlap,
            weights=options.weights,
            step=options.step,
            halo=options.halo,
            precision=options.precision,
            roi=options.roi,
            mask=options.mask,
            normalize=options.normalize,
            percentiles=tuple(options.percentiles),
            stats_level=options.stats_level,
            overwrite=options.overwrite,
            progress=progress,
        )
    for line in report.run_lines(summary):
        console.print(line, soft_wrap=True)
    return 0


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
    counts = sorted({1, computing_threads(options.threads)})
    found = timings.kept()
    with _telling_of_compilation(console):
        for threads in counts:

            def told(done: int, total: int, threads: int = threads) -> None:
                console.print(f"{threads} threads: {done} of {total} networks measured")

            found = found.joined(calibrate(threads, told).found)
    place = timings.keep_timings(found)
    console.print(report.timings_table(found))
    console.print(f"kept in {place}; plans are made by it from now on", soft_wrap=True)
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


if __name__ == "__main__":
    sys.exit(main())

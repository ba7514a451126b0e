"""What the command ``znni`` understands on its line."""

from __future__ import annotations

import argparse

from znni_dask.asking import Options
from znni_dask.devices.opening import AUTO, DEVICES
from znni_dask.geometry import Size, triple
from znni_dask.network.layers import FULL, PRECISIONS
from znni_dask.normalization import METHODS
from znni_dask.patches import BOUNDARIES
from znni_dask.storage.encoding import DTYPES
from znni_dask.storage.ngff import VERSIONS
from znni_dask.windows import WEIGHTS


def parser() -> argparse.ArgumentParser:
    """What the command understands; ``command`` is the name of the one that was given."""
    found = argparse.ArgumentParser(
        prog="znni",
        description="Trained 3D ConvNets applied to volumes far larger than memory.",
    )
    commands = found.add_subparsers(required=True, metavar="COMMAND", dest="command")
    info = commands.add_parser("info", help="show a network: geometry and layers")
    _add_network(info)
    info.add_argument(
        "--patchwise",
        type=_window,
        metavar="Z,Y,X",
        help="the windows to which the network is to be applied",
    )

    _add_infer(commands.add_parser("infer", help="apply a network to a volume"))
    _add_plan(commands.add_parser("plan", help="tell how a volume would be computed, and how fast"))
    check = commands.add_parser("verify", help="recompute random places of an output")
    _add_network(check)
    check.add_argument("input", help="the volume the output was made from")
    check.add_argument("output", help="the output of znni infer (path or URL)")
    check.add_argument("--places", type=int, default=8, metavar="N")
    check.add_argument("--size", type=_size, metavar="Z,Y,X", help="of a place (default 32³)")
    check.add_argument("--seed", type=int, default=0)
    check.add_argument("--threads", type=int, metavar="N")
    study = commands.add_parser(
        "measure", help="measure once how fast this machine is, for better plans"
    )
    study.add_argument("--threads", type=int, metavar="N")
    _add_worker(
        commands.add_parser(
            "worker", help="work for a dask cluster: a worker for every NUMA node of this machine"
        )
    )
    return found


def _add_infer(infer: argparse.ArgumentParser) -> None:
    _add_network(infer)
    _add_input(infer)
    infer.add_argument("output", help="OME-Zarr store to make (path or URL)")
    infer.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing output, or start an unfinished one anew",
    )
    infer.add_argument(
        "--timeline", metavar="FILE", help="when what was done, as Chrome and Perfetto show it"
    )
    infer.add_argument(
        "--html", metavar="FILE", help="a page with pictures of the run to make, too"
    )
    _add_options(infer)
    where = infer.add_argument_group("where it is computed (default: in this process)")
    either = where.add_mutually_exclusive_group()
    either.add_argument(
        "--workers", type=int, metavar="N", help="processes on this machine, which share it"
    )
    either.add_argument(
        "--scheduler", metavar="ADDRESS", help="of a dask cluster, like tcp://host:8786"
    )


def _add_worker(worker: argparse.ArgumentParser) -> None:
    worker.add_argument("scheduler", metavar="ADDRESS", help="of a scheduler, like tcp://host:8786")
    worker.add_argument("--memory", metavar="SIZE", help="bound for all workers here, like 12GiB")
    worker.add_argument("--threads", type=int, metavar="N", help="one worker with so many")
    worker.add_argument("--name", help="of the worker, as dask shows it")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    _add_network(plan)
    _add_input(plan)
    plan.add_argument("--format", choices=("table", "json"), default="table")
    plan.add_argument("--html", metavar="FILE", help="a page with pictures to make, too")
    plan.add_argument(
        "--cluster", metavar="FILE", help="what workers, store and scheduler there are to be (YAML)"
    )
    _add_options(plan)


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", help="volume: Zarr or OME-Zarr (path or URL), TIFF stack, file.h5:/dataset, .npy"
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    """How a network is to be applied, for running and for planning."""
    parser.add_argument("--boundary", choices=BOUNDARIES, default="reflect")
    parser.add_argument("--memory", metavar="SIZE", help="bound for the process, like 12GiB")
    parser.add_argument("--patch", type=_size, metavar="Z,Y,X", help="output computed at once")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument(
        "--device", choices=DEVICES, default=AUTO, help="that computes (default: the fastest)"
    )
    parser.add_argument("--device-memory", metavar="SIZE", help="bound for the GPU's memory")
    parser.add_argument(
        "--plan", metavar="FILE", help="what znni plan --format json told, perhaps edited"
    )
    parser.add_argument(
        "--axes", metavar="LETTERS", help="what the input's axes mean, out of tczyx"
    )
    parser.add_argument(
        "--channels", type=_numbers, metavar="C,…", help="the input's channels to use, from 0"
    )
    parser.add_argument("--level", metavar="N", help="resolution of an OME-Zarr image (default 0)")
    parser.add_argument(
        "--output",
        dest="outputs",
        action="append",
        metavar="NAME",
        help="an output of the network to compute (may be repeated; default all)",
    )
    parser.add_argument(
        "--roi", metavar="Z0:Z1,Y0:Y1,X0:X1", help="box of voxels wanted, like 9:,:,:64"
    )
    parser.add_argument(
        "--mask", metavar="PATH", help="volume of the input's size: wanted is where it is not zero"
    )
    parser.add_argument("--nan", type=float, metavar="VALUE", help="replaces NaN and infinity")
    _add_normalization(parser)
    _add_form(parser)
    _add_approximate(parser)


def _add_normalization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("normalisation, by statistics of the whole volume")
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


def _add_form(parser: argparse.ArgumentParser) -> None:
    """Options of how the output is stored."""
    group = parser.add_argument_group("how the output is stored")
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


def _add_approximate(parser: argparse.ArgumentParser) -> None:
    """Options that make the answer approximate."""
    group = parser.add_argument_group("approximate answers, only when asked for")
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


def asked(options: argparse.Namespace) -> Options:
    """How a network is to be applied."""
    return Options(
        boundary=options.boundary,
        memory=options.memory,
        patch=options.patch,
        threads=options.threads,
        device=options.device,
        device_memory=options.device_memory,
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
        plan=options.plan,
    )

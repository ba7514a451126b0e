"""The main job from end to end: a volume, a trained network, predictions as OME-Zarr.

    python examples/demo.py

generates an electron-microscopy-like volume of 256³ voxels with its true membranes, predicts the
cell boundaries with a trained network through the command line (`znni infer`), checks random
places (`znni verify`), compares the prediction with the truth, and draws all three.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import numpy as np

import sample
import score
from znni_dask import cli
from znni_dask.geometry import Box, Size
from znni_dask.storage.volume import open_volume

HERE = Path(__file__).parent
SECTION = 128  # of the volume, for the picture


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where results go")
    parser.add_argument("--size", type=int, default=256, help="edge of the volume in voxels")
    parser.add_argument("--network", default=str(HERE / "networks" / "boundary_valid.onnx"))
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    raw, truth, predicted = (folder / f"{n}.zarr" for n in ("raw", "membranes", "boundaries"))
    size: Size = (arguments.size,) * 3

    begin = time.perf_counter()
    sample.save(raw, truth, size, seed=1)
    print(f"generated {raw} and {truth} in {time.perf_counter() - begin:.0f} s", flush=True)
    infer = ["infer", arguments.network, str(raw), str(predicted), "--overwrite"]
    for command in (infer, ["verify", arguments.network, str(raw), str(predicted)]):
        print("$ " + shlex.join(["znni", *command]), flush=True)
        if code := cli.main(command):
            return code

    whole = Box((0, 0, 0), size)
    images = [open_volume(path).read(whole)[0] for path in (raw, truth, predicted)]
    reached = score.average_precision(images[2], images[1])
    print(f"average precision against the true membranes: {reached:.3f}")
    picture = folder / "boundaries.png"
    draw(images, picture)
    print(f"results: {predicted.resolve()}\npicture: {picture.resolve()}")
    return 0


def draw(images: list[np.ndarray], path: Path) -> None:
    """Raw, truth and prediction, in the plane of the sections and across them."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    z_to_x = sample.VOXEL_NANOMETERS[0] / sample.VOXEL_NANOMETERS[2]
    middle = min(SECTION, images[0].shape[0] - 1)
    across = images[0].shape[0] // 3
    figure, axes = pyplot.subplots(
        2, 3, figsize=(12, 7.2), layout="constrained", gridspec_kw={"height_ratios": [2, 1.25]}
    )
    for column, (image, title) in enumerate(
        zip(images, ("raw", "true membranes", "predicted boundaries"), strict=True)
    ):
        axes[0, column].imshow(image[middle], cmap="gray")
        axes[0, column].set_title(title)
        axes[1, column].imshow(image[:across, middle], cmap="gray", aspect=z_to_x)
    axes[0, 0].set_ylabel(f"y  (section z = {middle})")
    axes[1, 0].set_ylabel(f"z  (plane y = {middle})")
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())

"""How well the committed networks find membranes in real sections that they never saw.

    python examples/evaluate.py VOLUME.tif LABELS.tif

takes the training stack of the ISBI 2012 challenge (30 sections of Drosophila nerve cord, 4 × 4 ×
50 nm; Cardona et al. 2010, Arganda-Carreras et al. 2015), predicts all of it with both networks,
and prints average precision on the held-out sections 20-29 beside the best plain image filter.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import tifffile

import score
import znni_dask
from znni_dask.geometry import Box
from znni_dask.storage.volume import open_volume

HELD_OUT = slice(20, 30)
NETWORKS = Path(__file__).parent / "networks"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("volume", type=Path, help="TIFF stack of grey values")
    parser.add_argument("labels", type=Path, help="TIFF stack, 0 on membranes")
    arguments = parser.parse_args()
    truth = tifffile.imread(arguments.labels)[HELD_OUT] == 0
    source = open_volume(arguments.volume)
    whole = Box((0, 0, 0), source.size)
    best = score.best_baseline(source.read(whole)[0][HELD_OUT], truth)
    print(f"best filter ({best.name}, sigma {best.sigma:g}): {best.average_precision:.3f}")
    for network in sorted(NETWORKS.glob("*.onnx")):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "boundaries.zarr"
            znni_dask.run(network, arguments.volume, output)
            predicted = open_volume(output).read(whole)[0][HELD_OUT]
        print(f"{network.stem}: {score.average_precision(predicted, truth):.3f}")


if __name__ == "__main__":
    main()

"""Recipes of the documents, run as they stand but for places and sizes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from test_cluster import stored
from test_identity import assert_same

DOCUMENT = Path(__file__).parent.parent / "docs" / "cluster.md"
QUEUE = {  # what a queue does, here and at once
    "sbatch": 'setsid sh "$1" >/dev/null 2>&1 &\necho "Submitted batch job $!"',
    "scancel": 'kill -- "-$1"',
}


def test_a_cluster_of_slurm(files, tmp_path):
    places, want = files
    recipes = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (recipe,) = (code for code in recipes if "SLURMCluster" in code)
    for old, new in (
        ("cores=64", "cores=2"),
        ('memory="256GB"', f'memory="8GB", local_directory="{tmp_path}"'),
        ("cluster.scale(20)", "cluster.scale(2)"),
        ("network.onnx", places[0]),
        ("/data/raw.zarr", places[1]),
        ("/data/out.zarr", places[2]),
        ("client=client", "client=client, chunks=16, patch=16"),
    ):
        assert recipe.count(old) == 1, old
        recipe = recipe.replace(old, new)
    script, commands = tmp_path / "recipe.py", tmp_path / "bin"
    script.write_text(recipe)
    commands.mkdir()
    for name, body in QUEUE.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([sys.executable, script], env=os.environ | {"PATH": path}, check=True)
    assert_same(stored(places[2]), want)

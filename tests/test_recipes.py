"""Recipes of the documents, run as they stand but for places and sizes, by what stands in for a
queue, for Kubernetes and for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_cluster import stored
from test_identity import assert_same

DOCUMENT = Path(__file__).parent.parent / "docs" / "cluster.md"
COMMANDS = {  # what a queue does, here and at once
    # The script is read before sbatch returns: dask-jobqueue removes it then.
    "sbatch": """
job=$(cat "$1")
setsid sh -c "$job" >/dev/null 2>&1 &
echo "Submitted batch job $!"
""",
    "scancel": 'kill -- "-$1"',
}
MODULES = {
    "dask_kubernetes/operator.py": """
        from distributed import LocalCluster
        def make_cluster_spec(name, image, n_workers, resources):
            assert resources["limits"] == resources["requests"]
            return {"spec": {"worker": {"replicas": n_workers}}}
        def KubeCluster(custom_cluster_spec):
            return LocalCluster(custom_cluster_spec["spec"]["worker"]["replicas"])
    """,
    "dask_cuda.py": """
        from distributed import LocalCluster
        def LocalCUDACluster(threads_per_worker):
            return LocalCluster(2, threads_per_worker=threads_per_worker)
    """,
}
SMALLER = {
    'cores=64, processes=1, memory="256GB"': 'cores=2, processes=1, memory="8GB"',
    "scale(20)": "scale(2)",
    "n_workers=20": "n_workers=2",
    "client=client": "client=client, chunks=16, patch=16",
}


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """A folder to run in, where commands and modules are that stand in for others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name, body in MODULES.items():
        place = tmp_path / "modules" / name
        place.parent.mkdir(exist_ok=True, parents=True)
        place.write_text(re.sub(r"^ {8}", "", body, flags=re.MULTILINE))
    paths = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    for name, first in (("PATH", "bin"), ("PYTHONPATH", "modules")):
        monkeypatch.setenv(name, f"{tmp_path / first}{os.pathsep}{paths[name]}")
    monkeypatch.setenv("DASK_ZNNI__SIMULATED_GPU", "300MiB")


@pytest.mark.parametrize("cluster", ["SLURMCluster", "KubeCluster", "LocalCUDACluster"])
def test_a_recipe_makes_the_answer(cluster, files, apart):
    (network, volume, target), want = files
    recipes = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (recipe,) = (code for code in recipes if f"import {cluster}" in code)
    places = {"network.onnx": network, "raw.zarr": volume, "out.zarr": target}
    for old, new in SMALLER.items():
        recipe = recipe.replace(old, new)
    for name, place in places.items():
        recipe, count = re.subn(rf'"[^"]*{name}"', repr(place), recipe)
        assert count == 1
    Path("recipe.py").write_text(recipe)
    subprocess.run([sys.executable, "recipe.py"], check=True)
    assert_same(stored(target), want)

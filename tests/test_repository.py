"""The house keeps its rules: imports go down, one door, files in step."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import znni_dask

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "znni_dask"

# Every module or package may import only what stands below it.
STAIRS = [
    *(
        "cli",
        "arguments",
        "page",
        "report_cluster",
        "report",
        "outlook",
        "forecast",
        "inspection",
        "worker",
        "calibration",
        "verify",
        "xarray",
        "overlap",
        "volume",
        "coordinates",
        "graph",
        "lazy",
        "running",
        "refining",
        "asking",
        "making",
        "statistics",
        "passes",
        "pyramid",
        "feeding",
        "cluster",
        "journal",
        "recompute",
        "application",
        "job",
        "patchwise",
        "options",
    ),
    *("executors", "window_planner", "split_planner", "column_planner", "slabs", "planner"),
    *("lent", "shares", "resources", "reading"),
    *(
        "choices",
        "split",
        "apart",
        "pages",
        "columns",
        "cut",
        "knapsack",
        "costs",
        "schedule",
        "timings",
        "primitives",
        "devices",
        "kernels",
    ),
    *(
        "simulation",
        "tasks",
        "sketch",
        "turnstile",
        "timeline",
        "behind",
        "selection",
        "storage",
        "normalization",
        "windows",
        "patches",
        "plan",
        "machine",
        "importers",
    ),
    *("network", "geometry", "errors", "closing"),
]
HEAVY = {
    "onnx",
    "s3fs",
    "gcsfs",
    "hdf5plugin",
    "google",
    "torch",
    "matplotlib",
    "cupy",
    "h5py",
    "bokeh",
    "tifffile",
}
HEAVY_DOORS = {"onnx": ("importers/onnx/", "importers/to_onnx.py"), "google": ("importers/onnx/",)}


def modules():
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    place = STAIRS.index(own)
    if own == "report":
        return  # formats what run and verify return: it names their types only
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "znni_dask":
            assert len(parts) > 1, f"{path} imports the door"
            assert STAIRS.index(parts[1]) >= place, f"{path} imports {name}, which stands above it"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_come_in_by_their_own_door(path):
    relative = str(path.relative_to(PACKAGE))
    for name in imports(path, top_level_only=True):
        library = name.split(".")[0]
        if library in HEAVY:
            doors = HEAVY_DOORS.get(library, ())
            assert relative.startswith(doors), f"{relative} imports {library}"


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, znni_dask; print(' '.join(m.split('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_the_door_shows_these_names():
    assert sorted(znni_dask.__all__) == [
        *("Builder", "InputError", "MemoryLimitError", "Network", "NetworkError", "OptionError"),
        *("OutputError", "OverlapKernel", "RunError", "Summary", "VolumeError", "ZnniError"),
        *("geometry", "infer", "keep_annotations", "load_network", "overlap_kernel", "run"),
    ]
    for name in znni_dask.__all__:
        assert getattr(znni_dask, name).__doc__


def test_the_conda_environment_is_in_step():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "environment.yml").read_text()
    listed = re.findall(r"^      - ([^-\s].*)$", text, re.MULTILINE)
    assert listed == project["dependencies"]
    assert f"python{project['requires-python']}" in text


def test_every_target_of_the_makefile_that_ci_runs_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_readme_names_no_command_or_file_that_is_not_there():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w[\w-]*)", text)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in set(re.findall(r"\b(?:examples|benchmarks|docs|tests)/[\w/.-]+\w", text)):
        assert (ROOT / name).exists(), name


def test_files_and_functions_stay_readable():
    for path in modules():
        lines = path.read_text().splitlines()
        assert len(lines) <= 420, f"{path} has {len(lines)} lines"
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
                length = (node.end_lineno or 0) - first.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"

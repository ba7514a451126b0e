"""Fixtures that several files share."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import zarr
from distributed import Client
from hypothesis import settings

import cuda_source
import graphs
from held import Held
from test_identity import at_once
from znni_dask import column_planner, costs, job, planner, split_planner
from znni_dask.devices.simulated import SimulatedDevice
from znni_dask.errors import MemoryLimitError
from znni_dask.importers.to_onnx import to_onnx

collect_ignore = ["data"]  # what makes it needs TensorFlow


def pytest_addoption(parser):
    parser.addoption(
        "--kills", type=int, metavar="N", help="how often runs are killed at random (default: few)"
    )
    parser.addoption("--thorough", action="store_true", help="what repeats much of others, too")


def pytest_configure(config):
    """Examples that are drawn are the same ones every time, unless it is to be ``thorough``."""
    if not config.getoption("--thorough"):
        settings.register_profile("the same", derandomize=True)
        settings.load_profile("the same")


def pytest_collection_modifyitems(config, items):
    """Leave out what is ``thorough``, unless it is asked for, and of the cases of what says
    ``every`` n all but the n-th ones."""
    if config.getoption("--thorough"):
        return
    repeating, cases = set(), Counter()
    for item in items:
        every = item.get_closest_marker("every")
        case = cases[item.path, item.name.partition("[")[0]]
        if item.get_closest_marker("thorough"):
            repeating.add(item)
            continue
        cases[item.path, item.name.partition("[")[0]] += 1
        if every and case % every.args[0]:
            repeating.add(item)
    config.hook.pytest_deselected(items=[*repeating])
    items[:] = [item for item in items if item not in repeating]


@pytest.fixture(autouse=True, scope="session")
def not_measured(tmp_path_factory):
    """Plans are those of a machine of which nothing was measured, whatever this one is; those of
    other processes, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZNNI_TIMINGS", str(tmp_path_factory.mktemp("timings") / "none.json"))
        yield


@pytest.fixture
def kills(request):
    """How often runs are to be killed, if that was said."""
    return request.config.getoption("--kills")


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch's threads cost more than they bring for volumes as small as those of tests."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device():
    """What primitives of a GPU are tried on; `test_gpu` has a GPU for it, and for what follows."""
    with SimulatedDevice(1 << 30) as found:
        yield found


@pytest.fixture
def launch():
    """Runs a kernel's CUDA source on numpy's arrays, as `Device.launch` would."""
    return cuda_source.emulated


@pytest.fixture
def check(launch):
    """Runs a kernel, and compares what it makes with what the same in numpy makes."""
    return partial(cuda_source.check, launch, 1e-6)


@pytest.fixture
def check_compiles():
    """Compiles a kernel for GPUs that are not there."""
    return cuda_source.check_compiles


@pytest.fixture(scope="session")
def client():
    """One in-process cluster for all runs; two blocks at a time."""
    loopback = "127.0.0.1:0"
    with Client(
        processes=False,
        n_workers=1,
        threads_per_worker=2,
        memory_limit=0,
        dashboard_address=loopback,
        worker_dashboard_address=loopback,
    ) as local:
        yield local


@pytest.fixture
def slabs_alone(monkeypatch):
    """No plan is made in patches; calls of primitives and copies cost nothing; slabs are so thin
    that columns of small volumes are several blocks."""

    def nothing(*_):
        raise MemoryLimitError("no patches here")

    for module in (planner, split_planner):
        monkeypatch.setattr(module, "search", nothing)
    monkeypatch.setattr(column_planner, "_THICKNESSES", (1, 2, 4, 8))
    for name in ("STEP_SECONDS", "PIECE_SECONDS"):
        monkeypatch.setattr(costs, name, 0.0)


@pytest.fixture
def devices(monkeypatch):
    """Simulated devices that runs open, which may be lost."""
    opened = []

    def keep(allowed):
        opened.append(Held(allowed))
        return opened[-1]

    monkeypatch.setattr(job, "opened", keep)
    return opened


@pytest.fixture
def files(tmp_path):
    """A network, a volume and a place for the answer; and the answer."""
    network = graphs.graph("chain", 1)
    values = np.random.default_rng(0).standard_normal((network.in_channels, 40, 40, 40))
    values = values.astype(np.float32)
    zarr.create_array(tmp_path / "in.zarr", data=values, chunks=(1, 16, 16, 16))
    (tmp_path / "network.onnx").write_bytes(to_onnx(network).SerializeToString())
    places = [str(tmp_path / name) for name in ("network.onnx", "in.zarr", "out.zarr")]
    return places, at_once(network, values, "reflect")

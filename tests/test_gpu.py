"""On a GPU: the device keeps the contract of all, its kernels and primitives make what others show
on a simulated one, within the memory predicted and in whole float32 (make gpu-test)."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import zarr
from test_cuda import (  # noqa: F401 - collected here, with the fixtures below
    test_lines_of_every_length_are_transformed,
    test_paging,
    test_pooling,
    test_tiles_are_transformed,
    test_tiles_are_transformed_back,
    test_weaving,
)
from test_cuda_values import (  # noqa: F401
    test_functions_of_values,
    test_functions_with_numbers_of_channels,
    test_values_are_fetched,
    test_values_are_interpolated,
)
from test_device_columns import in_slabs
from test_devices import (  # noqa: F401
    same_size,
    test_threads_that_ask_at_once_get_their_own_answers,
)
from test_gpu_conv_cudnn import LAYER, SHAPE, applied, wanted
from test_gpu_pieces import (  # noqa: F401
    test_inputs_may_be_larger_than_what_is_looked_at,
    test_pieces_of_any_size_are_the_same,
)
from test_gpu_primitives import (  # noqa: F401
    CASES,
    fetched,
    test_any_box_of_the_output_equals_the_oracle,
    test_in_place_gives_the_same,
    test_raw_grey_values_lose_little_by_transforms,
    test_tiles_are_computed_in_batches_of_any_size,
    test_woven_fragments_lie_interleaved_and_leave_other_places_alone,
)

import cuda_source
import graphs
import znni_dask
from layer import Point
from test_identity import assert_same, at_once, in_patches, volume_for
from test_primitives import LAYERS, SIZE, cut, inputs_of, problem_of, weights_of
from znni_dask.choices import choose_primitives
from znni_dask.devices.cuda import CudaDevice
from znni_dask.devices.opening import Wanted, gpu_of, opened
from znni_dask.errors import DeviceError, OptionError
from znni_dask.geometry import Box
from znni_dask.kernels.cuda.kernel import Kernel
from znni_dask.machine import GPU
from znni_dask.network.layers import LOWER, Conv
from znni_dask.patches import Layout
from znni_dask.primitives import conv_torch
from znni_dask.primitives.gpu.conv_cudnn import TENSOR, GpuConvCudnn
from znni_dask.primitives.gpu.conv_direct import GpuConvDirect
from znni_dask.primitives.gpu.conv_fft_tiles import GpuTiledFFT
from znni_dask.primitives.gpu.conv_fft_whole import GpuConvWholeFFT
from znni_dask.primitives.table import candidates, named

WHY = gpu_of(Wanted(GPU)).why
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY), reason=WHY or "there is a GPU")]
MIB = 1 << 20
ROUNDED_BYTES = 64 << 10  # that arrays of a few bytes take, of which each has a piece of its own
TOLERANCE = 4e-6  # functions of CUDA are exact to some units in the last place
LINES = """
extern "C" __global__ void lines(float *x, long long n, float by)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        for (int turn = 0; turn < 1000; turn++)
            x[i] = x[i] * by + 1;
}
"""


@pytest.fixture
def device():
    """The GPU, of whose memory little is taken."""
    with CudaDevice(6 << 30) as found:
        yield found


@pytest.fixture
def emulated(device):
    """The GPU: nothing is to be emulated."""
    return device


@pytest.fixture
def launch(device):
    """Runs a kernel on the GPU, on copies of numpy's arrays."""

    def launched(kernel, blocks, *arguments):
        there = {id(a): device.put(a) for a in arguments if isinstance(a, np.ndarray)}
        given = [there.get(id(a), a) for a in arguments]
        device.lanes.compute.do(lambda: device.launch(kernel, blocks, *given)).wait()
        for before, after in zip(arguments, given, strict=True):
            if isinstance(before, np.ndarray):
                before[...] = fetched(device, after)

    return launched


@pytest.fixture
def check(launch):
    """Runs a kernel on the GPU, and compares what it makes."""
    return partial(cuda_source.check, launch, TOLERANCE)


@pytest.fixture
def check_compiles():
    """Compiles nothing: it runs."""
    return lambda kernel, spilled_bytes=0: None


def multiplied(device, turns=40, size=4096):
    """Work for a lane that takes a while."""
    a = device.put(np.ones((size, size), np.float32))
    out = device.put(np.zeros((size, size), np.float32))

    def work():
        for _ in range(turns):
            device.xp.matmul(a, a, out=out)

    return work


# ---- the device


def test_the_gpu_is_found_and_opened():
    found = gpu_of(Wanted(GPU))
    assert found.name
    assert found.free_bytes > 1 << 30
    with opened(64 * MIB) as device:
        assert isinstance(device, CudaDevice)
        assert (device.name, device.allowed_bytes) == (found.name, 64 * MIB)


def test_no_more_is_held_than_is_allowed():
    with CudaDevice(64 * MIB) as device:
        first = device.empty(40 * MIB)
        with pytest.raises(DeviceError, match=r"no room left of the 64 MiB"):
            device.empty(40 * MIB)
        part = first[MIB : 2 * MIB].view(np.float32)
        del first
        with pytest.raises(DeviceError):
            device.empty(40 * MIB)  # a part of it is still in use
        del part
        assert device.empty(64 * MIB).nbytes == 64 * MIB


def test_a_kernel_that_wants_what_there_is_not_is_told_of():
    with CudaDevice(64 * MIB) as device:
        greedy = Kernel("lines", LINES, lambda *told: None, 1024, 1 << 20)
        x = device.put(np.zeros(8, np.float32))
        with pytest.raises(DeviceError, match="failed"):
            device.lanes.compute.do(lambda: device.launch(greedy, 1, x, 8, 1.0)).wait()
        assert (fetched(device, x) == 0).all()  # it goes on


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, np.int64, np.uint8])
def test_copies_there_and_back_are_the_same(device, dtype):
    want = np.random.default_rng(0).integers(0, 200, (3, 5, 7)).astype(dtype)
    there = device.put(want)
    assert there.shape == want.shape
    np.testing.assert_array_equal(fetched(device, there), want)
    np.testing.assert_array_equal(fetched(device, device.put(want.T)), want.T)


def test_scratch_memory_is_handed_out_again(device):
    first = device.scratch(MIB)
    assert device.scratch(1000).data.ptr == first.data.ptr
    assert device.scratch_bytes == MIB
    assert device.scratch(2 * MIB).nbytes == device.scratch_bytes == 2 * MIB


def test_lanes_wait_for_marks_of_others(device):
    """Else the copy would be there before what it copies is computed."""
    n = 1 << 22
    kernel = Kernel("lines", LINES, lambda *told: None, 256)
    x = device.put(np.zeros(n, np.float32))
    here = device.pinned(x.nbytes)
    for turn in range(1, 4):
        done = device.lanes.compute.do(lambda: device.launch(kernel, n // 256, x, n, 1.0))
        copied = partial(device.copy, here, x.view(np.uint8))
        device.lanes.down.do(copied, after=[done]).wait()
        assert (here.view(np.float32) == 1000 * turn).all()


def test_what_is_asked_for_goes_on_meanwhile(device):
    work = multiplied(device)
    device.lanes.compute.do(work).wait()
    begin = time.perf_counter()
    mark = device.lanes.compute.do(work)
    asked = time.perf_counter() - begin
    mark.wait()
    assert asked < 0.5 * (time.perf_counter() - begin)


def test_times_of_marks_are_those_of_the_gpu(device):
    work = multiplied(device)
    device.lanes.compute.do(work).wait()
    begin = time.perf_counter()
    first = device.lanes.compute.do(lambda: None)
    last = device.lanes.compute.do(work)
    last.wait()
    wall = time.perf_counter() - begin
    assert 0.3 * wall < last.seconds_since(first) <= 1.05 * wall


def test_a_device_that_is_closed_gives_its_memory_back():
    import cupy

    def free():
        cupy.cuda.Device(0).synchronize()
        return cupy.cuda.runtime.memGetInfo()[0]

    with CudaDevice(1 << 30) as device:
        device.put(np.ones(8, np.float32))  # what CUDA takes for itself is taken
        before = free()
    with CudaDevice(1 << 30) as device:
        held = device.empty(600 * MIB)
        device.scratch(300 * MIB)
        assert before - free() > 850 * MIB
        del held
    assert before - free() < 64 * MIB


def test_tensor_cores_that_were_asked_for_by_the_environment_are_refused(monkeypatch):
    monkeypatch.setenv("CUPY_TF32", "1")
    with pytest.raises(OptionError, match="CUPY_TF32"):
        CudaDevice(MIB)


# ---- primitives: memory and precision


def held_by(work):
    """The most that CuPy's pool held for what was called, and what plans of cuFFT hold of it
    after that."""
    import cupy

    class Held(cupy.cuda.MemoryHook):
        name = "held"
        held = peak = 0

        def malloc_postprocess(self, **told):
            self.held += told["mem_size"] if told["mem_ptr"] else 0
            self.peak = max(self.peak, self.held)

        def free_postprocess(self, **told):
            self.held -= told["mem_size"]

    cache = cupy.fft.config.get_plan_cache()
    cache.clear()
    with Held() as hook:
        work()
    return hook.peak, sum(node.memsize for _, node in cache)


@pytest.mark.parametrize(("label", "name"), CASES)
def test_memory_measured_stays_within_memory_predicted(label, name):
    """What torch takes is measured below; plans of cuFFT keep what they work in."""
    layer, count = LAYERS[label]
    primitive, random = named(name, layer, GPU), np.random.default_rng(5)
    channels, arrays = inputs_of(layer, count, random, batch=1)
    size = SIZE if label.startswith("whole") else (16, 40, 60)
    shapes = [(1, a.shape[1], *(size if a.shape[-1] > 1 else (1, 1, 1))) for a in arrays]
    n = [layer.window(axis).size(size[axis]) for axis in range(3)]
    if primitive.fragments:
        n = [k - 1 for k in n]
    problem, parts = problem_of(layer, primitive, 1, channels, size, Box((0, 0, 0), tuple(n)))
    weights = weights_of(layer, random)
    with CudaDevice(2 << 30) as device:
        prepared = []
        peak, _ = held_by(lambda: prepared.append(primitive.placed(layer, weights, device)))
        assert peak <= primitive.prepared_bytes(layer) + ROUNDED_BYTES
        ones = [np.ascontiguousarray(cut(np.ones(shape, np.float32), parts)) for shape in shapes]
        given = [device.put(array) for array in ones]
        out = device.empty(4 * int(np.prod(problem.output))).view(np.float32)
        out = out.reshape(problem.output)

        def work():
            primitive.apply(prepared[0], problem, given, out, device)

        peak, planned = held_by(lambda: device.lanes.compute.do(work).wait())
    assert peak <= primitive.workspace_bytes(problem, threads=1) + planned + ROUNDED_BYTES


POINTS = [
    Point(Conv(80, 80, (3, 3, 3), relu=True), 80, 66),
    Point(Conv(80, 80, (7, 7, 7), relu=True), 80, 66),
    Point(Conv(1, 80, (5, 5, 5), relu=True), 1, 130),
    Point(Conv(80, 3, (3, 3, 3), relu=True), 80, 66),
]


def computed(primitive, point, device):
    """What a primitive makes of a point."""
    prepared = primitive.placed(point.layer, point.weights, device)
    given, out = device.put(point.x), device.empty(4 * int(np.prod(point.output)))
    out = out.view(np.float32).reshape(point.output)

    def work():
        primitive.apply(prepared, point.problem, [given], out, device)

    device.lanes.compute.do(work).wait()
    return fetched(device, out)


def exact(point, box):
    """Some outputs of a point, in double precision."""
    import torch

    x = point.x[:, :, *(slice(0, n + k - 1) for n, k in zip(box, point.layer.kernel, strict=True))]
    weight, bias = (torch.from_numpy(point.weights[key]).double() for key in ("weight", "bias"))
    made = torch.nn.functional.conv3d(torch.from_numpy(x).double(), weight, bias)
    return np.maximum(made.numpy(), 0)


@pytest.mark.skipif(not conv_torch.installed(), reason="PyTorch is not installed")
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.name}, {point.size}")
def test_layers_of_full_size_are_exact_to_float32(point, device):
    """By all primitives, whatever torch was told: ten bits less are a thousand times the error."""
    import torch

    want, before = exact(point, (4, 4, 4)), torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    tiles = [GpuTiledFFT((n, n, n)) for n in (16, 24, 32)]
    errors = {}
    try:
        for primitive in (GpuConvDirect(), GpuConvWholeFFT(), GpuConvCudnn(), *tiles):
            made = computed(primitive, point, device)[:, :, :4, :4, :4]
            errors[primitive.name] = np.linalg.norm(made - want) / np.linalg.norm(want)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.skipif(not conv_torch.installed(), reason="PyTorch is not installed")
def test_lower_precision_is_as_precise_as_it_says(device):
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    want = wanted(LAYER, x)
    asked = replace(LAYER, precision=LOWER)
    errors = {}
    for primitive in (GpuConvCudnn(), GpuConvCudnn(TENSOR), GpuConvCudnn(LOWER)):
        made = fetched(device, applied(primitive, asked, x, device))
        errors[primitive.precision] = np.linalg.norm(made - want) / np.linalg.norm(want)
    assert errors["float32"] < 5e-6, errors
    assert errors[TENSOR] < 2e-3, errors
    assert 1e-4 < errors[LOWER] < 1e-2, errors


@pytest.mark.skipif(not conv_torch.installed(), reason="PyTorch is not installed")
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.name}, {point.size}")
def test_what_torch_takes_stays_within_what_is_predicted(point, device):
    import torch

    primitive = GpuConvCudnn()
    computed(primitive, point, device)  # what libraries take once is taken
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    computed(primitive, point, device)
    taken = torch.cuda.max_memory_allocated() - before
    predicted = primitive.workspace_bytes(point.problem, 1) + primitive.prepared_bytes(point.layer)
    assert taken + device.scratch_bytes <= predicted + 2 * MIB


# ---- networks


@pytest.mark.parametrize(("family", "seed"), graphs.HALF)
def test_patches_of_every_graph_equal_the_oracle(family, seed):
    network = graphs.graph(family, seed)
    volume = volume_for(network, seed)
    with CudaDevice(1 << 30) as device:
        got = in_patches(network, volume, "reflect", (9, 10, 13), device=device)
    assert_same(got, at_once(network, volume, "reflect"))


@pytest.mark.parametrize(("family", "seed"), [("chain", 0), ("unet", 2), ("residual", 1)])
def test_slabs_equal_the_oracle(family, seed):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    with CudaDevice(1 << 30) as device:
        got = in_slabs(network, volume, "reflect", (99, 24, 32), 3, device)
    assert_same(got, at_once(network, volume, "reflect"))


@pytest.mark.parametrize("name", ["tiled", "whole fft", "cudnn"])
@pytest.mark.parametrize(("family", "seed"), [("chain", 1), ("unet", 2), ("residual", 1)])
def test_patches_by_every_convolution_equal_the_oracle(family, seed, name):
    network = graphs.graph(family, seed)
    volume = volume_for(network, seed)
    tiled = GpuTiledFFT((10, 15, 28))
    chosen = choose_primitives(Layout(network, volume.shape[1:], "reflect"), device=GPU)
    for node in network:
        if isinstance(node.layer, Conv):
            found = [*candidates(node.layer, GPU), tiled]
            asked = [p for p in found if p.name.startswith(name) and not p.refusal(node.layer)]
            chosen[node.name] = [*asked, chosen[node.name]][0]
    with CudaDevice(1 << 30) as device:
        got = in_patches(network, volume, "reflect", (9, 14, 21), chosen, device=device)
    assert_same(got, at_once(network, volume, "reflect"))


@pytest.mark.parametrize("make", [same_size, lambda: graphs.graph("chain", 0)])
def test_a_run_on_the_gpu_makes_what_one_on_the_cpu_makes(make, tmp_path):
    random = np.random.default_rng(1)
    source = tmp_path / "in.npy"
    np.save(source, random.standard_normal((40, 50, 60)).astype(np.float32))
    how = {"chunks": 16, "patch": 16, "threads": 2}
    made = {
        device: znni_dask.run(make(), source, tmp_path / f"{device}.zarr", device=device, **how)
        for device in ("cpu", "gpu")
    }
    assert made["gpu"].plan.device == "gpu"
    want, got = (zarr.open_array(tmp_path / f"{d}.zarr" / "0", mode="r")[:] for d in made)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * want.std())


def test_a_device_serves_threads_that_come_and_go(device):
    """Of every thread the work is done on the GPU, in its pool's memory."""
    want = np.arange(1000, dtype=np.float32)

    def turned(_):
        there = device.put(want)
        device.lanes.compute.do(lambda: device.xp.multiply(there, 2, out=there)).wait()
        return threading.get_ident(), fetched(device, there)

    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            for _, made in pool.map(turned, range(8)):
                np.testing.assert_array_equal(made, 2 * want)

"""What a GPU is asked for through CuPy, on one that is imagined: every call is one that CuPy has,
and kernels are run from their CUDA source."""

from __future__ import annotations

import sys

import cupy_words
import dask
import numpy as np
import pytest
from test_device_columns import in_slabs

import graphs
from test_identity import assert_same, at_once, in_patches, volume_for
from znni_dask.devices import cuda, opening
from znni_dask.devices.cuda import CudaDevice
from znni_dask.devices.opening import Wanted, gpu_of, gpus
from znni_dask.errors import DeviceError, OptionError
from znni_dask.machine import GPU

MIB = 1 << 20


@pytest.fixture
def imagined(monkeypatch):
    def imagine(**how):
        module = cupy_words.cupy(**how)
        monkeypatch.setitem(sys.modules, "cupy", module)
        monkeypatch.setattr(opening, "find_spec", lambda name: "there")
        cuda._function.cache_clear()
        return module

    yield imagine
    cuda._function.cache_clear()


@pytest.mark.parametrize(("family", "seed"), [("chain", 0), ("unet", 0), ("branches", 0)])
def test_patches_equal_the_oracle(family, seed, imagined):
    imagined()
    network = graphs.graph(family, seed)
    volume = volume_for(network, seed)
    with CudaDevice(256 * MIB) as device:
        got = in_patches(network, volume, "reflect", (16, 18, 20), device=device)
    assert_same(got, at_once(network, volume, "reflect"))
    assert device._pool.freed


@pytest.mark.parametrize(("family", "seed"), [("chain", 0), ("unet", 2)])
def test_slabs_equal_the_oracle(family, seed, imagined):
    imagined()
    network = graphs.graph(family, seed)
    volume = volume_for(network, seed)
    with CudaDevice(256 * MIB) as device:
        got = in_slabs(network, volume, "reflect", (99, 24, 32), 3, device)
    assert_same(got, at_once(network, volume, "reflect"))
    assert device._pool.freed


def test_a_gpu_whose_blocks_have_too_little_shared_memory_is_told_of(imagined):
    imagined(shared_bytes=99 << 10)
    found = gpu_of(Wanted("gpu"))
    assert not found.name
    assert "lets a block of threads share 99 KiB, and tiles take up to 163 KiB" in found.why


def test_what_is_put_there_comes_back(imagined):
    imagined()
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    with CudaDevice(MIB) as device:
        there, here = device.put(values), device.pinned(values.nbytes)
        assert isinstance(there, device.xp.ndarray)
        memory = there.reshape(-1).view(np.uint8)
        first = device.lanes.up.do(lambda: None)
        last = device.lanes.down.do(lambda: device.copy(here, memory), after=[first])
        last.wait()
        assert last.seconds_since(first) >= 0
        assert device.lanes.down._stream.waited == [first.event]
    np.testing.assert_array_equal(here.view(np.float32), values.reshape(-1))
    assert device.name == cupy_words.NAME


def test_memory_is_bounded_and_its_lack_is_told(imagined):
    imagined()
    with CudaDevice(MIB) as device:
        device.empty(MIB // 2)
        with pytest.raises(DeviceError, match=r"imagined GPU has no room left of the 1 MiB"):
            device.lanes.compute.do(lambda: device.scratch(MIB))


def test_a_gpu_that_fails_is_told_of(imagined):
    module = imagined()
    with CudaDevice(MIB) as device:

        def fail():
            raise module.cuda.runtime.CUDARuntimeError("cudaErrorIllegalAddress")

        with pytest.raises(DeviceError, match="imagined GPU failed: cudaErrorIllegalAddress"):
            device.lanes.compute.do(fail)


def test_the_first_gpu_is_found_with_what_is_free_there(imagined, monkeypatch):
    imagined(devices=2, free=100 * MIB)
    found = gpu_of(Wanted(GPU))
    assert (found.name, found.free_bytes, found.known_by) == (
        cupy_words.NAME,
        100 * MIB,
        "01" * 16,
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert gpus() == ["5", "GPU-7"]
    with dask.config.set({"znni.simulated-gpu": "1GiB"}):
        assert gpus() == ["simulated"]


def test_where_there_is_none_it_is_told_why(imagined):
    imagined(devices=0)
    assert "CUDA shows no GPU (cudaErrorNoDevice" in gpu_of(Wanted(GPU)).why
    assert gpus() == []


def test_products_in_less_than_float32_are_refused(imagined, monkeypatch):
    imagined()
    monkeypatch.setenv("CUPY_TF32", "1")
    with pytest.raises(OptionError, match="CUPY_TF32"):
        CudaDevice(MIB)

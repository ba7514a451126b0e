"""Convolution by cuDNN: on the device's own arrays, as precisely as was asked for."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from test_primitives import expected, weights_of
from znni_dask.devices.simulated import SimulatedDevice
from znni_dask.errors import OptionError
from znni_dask.network.layers import LOWER, Conv
from znni_dask.primitives import conv_torch
from znni_dask.primitives.base import GPU, Problem
from znni_dask.primitives.gpu import conv_cudnn
from znni_dask.primitives.gpu.conv_cudnn import TENSOR, GpuConvCudnn
from znni_dask.primitives.table import candidates

SAME = ((1, 1, 1), (1, 1, 1))
LAYER = Conv(20, 24, (3, 3, 3), padding=SAME)
SHAPE = (2, 20, 6, 9, 14)


def applied(primitive, layer, x, device):
    shape = (len(x), layer.out_channels, *x.shape[2:])
    problem = Problem(layer, (x.shape,), shape, ((-1, -1, -1),), (0, 0, 0), x.shape[2:])
    prepared = primitive.placed(layer, weights_of(layer, np.random.default_rng(0)), device)
    given = device.put(x)
    out = device.put(np.full(shape, np.nan, np.float32))
    device.lanes.compute.do(lambda: primitive.apply(prepared, problem, [given], out, device)).wait()
    return out


def wanted(layer, x):
    return expected(layer, [x], weights_of(layer, np.random.default_rng(0)))


def test_without_torch_it_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(conv_torch, "installed", lambda: False)
    assert "pip install 'znni_dask[torch]'" in GpuConvCudnn().refusal(LAYER)
    assert not any(isinstance(p, GpuConvCudnn) for p in candidates(LAYER, GPU))


def test_a_torch_that_knows_of_no_gpu_is_refused():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this one does")
    device = SimpleNamespace(xp=SimpleNamespace(cuda=None))
    with pytest.raises(OptionError, match="cannot use this GPU"):
        GpuConvCudnn().placed(LAYER, {}, device)


def test_lower_precision_is_computed_only_where_it_is_asked_for():
    lower = {GpuConvCudnn(TENSOR), GpuConvCudnn(LOWER)}
    assert not lower & set(candidates(LAYER, GPU))
    assert all("float32" in primitive.refusal(LAYER) for primitive in lower)
    asked = replace(LAYER, precision=LOWER)
    assert {GpuConvCudnn(), *lower} <= set(candidates(asked, GPU))
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    want = wanted(LAYER, x)
    with SimulatedDevice(1 << 30) as device:
        errors = {
            primitive.precision: np.linalg.norm(applied(primitive, asked, x, device) - want)
            / np.linalg.norm(want)
            for primitive in (GpuConvCudnn(), *lower)
        }
    assert errors["float32"] < 1e-6
    assert 1e-4 < errors[LOWER] < 1e-2  # eight bits of the values and of the weights


@pytest.fixture
def told():
    """What cuDNN is told of precision; it is told the same after the test."""
    import torch

    before = torch.backends.cudnn.conv.fp32_precision
    yield torch.backends.cudnn.conv
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize(("primitive", "says"), [("float32", "ieee"), (TENSOR, "tf32")])
@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_float32_is_float32_whatever_torch_was_told(primitive, says, before, told, monkeypatch):
    import torch

    seen, conv3d = [], torch.nn.functional.conv3d

    def noted(*given):
        seen.append(told.fp32_precision)
        return conv3d(*given)

    monkeypatch.setattr(torch.nn.functional, "conv3d", noted)
    told.fp32_precision = before
    x = np.ones((1, *SHAPE[1:]), np.float32)
    with SimulatedDevice(1 << 30) as device:
        applied(GpuConvCudnn(primitive), replace(LAYER, precision=LOWER), x, device)
    assert seen == [says]
    assert told.fp32_precision == before


def test_what_went_wrong_leaves_no_trace(told, monkeypatch):
    import torch

    def fail(*given):
        raise RuntimeError("no algorithm")

    monkeypatch.setattr(torch.nn.functional, "conv3d", fail)
    told.fp32_precision = "tf32"
    with SimulatedDevice(1 << 30) as device, pytest.raises(RuntimeError, match="no algorithm"):
        applied(GpuConvCudnn(), LAYER, np.ones(SHAPE, np.float32), device)
    assert told.fp32_precision == "tf32"
    assert torch.is_grad_enabled()


def test_nothing_is_copied_where_padding_is_the_same_on_both_sides(monkeypatch):
    import torch

    seen, conv3d = [], torch.nn.functional.conv3d

    def noted(x, *given):
        seen.append((x.data_ptr(), given[3]))
        return conv3d(x, *given)

    monkeypatch.setattr(torch.nn.functional, "conv3d", noted)
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    with SimulatedDevice(1 << 30) as device:
        given = []
        put = device.put
        monkeypatch.setattr(device, "put", lambda array: given.append(put(array)) or given[-1])
        applied(GpuConvCudnn(), LAYER, x, device)
    places = [next(a for a in given if a.shape == SHAPE)[s].ctypes.data for s in range(2)]
    assert seen == [(place, (1, 1, 1)) for place in places]


def test_it_works_in_the_stream_of_the_arrays(monkeypatch):
    import torch

    told = []

    @contextmanager
    def stream(here):
        told.append(("begun", here))
        yield
        told.append(("ended", here))

    cuda = SimpleNamespace(
        get_current_stream=lambda: SimpleNamespace(ptr=77), Device=lambda: SimpleNamespace(id=1)
    )
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda ptr, device: (ptr, device))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    with conv_cudnn._stream(SimpleNamespace(xp=SimpleNamespace(cuda=cuda))):
        assert told == [("begun", (77, 1))]
    assert told[1:] == [("ended", (77, 1))]

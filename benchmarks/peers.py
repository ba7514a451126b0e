"""What others make of one layer: PyTorch, ONNX Runtime, OpenVINO, on exactly so many threads.

Each gets the same weights and the same values; arrays that it can be handed stand ready before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from layer import Point
from znni_dask.importers.to_onnx import to_onnx
from znni_dask.network.build import Builder
from znni_dask.network.layers import Conv
from znni_dask.primitives.base import Array

Call = Callable[[], object]
LIBRARIES = ("torch", "onnxruntime", "openvino")
_FORMATS = {"": torch.contiguous_format, " channels last": torch.channels_last_3d}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt


class Peers:
    """One layer by every peer. ``calls`` by name, ``reasons`` why others cannot compute it; the
    names of those that compute in bfloat16 end in ``bf16``. Of all peers, or ``only`` some."""

    def __init__(self, point: Point, threads: int, only: Collection[str] = ()) -> None:
        self.calls: dict[str, Call] = {}
        self.reasons: dict[str, str] = {}
        self._answers: dict[str, Callable[[], Array]] = {}
        _keep_freed_memory()
        for name, make in _MADE.items():
            if only and name not in only:
                continue
            try:
                call, answer = make(point, threads)
                call()
            except (ImportError, RuntimeError) as error:
                self.reasons[name] = str(error).strip().splitlines()[0]
            else:
                self.calls[name], self._answers[name] = call, answer

    def differences(self, own: Array) -> dict[str, float]:
        """Relative L2 difference of every peer's answer from the project's own."""
        scale = np.linalg.norm(own)
        return {
            name: float(np.linalg.norm(answer() - own) / scale)
            for name, answer in self._answers.items()
        }


def versions() -> dict[str, str | None]:
    """Of every peer's library; None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _keep_freed_memory() -> None:
    """What a peer frees is kept for its next answer, lest it waits for fresh pages each time."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


def _torch(
    point: Point, threads: int, memory: torch.memory_format, dtype: torch.dtype
) -> tuple[Call, Callable[[], Array]]:
    layer = point.layer
    torch.set_num_threads(threads)
    arrays = [torch.from_numpy(a) for a in (point.x, point.weights["weight"])]
    x, weight = (a.to(dtype).contiguous(memory_format=memory) for a in arrays)
    bias = torch.from_numpy(point.weights["bias"]).to(dtype)
    low, _ = layer.padding
    if isinstance(layer, Conv):
        operator = torch.nn.functional.conv3d
        options = (layer.stride, low, layer.dilation, layer.groups)
    else:
        operator = torch.nn.functional.conv_transpose3d
        options = (layer.stride, low, (0, 0, 0), layer.groups, layer.dilation)
    relu = isinstance(layer, Conv) and layer.relu

    def call() -> torch.Tensor:
        with torch.inference_mode():
            made = operator(x, weight, bias, *options)
            return made.relu_() if relu else made

    return call, lambda: call().to(torch.float32).contiguous().numpy()


def _model(point: Point) -> bytes:
    """The layer as an ONNX file."""
    builder = Builder(point.channels)
    builder.add(point.layer, builder.input, name="y", weights=point.weights)
    return to_onnx(builder.network("y")).SerializeToString()


def _onnxruntime_session(model: bytes, threads: int) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except (state.Fail, state.InvalidGraph, state.NotImplemented) as error:
        raise RuntimeError(str(error)) from None


def _openvino_request(model: bytes, shape: tuple[int, ...], threads: int) -> Any:
    import openvino

    core = openvino.Core()
    read = core.read_model(model)
    read.reshape(list(shape))
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    return core.compile_model(read, "CPU", options).create_infer_request()


def sessions(
    model: bytes, shape: tuple[int, ...], threads: int
) -> dict[str, Callable[[Array], Array]]:
    """An ONNX file of one input and output by ONNX Runtime and OpenVINO, for arrays of a shape."""
    session = _onnxruntime_session(model, threads)
    request = _openvino_request(model, shape, threads)

    def by_onnxruntime(x: Array) -> Array:
        made: Array = session.run(None, {session.get_inputs()[0].name: x})[0]
        return made

    def by_openvino(x: Array) -> Array:
        request.infer([x])
        made: Array = request.get_output_tensor().data
        return made

    return {"onnxruntime": by_onnxruntime, "openvino": by_openvino}


def _onnxruntime(point: Point, threads: int) -> tuple[Call, Callable[[], Array]]:
    import onnxruntime

    session = _onnxruntime_session(_model(point), threads)
    binding, made = session.io_binding(), np.empty(point.output, np.float32)
    x, out = (onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in (point.x, made))
    binding.bind_ortvalue_input(session.get_inputs()[0].name, x)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, out)
    return lambda: session.run_with_iobinding(binding), out.numpy


def _openvino(point: Point, threads: int) -> tuple[Call, Callable[[], Array]]:
    import openvino

    request = _openvino_request(_model(point), point.shape, threads)
    request.set_input_tensor(openvino.Tensor(point.x))
    return request.infer, lambda: request.get_output_tensor().data


def _torches() -> dict[str, Any]:
    def made(memory: torch.memory_format, dtype: torch.dtype) -> Any:
        return lambda point, threads: _torch(point, threads, memory, dtype)

    return {
        f"torch{name}{precision}": made(memory, dtype)
        for precision, dtype in (("", torch.float32), (" bf16", torch.bfloat16))
        for name, memory in _FORMATS.items()
    }


_MADE: dict[str, Callable[[Point, int], tuple[Call, Callable[[], Array]]]] = {
    **_torches(),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}

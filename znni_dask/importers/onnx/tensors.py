"""Arrays that a file holds, in itself or in files beside it, checked before they are made.

Files are not trusted: what a tensor declares must be there, and data outside the model's own
folder is none of its business.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, numpy_helper

from znni_dask.errors import NetworkError

Constant = NDArray[np.generic]
MALFORMED = (  # what evaluating or reading something with missing or contradicting parts raises
    *(KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError),
    *(OverflowError, RuntimeError, MemoryError, ZeroDivisionError, StopIteration),
)
_PACKED = 8  # elements that a byte, or a number of a list, can stand for at most
_MOST_COMPARED = 1 << 24
_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def array_of(tensor: onnx.TensorProto, what: str) -> Constant:
    """The array that a tensor describes; raises `NetworkError` where it is not what it says."""
    if min(tensor.dims, default=0) < 0:
        raise NetworkError(f"{what} is damaged: its dimensions are {list(tensor.dims)}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise NetworkError(f"{what} is damaged: its data lie elsewhere")
    declared = prod(tensor.dims)
    held = max(len(tensor.raw_data), *(len(getattr(tensor, field)) for field in _FIELDS))
    if declared > _PACKED * held:
        raise NetworkError(f"{what} declares {declared} elements and holds data for fewer")
    try:
        array = np.asarray(numpy_helper.to_array(tensor))
    except MALFORMED as error:
        raise NetworkError(f"{what} is damaged: {error}") from None
    if array.size != declared:
        raise NetworkError(f"{what} has not the size that it declares")
    return array


def initializers(graph: onnx.GraphProto) -> dict[str, Constant]:
    """The constants of a graph by name."""
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise NetworkError(f"initializer {name!r} is sparse: only dense ones are supported")
    found: dict[str, Constant] = {}
    for tensor in graph.initializer:
        if not tensor.name or tensor.name in found:
            raise NetworkError(f"two initializers are named {tensor.name!r}, or one has no name")
        found[tensor.name] = array_of(tensor, f"initializer {tensor.name!r}")
    return found


def read_external(model: onnx.ModelProto, folder: Path) -> None:
    """Read the data that lie in files beside the model."""
    wanted = [t for t in _tensors(model.graph) if t.data_location == onnx.TensorProto.EXTERNAL]
    total, present = 0, dict[Path, int]()
    for tensor in wanted:
        what = f"external data of {tensor.name!r}"
        entries = {entry.key: entry.value for entry in tensor.external_data}
        path = _place(entries.get("location", ""), folder, what)
        size = present.setdefault(path, path.stat().st_size)
        length = _length(entries, tensor, size, what)
        total += length
        if total > 2 * sum(present.values()):  # tied weights may name the same data twice
            raise NetworkError(f"{what}: the model names more data than the files beside it hold")
        if "length" not in entries:
            tensor.external_data.add(key="length", value=str(length))
    for tensor in wanted:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except (OSError, onnx.checker.ValidationError, *MALFORMED) as error:
            raise NetworkError(f"external data of {tensor.name!r}: {error}") from None
        tensor.data_location = onnx.TensorProto.DEFAULT


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from (a.t for a in node.attribute if a.HasField("t"))


def _place(location: str, folder: Path, what: str) -> Path:
    """The file that a tensor names; links count as what they lead to."""
    try:
        path = (folder / location).resolve()
        inside = path.is_relative_to(folder.resolve()) and not Path(location).is_absolute()
        if location and inside and path.is_file():
            return path
    except (OSError, *MALFORMED) as error:
        raise NetworkError(f"{what}: {error}") from None
    where = "are missing: there is no file" if inside else "lie outside the model's folder:"
    raise NetworkError(f"{what} {where} {location!r}")


def _length(entries: dict[str, str], tensor: onnx.TensorProto, size: int, what: str) -> int:
    """Number of bytes; as many as the tensor declares where the file does not say."""
    try:
        offset = int(entries.get("offset", 0))
        item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        length = int(entries.get("length", min(prod(tensor.dims) * item, size - offset)))
    except MALFORMED as error:
        raise NetworkError(f"{what} are described wrongly: {error}") from None
    if offset < 0 or length < 0 or offset + length > size:
        raise NetworkError(
            f"{what} are cut off: {length} bytes from byte {offset} on, the file has {size}"
        )
    return length


def is_same(arrays: Iterable[Constant]) -> bool:
    """Whether arrays are equal; what they only repeat is looked at once."""
    first, *others = arrays
    return all(v is first or (v.shape == first.shape and _equal(v, first)) for v in others)


def _equal(a: Constant, b: Constant) -> bool:
    a, b = held(a, b), held(b, a)
    return a.size <= _MOST_COMPARED and np.array_equal(a, b)


def held(array: Constant, *others: Constant) -> Constant:
    """The array without what it, and others of its shape, only repeat."""
    repeats = [all(a.strides[i] == 0 for a in (array, *others)) for i in range(array.ndim)]
    return array[tuple(slice(0, 1) if again else slice(None) for again in repeats)]

"""Kernels in CUDA C++ on a machine without a GPU: run by the host, thread by thread, and compiled
for GPUs that are not there."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from znni_dask.devices.simulated import SimulatedDevice

ARCHITECTURES = ("sm_80", "sm_90")
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10}  # that a block may have
_WORDS = Path(__file__).parent / "cuda_words.hpp"
_OPTIONS = (
    *("-std=c++20", "-O1", "-w", "-fPIC"),
    "-fno-gnu-unique",  # kernels of one name and other sources do not share what is static
    "-U_FORTIFY_SOURCE",  # which takes leaving a thread's stack for a mistake
)
_WENT_WRONG = {
    1: "thread {thread} of block {block} reads or writes outside its arrays, or divides by zero",
    2: "threads of block {block} end while others wait at a barrier",
    3: "something is written outside the arrays or the block's memory",
}
_OTHER_KIND = 0
_WHOLE_NUMBER, _FLOAT, _END = -1, -2, -9


class _Argument(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("same_as", ctypes.c_int64),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint64),
        ("turned", ctypes.c_int),
        ("waits", ctypes.c_int),
        ("block", ctypes.c_uint),
        ("thread", ctypes.c_uint),
    )


def emulated(kernel, blocks, *arguments):
    """Run a kernel's CUDA source on numpy's arrays, as `Device.launch` would.

    It runs twice, forwards and backwards: threads that depend on each other without a barrier
    between them make different things. Memory that a block shares is NaN at first (declared as
    ``extern __shared__ float shared[];``, nothing else), and what lies outside of arrays cannot be
    read or written.
    """
    library = _host_library(kernel.source, kernel.name)
    _check(kernel, library, arguments)
    runs = [_run(library, kernel, blocks, arguments, turned) for turned in (False, True)]
    for given, forwards, backwards in zip(arguments, *runs, strict=True):
        if isinstance(given, np.ndarray):
            same = forwards.tobytes() == backwards.tobytes()
            assert same, f"what {kernel.name} makes depends on the order of its threads"
            given[...] = forwards


class Compiled(NamedTuple):
    """What a kernel takes of a GPU: registers of a thread, and bytes of what they cannot hold."""

    registers: int
    spilled_bytes: int
    stack_bytes: int


@cache
def compiled(source, name, architecture):
    """Compile a kernel for GPUs of an architecture; fails with what the compiler says."""
    nvrtc, made = _nvrtc(), ctypes.c_void_p()
    asked = (f"-arch={architecture}", "-std=c++17", "--ptxas-options=-v")
    options = (ctypes.c_char_p * len(asked))(*(text.encode() for text in asked))
    code = nvrtc.nvrtcCreateProgram(ctypes.byref(made), source.encode(), None, 0, None, None)
    assert code == 0
    try:
        code = nvrtc.nvrtcCompileProgram(made, len(asked), options)
        log = _fetched(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, made).decode()
        assert code == 0, log
        cubin = _fetched(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, made)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(made))
    assert cubin[:4] == b"\x7fELF"
    told = log[log.index(f"Compiling entry function '{name}'") :]
    numbers = r"(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    stack, spilled, registers = map(int, re.search(numbers, told, re.DOTALL).groups())
    return Compiled(registers, spilled, stack)


def check(launch, tolerance, kernel, blocks, made, *arguments):
    """What ``launch`` makes in ``arguments[made]`` is what the same in numpy makes."""
    want = arguments[made].copy()
    kernel.plain(*arguments[:made], want, *arguments[made + 1 :])
    launch(kernel, blocks, *arguments)
    limit = tolerance * max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0))
    np.testing.assert_allclose(arguments[made], want, rtol=tolerance, atol=limit)


def check_compiles(kernel, spilled_bytes=0):
    """GPUs have room for the kernel."""
    for architecture in ARCHITECTURES:
        made = compiled(kernel.source, kernel.name, architecture)
        assert made.registers * kernel.threads <= 1 << 16
        assert made.spilled_bytes <= spilled_bytes


class EmulatedDevice(SimulatedDevice):
    """A simulated device that runs the kernels' CUDA source."""

    def launch(self, kernel, blocks, *arguments):
        emulated(kernel, blocks, *arguments)


def _check(kernel, library, arguments):
    told, kinds = library.kinds(), []
    while not kinds or kinds[-1] != _END:
        kinds.append(told[len(kinds)])
    assert _OTHER_KIND not in kinds, f"{kernel.name} takes arrays, long long and float alone"
    assert kernel.shared_bytes <= max(SHARED_BYTES.values())
    assert kernel.threads <= 1024
    wanted = len(kinds) - 1
    assert wanted == len(arguments), f"{kernel.name} takes {wanted} arguments, not {len(arguments)}"
    for number, (kind, given) in enumerate(zip(kinds, arguments, strict=False)):
        told = f"argument {number} of {kernel.name}"
        if isinstance(given, np.ndarray):
            assert given.flags.c_contiguous, told
            assert kind == given.itemsize, f"{told}: elements of {kind} and {given.itemsize} bytes"
        else:
            wanted = _FLOAT if isinstance(given, float) else _WHOLE_NUMBER
            assert isinstance(given, (int, float)), f"{told} is a {type(given).__name__}"
            assert kind == wanted, f"{told} is {given!r}"


def _run(library, kernel, blocks, arguments, turned):
    """What the arguments are after it."""
    told = (_Argument * len(arguments))()
    found = []
    for number, given in enumerate(arguments):
        if isinstance(given, np.ndarray):
            first = next(i for i, a in enumerate(arguments) if _same(a, given))
            made = found[first] if first < number else given.copy()
            told[number] = _Argument(made.ctypes.data, made.nbytes, first)
        else:
            made = np.zeros(8, np.uint8)
            value = np.float32(given) if isinstance(given, float) else np.int64(given)
            made[: value.nbytes] = np.frombuffer(value.tobytes(), np.uint8)
            told[number] = _Argument(made.ctypes.data, -1, -1)
        found.append(made)
    waits = re.search(r"__sync|__shfl", kernel.source) is not None
    launch = _Launch(blocks, kernel.threads, kernel.shared_bytes, turned, waits)
    code = library.run(told, len(told), ctypes.byref(launch))
    if code:
        where = {"block": launch.block, "thread": launch.thread}
        raise AssertionError(f"{kernel.name}: {_WENT_WRONG[code].format(**where)}")
    return found


def _same(one, other):
    """Whether both are the same array."""
    if one is other:
        return True
    if not isinstance(one, np.ndarray) or not np.may_share_memory(one, other):
        return False
    assert (one.ctypes.data, one.nbytes) == (other.ctypes.data, other.nbytes), "arrays overlap"
    return True


def _fetched(size_of, fetch, program):
    size = ctypes.c_size_t()
    assert size_of(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert fetch(program, text) == 0
    return text.raw


@cache
def _nvrtc():
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            listed = files(package) or []
        except PackageNotFoundError:
            continue
        found = [file for file in listed if re.match(r"libnvrtc\.so", file.name)]
        if found:
            return ctypes.CDLL(str(found[0].locate()))
    pytest.skip("kernels are compiled by NVRTC, and nvidia-cuda-nvrtc is not installed")


@cache
def _host_library(source, name):
    words = _words()
    folder = Path(tempfile.mkdtemp(dir=words.parent))  # kept: a loader knows files by number
    text = (
        f'#include "{words}"\n{source}\nextern "C" {{\n'
        f"const int *kinds() {{ return Told<{name}>::kinds; }}\n"
        "int run(const Argument *arguments, int count, Launch *launch) "
        f"{{ return emulate<Told<{name}>>(arguments, count, launch); }}\n}}\n"
    )
    (folder / "kernel.cpp").write_text(text)
    _compile("-shared", "-o", folder / "kernel.so", folder / "kernel.cpp")
    library = ctypes.CDLL(str(folder / "kernel.so"))
    library.kinds.restype = ctypes.POINTER(ctypes.c_int)
    return library


@cache
def _words():
    """A copy of the words of CUDA in a folder of this session, compiled beforehand."""
    words = Path(_folder().name) / _WORDS.name
    shutil.copy(_WORDS, words)
    _compile("-x", "c++-header", "-o", f"{words}.gch", words)
    return words


@cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="kernels")


def _compile(*asked):
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("kernels are run by what g++ compiles them to on Linux, and there is no g++")
    done = subprocess.run([compiler, *_OPTIONS, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

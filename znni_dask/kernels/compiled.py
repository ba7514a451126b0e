"""Compiling what `code` wrote, once per machine: machine code is kept on disk.

The cache lies in ``$ZNNI_CACHE``, by default ``$XDG_CACHE_HOME/znni_dask`` or
``~/.cache/znni_dask``; where it cannot be written, code is compiled anew by every process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from llvmlite import binding as llvm
from llvmlite import ir

LOG = logging.getLogger(__name__)

Parameters: TypeAlias = Mapping[str, tuple[Sequence[str], Sequence[str]]]
"""Of functions by their names: the addresses that they take, and then the numbers."""


@dataclass(frozen=True)
class Target:
    """A processor to compile for: LLVM's names of its kind, model and features."""

    triple: str
    cpu: str
    features: str = ""

    @property
    def wide(self) -> bool:
        """Whether it has 32 registers of sixteen floats."""
        return "+avx512f" in self.features.split(",")

    @property
    def machine(self) -> llvm.TargetMachine:
        """LLVM's compiler for it."""
        found = llvm.Target.from_triple(self.triple)
        return found.create_target_machine(cpu=self.cpu, features=self.features, opt=3)


@cache
def host() -> Target:
    """This machine."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return Target(
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
    )


@dataclass(frozen=True)
class Compiled:
    """A function as machine code of this process. Calling it releases the interpreter lock; it is
    given addresses and numbers as they were declared."""

    address: int
    call: Callable[..., None]

    def __call__(self, *arguments: int) -> None:
        """Compute, in this thread."""
        self.call(*arguments)


class Library:
    """Functions by their names; their code lives as long as it."""

    def __init__(self, code: bytes, parameters: Parameters) -> None:
        self._owner = owner = llvm.create_mcjit_compiler(llvm.parse_assembly(""), host().machine)
        owner.add_object_file(llvm.ObjectFileRef.from_data(code))
        owner.finalize_object()
        self._functions: dict[str, Compiled] = {}
        for name, (addresses, numbers) in parameters.items():
            kinds = [ctypes.c_void_p] * len(addresses) + [ctypes.c_int64] * len(numbers)
            address = owner.get_function_address(name)
            call = ctypes.CFUNCTYPE(None, *kinds)(address)
            self._functions[name] = Compiled(address, call)

    def __getitem__(self, name: str) -> Compiled:
        return self._functions[name]


_LIBRARIES: dict[str, Library] = {}  # of this process, by what is kept of each on disk


def kept_library(write: Callable[..., ir.Module], *arguments: Hashable) -> Library:
    """The functions of ``write(*arguments)``, compiled for this machine or taken from the cache on
    disk. What is kept is known by the arguments and the source that writes it: where it is there,
    nothing need be written. ``write`` is a function of a module and reads nothing else."""
    return _library(_about(write, arguments), lambda: _told(write(*arguments)))


def is_kept(write: Callable[..., ir.Module], *arguments: Hashable) -> bool:
    """Whether this machine has `kept_library` of that already, and need not compile it."""
    key = _key(_about(write, arguments))
    return key in _LIBRARIES or _place(key).exists()


def compiled_library(module: ir.Module) -> Library:
    """The same of a module at hand, known by its text."""
    text, parameters = _told(module)
    return library_of_text(text, parameters)


def library_of_text(text: str, parameters: Parameters) -> Library:
    """The same of functions whose text is LLVM's."""
    return _library(text, lambda: (text, parameters))


def _told(module: ir.Module) -> tuple[str, Parameters]:
    """A module's text, and what its functions take."""
    parameters = {}
    for function in module.functions:
        if function.blocks and function.linkage != "internal":
            addresses = [a.name for a in function.args if isinstance(a.type, ir.PointerType)]
            numbers = [a.name for a in function.args if not isinstance(a.type, ir.PointerType)]
            parameters[function.name] = addresses, numbers
    return str(module), parameters


def _about(write: Callable[..., ir.Module], arguments: tuple[Hashable, ...]) -> str:
    return repr((_sources(write.__code__.co_filename), write.__qualname__, arguments))


def _key(about: str) -> str:
    """The name of what is kept of a library for this machine."""
    return hashlib.sha256(repr((about, host(), llvm.llvm_version_info)).encode()).hexdigest()


def _place(key: str) -> Path:
    return cache_folder() / f"{key}.kernels"


@cache
def _sources(file: str) -> str:
    """A digest of this folder's modules and of another."""
    found = hashlib.sha256()
    for place in [*sorted(Path(__file__).parent.glob("*.py")), Path(file)]:
        found.update(place.read_bytes())
    return found.hexdigest()


def _library(about: str, write: Callable[[], tuple[str, Parameters]]) -> Library:
    """The one of this process: all who ask have the same, also those who do at once, and its code
    stays where they were told that it is."""
    key = _key(about)
    if key not in _LIBRARIES:
        _LIBRARIES.setdefault(key, _loaded(key, write))
    return _LIBRARIES[key]


def _loaded(key: str, write: Callable[[], tuple[str, Parameters]]) -> Library:
    """From the cache on disk, or else written and compiled. A file holds what the functions take
    in its first line, and then their code."""
    place = _place(key)
    try:
        told, code = place.read_bytes().split(b"\n", 1)
        return Library(code, json.loads(told))
    except OSError:  # not there yet, or not for us to read
        LOG.info("compiling kernels for this machine: once, they are kept in %s", cache_folder())
    text, parameters = write()
    code = object_code(text, host())
    with contextlib.suppress(OSError):  # where nothing can be kept, every process compiles
        keep(place, json.dumps(parameters).encode() + b"\n" + code)
    return Library(code, parameters)


def object_code(text: str, target: Target) -> bytes:
    """Machine code of a module's text for any target that LLVM knows."""
    module = llvm.parse_assembly(text)
    module.verify()
    machine = target.machine
    module.triple, module.data_layout = target.triple, str(machine.target_data)
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = False  # all is vectors already
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return bytes(machine.emit_object(module))


def cache_folder() -> Path:
    """Where machine code is kept."""
    if chosen := os.environ.get("ZNNI_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "znni_dask"


def keep(place: Path, code: bytes) -> None:
    """Write whole or not at all: other processes read it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        Path(name).replace(place)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise

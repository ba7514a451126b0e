"""Transforms, products and their compilation, against numpy in float64."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from llvmlite import binding as llvm
from llvmlite import ir

from znni_dask.kernels import compiled, from_few, planes, rows, tiles
from znni_dask.kernels.adding import adding_module
from znni_dask.kernels.code import LANES, Function
from znni_dask.kernels.codelets import LONGEST, refusal
from znni_dask.kernels.complex_product import Product
from znni_dask.kernels.lines import complex_line, gathered_line, real_line, restored_line
from znni_dask.kernels.memory import allocate
from znni_dask.kernels.patch_matrix import patches_module
from znni_dask.kernels.pooling_blocked import pooling_module
from znni_dask.kernels.sharing import sharing_text
from znni_dask.kernels.tiles import Tile
from znni_dask.kernels.turns import turns_text
from znni_dask.kernels.winograd import Tile as WinogradTile
from znni_dask.kernels.winograd import winograd_module

LENGTHS = [n for n in range(1, LONGEST + 1) if refusal(n) is None]
PAIR, VECTOR = 8 * LANES, 4 * LANES


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of compiled code of their own: what these tests compile is not wanted later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZNNI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def aligned(shape):
    array = allocate(4 * int(np.prod(shape))).view(np.float32).reshape(shape)
    array[...] = np.nan
    return array


def exposed(module, function, name):
    """A function that others of its module would call, to be called from here."""
    addresses, numbers = len(function.addresses), len(function.numbers)
    code = Function(module, name, "abc"[:addresses], "xyz"[:numbers])
    code.call(function, *code.addresses, *code.numbers)
    code.finish()


def complexes(array):
    """Lines of pairs as complex numbers."""
    return array[..., 0, :].astype(complex) + 1j * array[..., 1, :]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.every(2)
def test_transforms_are_those_of_numpy(n):
    taken, made = max(1, n // 2), max(1, n - 2)
    module = ir.Module()
    exposed(module, complex_line(module, n, taken, made, inverse=True, streamed=True), "pruned")
    exposed(module, complex_line(module, n, n, n, sums=True), "summed")
    exposed(module, real_line(module, n, taken), "real")
    exposed(module, gathered_line(module, n, taken, scale=0.25), "conjugate")
    run = compiled.compiled_library(module)
    random = np.random.default_rng(n)
    x, out = aligned((n, 2, LANES)), aligned((n, 2, LANES))
    x[...] = random.standard_normal(x.shape)
    values = complexes(x)
    run["pruned"](x.ctypes.data, out.ctypes.data, PAIR, PAIR)
    close(complexes(out[:made]), n * np.fft.ifft(values[:taken], n, axis=0)[:made])
    assert np.isnan(out[made:]).all()
    triples = aligned((n, 3, LANES))
    run["summed"](x.ctypes.data, triples.ctypes.data, PAIR, 3 * VECTOR)
    close(complexes(triples), np.fft.fft(values, axis=0))
    np.testing.assert_array_equal(triples[:, 2], triples[:, 0] + triples[:, 1])
    spread = aligned((n, 3, LANES))  # every third vector counts
    spread[:, 0] = random.standard_normal((n, LANES))
    run["real"](spread.ctypes.data, out.ctypes.data, 3 * VECTOR, PAIR)
    half = n // 2 + 1
    close(complexes(out[:half]), np.fft.rfft(spread[:taken, 0], n, axis=0))
    lines = np.full((LANES, taken + 1), np.nan, np.float32)
    lines[:, :taken] = random.standard_normal((LANES, taken))
    run["conjugate"](lines.ctypes.data, out.ctypes.data, lines.strides[0], PAIR)
    close(complexes(out[:half]), np.fft.rfft(lines[:, :taken].T, n, axis=0).conj() / 4)


@pytest.mark.parametrize(("n", "relu"), [(n, n % 4 == 0) for n in LENGTHS if n % 2 == 0])
def test_rows_come_back_with_bias_and_activation(n, relu):
    made = max(1, n - 3)
    module = ir.Module()
    exposed(module, restored_line(module, n, made, relu=relu, streamed=True), "restored")
    run = compiled.compiled_library(module)
    random = np.random.default_rng(n)
    values, bias = random.standard_normal((n, LANES)), aligned(LANES)
    bias[:] = random.standard_normal(LANES)
    spectrum = np.fft.rfft(values, axis=0)
    half, out = aligned((n // 2 + 1, 2, LANES)), aligned((n, LANES))
    half[:, 0], half[:, 1] = spectrum.real, spectrum.imag
    run["restored"](half.ctypes.data, out.ctypes.data, bias.ctypes.data, VECTOR)
    want = n * values[:made] + bias
    close(out[:made], np.maximum(want, 0) if relu else want)
    assert np.isnan(out[made:]).all()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("rows", "channels", "blocks"), [(1, 1, 1), (8, 16, 2), (13, 40, 3), (27, 5, 5), (3, 17, 4)]
)
def test_products_are_those_of_complex_matrices(rows, channels, blocks, wide):
    module = ir.Module()
    product = Product(module, wide)
    numbers = ("rows", "blocks", "a_stride", "c_stride", "n")
    code = Function(module, "multiply", ("a", "b", "c"), numbers)
    count, made, a_stride, c_stride, n = code.numbers
    product.write(code, tuple(code.addresses), count, made, (a_stride, c_stride), n, ())
    code.finish()
    random, read = np.random.default_rng(0), -(-channels // LANES)
    a, b = aligned((rows, read, 3, LANES)), aligned((blocks, channels, 2, LANES))
    a[:, :, :2] = random.standard_normal((rows, read, 2, LANES))
    a[:, :, 2] = a[:, :, 0] + a[:, :, 1]
    b[...] = random.standard_normal(b.shape)
    c = aligned((rows, blocks, 2, LANES))
    strides = (3 * VECTOR * read, PAIR * blocks)
    places = (array.ctypes.data for array in (a, b, c))
    compiled.compiled_library(module)["multiply"](*places, rows, blocks, *strides, channels)
    left = complexes(a[:, :, :2].swapaxes(1, 2).reshape(rows, 2, -1))[:, :channels]
    for block in range(blocks):
        close(complexes(c[:, block]), left @ complexes(b[block]))


@pytest.mark.parametrize(
    ("triple", "cpu", "machine"),
    [("aarch64-unknown-linux-gnu", "generic", 183), ("x86_64-unknown-linux-gnu", "x86-64-v3", 62)],
)
def test_other_processors_can_be_compiled_for(triple, cpu, machine):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = compiled.Target(triple, cpu)
    assert not target.wide
    tile = Tile((4, 6, 8), (3, 3, 3))
    modules = [tiles.stages_module(tile, relu, wide=False) for relu in (False, True)]
    modules += [rows.rows_module(lanes, 1, wide=False) for lanes in rows.Lanes]
    modules += [pooling_module(mean, wide=False) for mean in (False, True)]
    modules += [patches_module(), planes.planes_module(tile, True, wide=False)]
    modules += [from_few.from_few_module(from_few.Shape(3, 3, 1, 1), wide=False)]
    modules += [adding_module(), winograd_module(WinogradTile((1, 2, 3)), relu=True)]
    for text in [*map(str, modules), sharing_text(), turns_text()]:
        code = compiled.object_code(text, target)
        assert code[:4] == b"\x7fELF"
        assert int.from_bytes(code[18:20], "little") == machine


def test_code_is_compiled_once_and_kept(tmp_path, monkeypatch, caplog):
    def module():
        made = ir.Module()
        exposed(made, complex_line(made, 2, 2, 2), "line")
        return made

    def begun_anew():
        monkeypatch.setattr(compiled, "_LIBRARIES", {})

    monkeypatch.setenv("ZNNI_CACHE", str(tmp_path / "kept"))
    caplog.set_level("INFO")
    begun_anew()
    compiled.compiled_library(module())
    assert "once" in caplog.text
    assert str(tmp_path / "kept") in caplog.text
    caplog.clear()
    (kept,) = (tmp_path / "kept").iterdir()
    written = kept.stat().st_mtime_ns
    begun_anew()
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "object_code", None)  # would be called, and fail
        compiled.compiled_library(module())
    assert [p.stat().st_mtime_ns for p in (tmp_path / "kept").iterdir()] == [written]
    assert not caplog.text
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZNNI_CACHE", str(tmp_path / "file"))  # nothing can be kept there
    begun_anew()
    assert compiled.compiled_library(module())["line"]


def test_all_who_ask_at_once_have_the_same_code(monkeypatch):
    """Of code that only some had, others would be told where it no longer is."""
    monkeypatch.setattr(compiled, "_LIBRARIES", {})
    honest, begin = compiled._loaded, threading.Barrier(4)

    def loaded(*asked):
        begin.wait(10)  # all find that nobody has it
        return honest(*asked)

    monkeypatch.setattr(compiled, "_loaded", loaded)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(compiled.library_of_text, *_text()) for _ in range(4)]
        libraries = {one.result(30) for one in found}
    assert len(libraries) == 1
    assert compiled.library_of_text(*_text()) in libraries


def _text():
    module = ir.Module()
    exposed(module, complex_line(module, 2, 2, 2), "line")
    return compiled._told(module)


def test_lengths_that_cannot_be_transformed_are_refused():
    assert "17" in refusal(17)
    assert refusal(LONGEST + 6) is not None
    assert "even" in Tile((4, 4, 5), (3, 3, 3)).refusal()
    assert "smaller than the kernel" in Tile((4, 2, 6), (3, 3, 3)).refusal()
    assert Tile((4, 9, 6), (3, 3, 3)).refusal() is None


def close(got, want):
    assert np.abs(got - want).max() <= 1e-6 * max(1.0, np.abs(want).max())

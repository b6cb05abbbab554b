"""The CPU's kernels against the plain definitions: values and every gradient."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from ldm.files import sha256
from ldm.kernels import convolution, cpu, plain, sliced

pytestmark = pytest.mark.skipif(cpu.native_library() is None, reason="no C++ compiler on this machine")


class Weighted(nn.Cell):
    """A scalar of an operator's output, whose gradient reaches every input."""

    def __init__(self, operator, weights):
        super().__init__()
        self.operator, self.weights = operator, weights

    def construct(self, *inputs):
        return (self.operator(*inputs) * self.weights).sum()


def compare(native, plain, *inputs, tolerance=2e-6):
    rng = np.random.default_rng(1)
    inputs = [Tensor(array.astype(np.float32)) for array in inputs]
    expected, got = plain(*inputs).asnumpy(), native(*inputs).asnumpy()
    weights = Tensor(rng.standard_normal(expected.shape).astype(np.float32))
    positions = tuple(range(len(inputs)))
    wanted = ops.grad(Weighted(plain, weights), positions)(*inputs)
    given = ops.grad(Weighted(native, weights), positions)(*inputs)
    pairs = zip(wanted, given) if len(inputs) > 1 else [(wanted, given)]
    for want, have in [(expected, got), *((w.asnumpy(), g.asnumpy()) for w, g in pairs)]:
        assert have.shape == want.shape
        assert np.sqrt(np.mean((have - want) ** 2)) <= tolerance * np.sqrt(np.mean(want**2))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (3, 96, 5, 7), (1, 32, 33, 129)])
def test_group_norm(rng, shape, silu):
    x, weight, bias = 3 + 2 * rng.standard_normal(shape), rng.standard_normal(shape[1]), rng.standard_normal(shape[1])
    compare(cpu.NativeGroupNorm(32, 1e-5, silu), plain.GroupNorm(32, 1e-5, silu), x, weight, bias, tolerance=1e-5)


@pytest.mark.parametrize("shape", [(2, 77, 64), (3, 300, 320), (1, 1, 1280)])
def test_layer_norm(rng, shape):
    x, weight, bias = 1 + rng.standard_normal(shape), rng.standard_normal(shape[-1]), rng.standard_normal(shape[-1])
    compare(cpu.NativeLayerNorm(1e-5), plain.LayerNorm(1e-5), x, weight, bias, tolerance=1e-5)


def test_geglu(rng):
    compare(cpu.NativeGEGLU(), plain.GEGLU(), 3 * rng.standard_normal((2, 50, 192)))


def test_gelu(rng):
    compare(cpu.NativeGELU(), plain.GELU(), 3 * rng.standard_normal((2, 1003)))


def test_gelu_far_out():
    x = Tensor(np.array([-1e4, -40, -12, 0, 12, 40, 1e4, np.nan], np.float32))
    y = cpu.NativeGELU()(x).asnumpy()
    np.testing.assert_allclose(y, [0, 0, 0, 0, 12, 40, 1e4, np.nan], atol=1e-6)


def test_upsample(rng):
    compare(cpu.NativeUpsample2(), plain.Upsample2(), rng.standard_normal((2, 3, 5, 7)))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("shape, outputs", [((2, 4, 9, 7), 6), ((2, 8, 3, 2), 16)], ids=["large", "small"])
def test_a_convolution_that_keeps_the_size(rng, shape, outputs, kernel):
    """Its gradients are computed in one way for large pictures and in another way for small ones."""
    native, own = convolution.SizeKeepingConv2d(outputs, kernel), plain.conv2d(outputs, kernel, 1, kernel // 2)
    compare(native, own, rng.standard_normal(shape), rng.standard_normal((outputs, shape[1], kernel, kernel)))


@pytest.mark.parametrize("words", [(319, 3, 1, 1), (320, 1, 1, 0), (320, 3, 2, 1), (320, 3, 1, 0)], ids=str)
def test_only_wide_convolutions_that_keep_the_size_have_another_gradient(words):
    assert isinstance(convolution.small_gradient_conv2d(*words), ops.Conv2D)
    assert isinstance(convolution.small_gradient_conv2d(320, 3, 1, 1), convolution.SizeKeepingConv2d)


@pytest.mark.parametrize(("rows", "sizes"), [(50, [5] * 10), (53, [7] * 7 + [4])])
def test_attention_in_slices(rng, monkeypatch, rows, sizes):
    q, k, v = (rng.standard_normal((2, 3, n, 16)) for n in (rows, 20, 20))
    monkeypatch.setattr(sliced, "SCORE_BYTES", 4 * 2 * 3 * 20 * 7)  # 7 rows at a time
    assert [size for _, size in sliced.slices(q.shape, k.shape)] == sizes
    compare(sliced.SlicedAttention(), plain.Attention(), q, k, v)


def test_every_query_is_in_one_slice_and_slices_are_few():
    for rows in (1, 7, 64, 77, 257, 577, 1031, 4096, 9216, 12288):
        for heads in (1, 16, 512):
            q = (2, heads, rows, 64)
            parts = sliced.slices(q, q)
            assert [first for first, _ in parts] == [sum(size for _, size in parts[:n]) for n in range(len(parts))]
            assert sum(size for _, size in parts) == rows and min(size for _, size in parts) > 0
            fewest = min(rows, sliced.MOST_SLICES, -(-8 * heads * rows * rows // sliced.SCORE_BYTES))
            assert len(parts) < 2 * fewest
            if rows % 64 == 0:
                assert len({size for _, size in parts}) == 1


def test_nan_passes_through_the_norm(rng):
    x = rng.standard_normal((1, 32, 4, 4)).astype(np.float32)
    x[0, 0, 0, 0] = np.nan
    one, zero = Tensor(np.ones(32, np.float32)), Tensor(np.zeros(32, np.float32))
    y = cpu.NativeGroupNorm(32, 1e-5, True)(Tensor(x), one, zero).asnumpy()
    assert np.isnan(y[0, 0]).all() and np.isfinite(y[0, 1:]).all()


@pytest.mark.parametrize(
    ("native", "shape"),
    [(cpu.NativeGEGLU, (1, 4, 64)), (cpu.NativeGELU, (3, 65)), (cpu.NativeUpsample2, (1, 2, 4, 4))],
)
def test_half_precision_comes_out_as_float32_and_its_gradient_as_half(rng, native, shape):
    operator, x = native(), Tensor(rng.standard_normal(shape), ms.float16)
    y = operator(x)
    given = ops.grad(Weighted(operator, Tensor(np.ones(y.shape, np.float32))))(x)
    wanted = ops.grad(Weighted(operator, Tensor(np.ones(y.shape, np.float32))))(x.astype(ms.float32))
    assert y.dtype == ms.float32 and given.dtype == ms.float16
    np.testing.assert_allclose(given.asnumpy(), wanted.asnumpy(), atol=1e-2)


def compiled() -> tuple[Path, Path]:
    """The library that this machine has, and the record beside it."""
    library = Path(cpu.native_library())
    return library, library.with_suffix(".sha256")


@pytest.fixture
def place(monkeypatch, tmp_path) -> Path:
    """A cache folder with a copy of them."""
    folder = tmp_path / "ldm-kernels"
    folder.mkdir(mode=0o700)
    for path in compiled():
        shutil.copy(path, folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return folder


FIND = """
import shutil, subprocess, sys
from ldm.kernels import cpu
if sys.argv[1:]:
    subprocess.run = lambda command, **_: shutil.copy(sys.argv[1], command[-1])
print(cpu.native_library() or 'plain')
"""


def find(*made: Path, **env: str) -> tuple[str, str]:
    """What a process of its own says: (path or "plain", errors). A damaged library would end it by SIGBUS.

    The compiler's work of some seconds is left out where a library that it has `made` is given.
    """
    words, env = [sys.executable, "-c", FIND, *map(str, made)], {**os.environ, **env}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    return done.stdout.splitlines()[-1], done.stderr


def another_library() -> bytes:
    """A good one, of other functions."""
    return Path(importlib.util.find_spec("PIL._imaging").origin).read_bytes()


DAMAGE = {
    "cut off": lambda library, record: os.truncate(library, library.stat().st_size // 2),
    "cut off at a page": lambda library, record: os.truncate(library, 8192),
    "empty": lambda library, record: os.truncate(library, 0),
    "garbage": lambda library, record: library.write_bytes(b"\x7fELF" + bytes(range(256)) * 99),
    "foreign": lambda library, record: library.write_bytes(another_library()),
    "one bit": lambda library, record: library.write_bytes(library.read_bytes()[:-1] + b"\x55"),
    "no record": lambda library, record: record.unlink(),
    "a cut record": lambda library, record: os.truncate(record, 20),
    "a record without a library": lambda library, record: library.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_library_is_made_anew(place, damage):
    own, record = (place / path.name for path in compiled())
    DAMAGE[damage](own, record)
    assert find(compiled()[0]) == (str(own), "")
    assert record.read_text() == f"{own.stat().st_size} {sha256(own).hex()}"
    assert sorted(path.name for path in place.iterdir()) == sorted((own.name, record.name))
    assert ctypes.CDLL(str(own)).group_norm


def test_a_good_library_is_compiled_once(place, monkeypatch):
    monkeypatch.setattr(cpu, "_compile", None)
    assert cpu.native_library.__wrapped__() == str(place / compiled()[0].name)


def test_one_that_matches_its_record_but_does_not_load_is_made_anew(place):
    own, record = (place / path.name for path in compiled())
    own.write_bytes(b"no library")
    record.write_text(f"10 {hashlib.sha256(b'no library').hexdigest()}")
    assert find() == (str(own), "")


def test_a_failed_compilation_is_said_in_one_line_and_tried_again(place, tmp_path):
    own, _ = (place / path.name for path in compiled())
    own.unlink()
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nprintf 'out of\\033[2Jluck\\nmore\\n' >&2; exit 1\n")
    compiler.chmod(0o755)
    for _ in range(2):
        path, errors = find(CXX=str(compiler))
        assert path == "plain" and errors.count("\n") == 1
        assert "plain ones are several times slower, the next run tries again: out of\\x1b[2Jluck" in errors
    assert find() == (str(own), "")


def test_without_a_place_for_the_library_the_plain_kernels_run(monkeypatch, tmp_path, capsys):
    """A cache folder that is a file."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpu.native_library.__wrapped__() is None
    assert "plain ones are several times slower" in capsys.readouterr().err


def test_a_folder_that_others_can_write_to_is_not_used(place, monkeypatch, capsys):
    search = cpu.native_library.__wrapped__
    place.chmod(0o777)
    assert search() is None and f"everybody may write to {place}" in capsys.readouterr().err
    place.chmod(0o770)
    assert search() and place.stat().st_mode & 0o777 == 0o750
    monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
    assert search() is None and f"{place} belongs to another user" in capsys.readouterr().err

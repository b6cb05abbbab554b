"""Damaged checkpoints by the thousand: whatever the bytes, a UserError or arrays no larger than the file.

FUZZ_CASES=6000 python -m pytest tests/test_fuzz.py    # cases per format; 150 where nothing is said
"""

import os
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_save import SAVERS, contiguous, torch_names

from ldm import checkpoint
from ldm.errors import UserError

CASES = int(os.environ.get("FUZZ_CASES", "150"))
EXTREMES = [bytes([byte]) * n for byte in (0, 0x7F, 0x80, 0xFF) for n in (1, 4, 8)]
TOKENS = [
    b"{",
    b"}",
    b"[",
    b'"',
    b":",
    b"shape",
    b"F32",
    b"BF16",
    b"cos\nsystem\n",
    b"R",
    b"\x81",
    b"b",
    b"(",
    b"t",
    b".",
]


def tensors():
    rng = np.random.default_rng(0)
    shapes = {"model.diffusion_model.out.2.weight": (4, 8, 3, 3), "first_stage_model.a.bias": (5,), "x": ()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good file of every format, as bytes."""
    folder, files = tmp_path_factory.mktemp("whole"), {}
    for kind in ("safetensors", "mindspore"):
        checkpoint.save(folder / kind, tensors(), {"prediction_type": "v", "schedule": "{}"}, kind)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in torch_names().items():
            patch.setitem(sys.modules, name, module)
        for kind, save in SAVERS.items():
            save(folder / kind, {name: contiguous(array) for name, array in tensors().items()})
    for path in folder.iterdir():
        files[path.name] = path.read_bytes()
    return files


@st.composite
def damages(draw):
    """A list of changes (what, where from 0 to 1, with what), weighted to the file's beginning and end."""
    place = st.one_of(st.floats(0, 1), st.floats(0, 0.1), st.floats(0.9, 1))
    content = st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from(EXTREMES), st.sampled_from(TOKENS))
    change = st.tuples(st.sampled_from(["overwrite", "insert", "delete", "cut", "repeat"]), place, content)
    return draw(st.lists(change, min_size=1, max_size=5))


def damaged(data: bytes, changes) -> bytes:
    for what, share, content in changes:
        at = int(share * len(data))
        if what == "overwrite":
            data = data[:at] + content + data[at + len(content) :]
        elif what == "insert":
            data = data[:at] + content + data[at:]
        elif what == "delete":
            data = data[:at] + data[at + len(content) :]
        elif what == "cut":
            data = data[:at]
        else:
            data = data[: at + 64] + data[at:]
    return data


@pytest.mark.parametrize("kind", ["safetensors", "mindspore", *SAVERS])
def test_damage_is_an_error_or_another_number(whole, tmp_path, kind):
    path = tmp_path / "model.ckpt"

    @settings(
        max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(damages())
    def check(changes):
        data = damaged(whole[kind], changes)
        path.write_bytes(data)
        tracemalloc.start()
        began = time.perf_counter()
        try:
            read = checkpoint.load(path).tensors
            assert sum(array.nbytes for array in read.values()) <= 2 * len(data)  # bfloat16 is widened
        except UserError as error:
            assert "\n" not in str(error)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 32 << 20
        assert time.perf_counter() - began < 5

    check()

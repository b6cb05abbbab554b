"""The cache of frozen networks' answers: found by content, whole after any interruption, one writer at a time."""

import errno
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from full_disk import files_of_at_most

from ldm.conditioning import Condition
from ldm.config.model import ModelConfig, TextConfig
from ldm.errors import UserError
from ldm.train import cache
from ldm.train.cache import ENTRY_BYTES, KEY_BYTES, ArrayStore, file_key, settings_key, text_key
from ldm.train.inputs import FrozenOutputs

SHAPE = (2, 3)


def rows(*numbers):
    return np.stack([np.full(SHAPE, n, np.float32) for n in numbers])


def keys(*numbers):
    return [text_key(str(n)) for n in numbers]


def test_rows_are_found_again_by_their_keys(tmp_path):
    store = ArrayStore(tmp_path / "c", SHAPE)
    with store.filling():
        store.append(keys(1, 2), rows(1, 2))
        store.append(keys(3), rows(3))
    for again in (store, ArrayStore(tmp_path / "c", SHAPE)):
        assert len(again) == 3 and keys(2)[0] in again and keys(4)[0] not in again
        assert again.take(keys(3, 1, 3))[:, 0, 0].tolist() == [3, 1, 3]


@pytest.mark.parametrize("lost", [1, ENTRY_BYTES - 1, ENTRY_BYTES])
def test_a_row_without_its_whole_key_is_written_anew(tmp_path, lost):
    """As after a kill between the two files, or in the middle of the second."""
    store = ArrayStore(tmp_path, SHAPE)
    store.append(keys(1, 2), rows(1, 2))
    path = tmp_path / "keys.crc32"
    path.write_bytes(path.read_bytes()[:-lost])
    store = ArrayStore(tmp_path, SHAPE)
    assert len(store) == 1
    store.append(keys(5), rows(5))
    store = ArrayStore(tmp_path, SHAPE)
    assert store.take(keys(1, 5))[:, 0, 0].tolist() == [1, 5] and len(store) == 2


def test_keys_without_their_rows_are_forgotten(tmp_path):
    ArrayStore(tmp_path, SHAPE).append(keys(1, 2), rows(1, 2))
    path = tmp_path / "rows.f32"
    path.write_bytes(path.read_bytes()[:-1])
    assert len(ArrayStore(tmp_path, SHAPE)) == 1


@pytest.mark.parametrize("name", ["rows.f32", "keys.crc32"])
def test_a_flipped_bit_is_found_and_the_row_computed_again(tmp_path, name, caplog):
    """Anywhere in the file: in a row, a key or a checksum."""
    whole = ArrayStore(tmp_path / "whole", SHAPE)
    whole.append(keys(1, 2), rows(1, 2))
    size = (whole.folder / name).stat().st_size
    for place in range(0, size, 5):
        shutil.copytree(whole.folder, tmp_path / str(place))
        path = tmp_path / str(place) / name
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)
        store = ArrayStore(path.parent, SHAPE)
        store.forget_damaged(keys(1, 2))
        first = place < size // 2
        assert [key in store for key in keys(1, 2)] == [not first, first]
        store.append(keys(1, 2), rows(1, 2))
        for again in (store, ArrayStore(path.parent, SHAPE)):
            again.forget_damaged(keys(1, 2))
            assert again.take(keys(1, 2))[:, 0, 0].tolist() == [1, 2]
    assert "1 damaged rows in the cache" in caplog.text


def damage(folder, *places):
    data = bytearray((folder / "rows.f32").read_bytes())
    for place in places:
        data[place * rows(0).nbytes] ^= 1
    (folder / "rows.f32").write_bytes(data)


def test_a_row_that_is_damaged_while_it_is_used_is_never_given(tmp_path):
    """Nor to the next run, which computes it anew without a look at all rows."""
    store = ArrayStore(tmp_path, SHAPE)
    store.append(keys(1, 2, 3), rows(1, 2, 3))
    store.take(keys(2))
    damage(tmp_path, 1)
    with pytest.raises(UserError, match="1 rows of the cache .* are damaged: --resume True computes them anew"):
        store.take(keys(1, 2, 3))
    store = ArrayStore(tmp_path, SHAPE)
    assert [key in store for key in keys(1, 2, 3)] == [True, False, True] and len(store) == 2
    store.append(keys(2), rows(2))
    for again in (store, ArrayStore(tmp_path, SHAPE)):
        assert again.take(keys(1, 2, 3))[:, 0, 0].tolist() == [1, 2, 3]


def test_of_a_large_cache_a_sample_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHECKED_BYTES", 3 * rows(0).nbytes)
    numbers = range(8)
    ArrayStore(tmp_path, SHAPE).append(keys(*numbers), rows(*numbers))
    for damaged, found in (([1, 2], []), ([3], [1, 2, 3])):  # 0, 3 and 6 are looked at, or all
        damage(tmp_path, *damaged)
        store = ArrayStore(tmp_path, SHAPE)
        store.forget_damaged(keys(*numbers))
        assert [n for n in numbers if keys(n)[0] not in store] == found


def test_a_picture_or_caption_without_an_answer_is_named(tmp_path):
    data = SimpleNamespace(
        samples=[SimpleNamespace(path=str(tmp_path / f"{name}.png"), text=f"a {name}") for name in ("cat", "dog")],
        image_size=64,
        read=lambda path: np.full((64, 64, 3), 255 * ("cat" in path), np.uint8),
    )
    for sample in data.samples:
        Path(sample.path).write_bytes(sample.text.encode())

    class Network:
        def encode_images(self, images):
            mean = np.where(images[:, :1] > 0, 0, np.nan)[:, [0] * 4, ::8, ::8].astype(np.float32)
            return mean, mean

        def conditioner(self, texts, wording):
            return Condition(np.stack([np.full((77, 1024), np.inf if "dog" in t else 0, np.float32) for t in texts]))

    named = {"latents": "the autoencoder gives NaN or infinity for '.*dog.png'", "text": "for 'a dog'"}
    for kind, written in (("latents", 0), ("text", 2)):
        caches = FrozenOutputs(tmp_path, ModelConfig("v"), {}, 64, "float32", kind == "latents", kind == "text")
        with pytest.raises(UserError, match=named[kind]):
            caches.fill(Network(), data, 2)
        assert len(caches.features if written else caches.latents) == written


def test_a_full_disk_keeps_what_was_there(tmp_path):
    store = ArrayStore(tmp_path, SHAPE)
    store.append(keys(1), rows(1))
    with pytest.raises(UserError, match="cannot write the cache"), files_of_at_most(60):
        store.append(keys(2, 3), rows(2, 3))
    store = ArrayStore(tmp_path, SHAPE)
    assert len(store) == 1 and store.take(keys(1))[0, 0, 0] == 1
    store.append(keys(4), rows(4))
    assert ArrayStore(tmp_path, SHAPE).take(keys(4))[0, 0, 0] == 4


def test_a_cache_that_cannot_be_locked_is_named(tmp_path, monkeypatch):
    """As on a disk whose file system knows no locks, or in the folder of somebody else."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("ldm.train.cache.fcntl.flock", refuse)
    with pytest.raises(UserError, match="cannot lock .*: Function not implemented; choose another --cache_path"):
        ArrayStore(tmp_path, SHAPE).append(keys(1), rows(1))


def test_what_another_rank_should_have_computed_is_missed(tmp_path):
    """As where hosts have a folder each; only pictures that may be skipped are done without."""
    (tmp_path / "a.png").write_bytes(b"a")
    data = SimpleNamespace(samples=[SimpleNamespace(path=str(tmp_path / "a.png"), text="a cat")], skips_bad=False)
    latents, text = (
        FrozenOutputs(tmp_path, ModelConfig("v"), {}, 64, "float32", kind == "latents", kind == "text")
        for kind in ("latents", "text")
    )
    for caches in (latents, text):
        with pytest.raises(UserError, match="lacks what another rank has computed"):
            caches.leave_out_missing(data)
    data.skips_bad, data.leave_out = True, set().update
    latents.leave_out_missing(data)
    with pytest.raises(UserError, match="lacks what another rank has computed"):
        text.leave_out_missing(data)


def test_the_features_of_another_layer_are_not_taken(tmp_path):
    def folder(**text):
        config = ModelConfig("v", text=TextConfig(**text))
        return FrozenOutputs(tmp_path, config, {}, 64, "float32", False, True).features.folder

    assert folder(layers=23) == folder(layers=23) != folder(layers=24)


def fill(folder, first):
    store = ArrayStore(folder, SHAPE)
    with store.filling():
        for n in range(first, first + 50):
            if keys(n)[0] not in store:
                store.append(keys(n), rows(n))


def test_two_processes_fill_one_cache(tmp_path):
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=fill, args=(tmp_path, first)) for first in (0, 25)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    store = ArrayStore(tmp_path, SHAPE)
    assert len(store) == 75
    assert store.take(keys(*range(75)))[:, 0, 0].tolist() == list(range(75))


def test_ranks_add_in_turn_and_nothing_twice(tmp_path):
    """Two ranks that have opened the folder before either wrote, and a key that both come upon."""
    one, two = ArrayStore(tmp_path, SHAPE), ArrayStore(tmp_path, SHAPE)
    with one.filling((0, 2)), two.filling((1, 2)):  # shares do not wait for one another
        one.append(keys(1), rows(1))
        two.append(keys(2, 1, 3), rows(2, 1, 3))
        one.append(keys(4), rows(4))
    two.refresh()
    for store in (two, ArrayStore(tmp_path, SHAPE)):
        assert len(store) == 4 and store.take(keys(1, 2, 3, 4))[:, 0, 0].tolist() == [1, 2, 3, 4]


def test_keys_stand_for_content_and_settings(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"x")
    (tmp_path / "c.png").write_bytes(b"y")
    a, b, c = (file_key(str(tmp_path / f"{name}.png")) for name in "abc")
    assert a == b != c and len(a) == KEY_BYTES
    with pytest.raises(UserError, match="cannot read the picture"):
        file_key(str(tmp_path / "no.png"))
    weights = {"w": np.arange(4, dtype=np.float16)}
    key = settings_key(weights, size=64)
    assert key == settings_key({"w": np.arange(4, dtype=np.float32)}, size=64)
    assert len({key, settings_key(weights, size=32), settings_key({"w": np.ones(4, np.float16)}, size=64)}) == 3

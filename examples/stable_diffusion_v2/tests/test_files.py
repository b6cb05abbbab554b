"""Atomic writing by several processes, and foreign words in messages."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from ldm.errors import UserError
from ldm.files import ABANDONED_SECONDS, claimed, escaped, quoted, replacing


def write_often(path, letter: bytes, size: int) -> None:
    for _ in range(60):
        with replacing(path) as file:
            file.write(letter * size)


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


def test_two_processes_that_replace_one_file_never_show_a_mixture(tmp_path):
    path, size = tmp_path / "state", 200_000
    path.write_bytes(b"a" * size)
    writers = [multiprocessing.Process(target=write_often, args=(path, letter, size)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        content = path.read_bytes()
        assert content in (b"a" * size, b"b" * size)
        reads += 1
    assert reads > 50 and all(writer.exitcode == 0 for writer in writers)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path, old = tmp_path / "x[1]", time.time() - 2 * ABANDONED_SECONDS
    left = tmp_path / "x[1].0123abcd.partial"
    left.write_bytes(b"half")
    young = tmp_path / "x[1].89abcdef.partial"
    young.write_bytes(b"half")
    os.utime(left, (old, old))
    with replacing(path) as file:
        living = next(p for p in tmp_path.glob("*.partial") if p != young)
        os.utime(living, (old, old))
        assert not left.exists()
        with replacing(path) as other:  # of another process, as far as the lock is concerned
            other.write(b"second")
        assert living.exists()
        file.write(b"first")
    assert path.read_bytes() == b"first" and young.exists()


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    refused = pytest.raises(UserError, match="cannot write .*folder: Is a directory; the previous file is intact")
    with refused, replacing(tmp_path / "folder") as file:
        file.write(b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_foreign_words_are_one_short_line():
    assert quoted("a.b") == "'a.b'" and escaped("größe 東") == "größe 東"
    assert quoted("a\nb\x1b[31m\u202e\ud800") == r"'a\nb\x1b[31m\u202e\ud800'"
    assert escaped("a\nb") == r"a\nb"
    assert len(quoted("x" * 10**6)) <= 82 and quoted("x" * 10**6, 20).count("…") == 1


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_never_in_the_place_of_another(tmp_path, monkeypatch, links):
    if not links:  # as on some network disks
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    path = tmp_path / "00000.png"
    with replacing(path, new=True) as file:
        file.write(b"first")
    refused = pytest.raises(UserError, match="00000.png is there already, from another run")
    with refused, replacing(path, new=True) as file:
        file.write(b"second")
    assert path.read_bytes() == b"first" and [file.name for file in tmp_path.iterdir()] == ["00000.png"]


def hold(folder, ready, end) -> None:
    with claimed(folder, "training"):
        ready.set()
        end.wait(20)


def test_a_folder_has_one_run_of_a_kind_at_a_time(tmp_path):
    ready, end = multiprocessing.Event(), multiprocessing.Event()
    other = multiprocessing.Process(target=hold, args=(tmp_path, ready, end))
    other.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match=f"process {other.pid} on .* is at work in"), claimed(tmp_path, "training"):
        pass
    with claimed(tmp_path, "drawing"):  # other files
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with claimed(tmp_path, "training"):
        assert (tmp_path / ".training.lock").exists()
    assert not list(tmp_path.iterdir())

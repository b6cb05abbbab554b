"""Atomic writing by several processes, and foreign words in messages."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from ldm.errors import UserError
from ldm.files import ABANDONED_SECONDS, escaped, quoted, replacing


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

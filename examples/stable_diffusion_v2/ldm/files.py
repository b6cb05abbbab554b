"""The ground floor: files that are replaced whole or not at all, their digests, and foreign words made fit to print."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ldm.errors import UserError

ABANDONED_SECONDS = 60  # a temporary file of this age that nobody holds was left by a process that was killed


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` only when the block has ended without an error.

    It is written beside it as ``<name>.<random>.partial``, forced to the disk, then renamed: a reader sees the old file
    or the new one, and a full disk costs neither. Several processes may replace the same file at once. What a killed
    process has left is removed. Raises UserError instead of OSError.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        _remove_abandoned(path)
        with open(partial, "xb") as file:
            with suppress(OSError):  # a disk without locks: nothing is taken for abandoned there
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
    except OSError as error:
        state = "the previous file is intact" if os.path.exists(path) else "nothing is left behind"
        advice = "make room there or write to another folder"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {state}; {advice}") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _remove_abandoned(path: Path) -> None:
    """Delete the temporary files of `path` that processes have left which are no longer there."""
    for partial in path.parent.glob(f"{_literal(path.name)}.*.partial"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime < ABANDONED_SECONDS:
                continue
            with open(partial, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where its writer lives
                partial.unlink()


def _literal(name: str) -> str:
    """A name as a pattern that fits it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def sha256(path: str | Path) -> bytes:
    """Of the file's content; OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def quoted(word: object, length: int = 80) -> str:
    """A word from a file, fit for a message of one line.

    It stands in quotes, unprintable characters are escaped, and the middle of a long word is left out. Whatever came
    out of somebody's file goes through here, or through `escaped`, before it is printed.
    """
    return repr(_shortened(str(word), length))


def escaped(text: object, length: int = 80) -> str:
    """`quoted` without the quotes, for names in a list."""
    shortened = _shortened(str(text), length)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shortened)


def _shortened(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[len(text) - half :]}"

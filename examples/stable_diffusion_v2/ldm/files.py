"""The ground floor: files that are replaced whole or not at all, their digests, and foreign words made fit to print."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ldm.errors import UserError

ABANDONED_SECONDS = 60  # a temporary file of this age that nobody holds was left by a process that was killed


@contextmanager
def replacing(path: str | Path, new: bool = False) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` only when the block has ended without an error.

    With `new` there must be no such file yet: of several processes that write one, a single one succeeds.

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
            (_create if new else os.replace)(partial, path)
    except FileExistsError:
        raise UserError(f"{path} is there already, from another run: choose another --output_path") from None
    except OSError as error:
        state = "the previous file is intact" if os.path.exists(path) else "nothing is left behind"
        advice = "make room there or write to another folder"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {state}; {advice}") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _create(partial: Path, path: Path) -> None:
    """Give a file its name; FileExistsError where the name is taken."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(partial, path)


@contextmanager
def claimed(folder: str | Path, work: str, instead: str = ", or choose another --output_path") -> Iterator[None]:
    """Inside, other processes that claim the folder for the same work get a UserError.

    It names this process, says to wait, and what they can do `instead`. The claim ends with the process, however that
    ends. On a disk without locks there is none.
    """
    path = Path(folder) / f".{work}.lock"
    file = _locked(path, instead)
    try:
        yield
    finally:
        if file:
            with suppress(OSError):
                path.unlink()
            file.close()


def _locked(path: Path, instead: str) -> BinaryIO | None:
    """The file, which says who holds it; None where it cannot be locked."""
    while True:
        try:
            file = open(path, "a+b", buffering=0)  # noqa: SIM115 (open as long as it is held)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise FileNotFoundError
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        except FileNotFoundError:  # its holder has just ended and removed it
            file.close()
        except BlockingIOError:
            file.seek(0)
            holder = escaped(file.read(200).decode(errors="replace")) or "another process"
            file.close()
            raise UserError(f"{holder} is at work in {path.parent}: wait for its end{instead}") from None
        except OSError:
            with suppress(OSError):
                path.unlink()
            file.close()
            return None


def _remove_abandoned(path: Path) -> None:
    """Delete the temporary files of `path` that processes have left which are no longer there."""
    for partial in path.parent.glob(f"{_literal(path.name)}.*.partial"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime < ABANDONED_SECONDS:
                continue
            with open(partial, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where its writer lives
                partial.unlink()


def private_folder(name: str) -> Path:
    """A folder of that name in the user's cache folder, made where it is not there, to which nobody else can write.

    Raises:
        UserError: it belongs to somebody else, everybody may write to it, or it cannot be made.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            raise UserError(f"{folder} belongs to another user: set XDG_CACHE_HOME to a folder of your own")
        if found.st_mode & stat.S_IWOTH:
            raise UserError(f"everybody may write to {folder}: delete it, it is made again")
        if found.st_mode & stat.S_IWGRP:  # by a umask for groups
            folder.chmod(stat.S_IMODE(found.st_mode) & ~stat.S_IWGRP)
    except (OSError, RuntimeError) as error:  # no room, no right, no home
        raise UserError(f"no folder {name} in the user's cache folder: {escaped(error, 200)}") from None
    return folder


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

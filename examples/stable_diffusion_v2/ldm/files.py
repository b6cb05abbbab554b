"""Files that are replaced whole or not at all, locks on folders, digests, and foreign words made fit to print."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import BinaryIO

from ldm.errors import UserError

ABANDONED_SECONDS = 60  # an unlocked temporary file of this age belongs to no living process


@contextmanager
def replacing(path: str | Path, new: bool = False) -> Iterator[BinaryIO]:
    """A file to write to. It takes the place of `path` when the block has ended without an error.

    The file is written beside `path` as `<name>.<random>.partial`, forced to the disk, then renamed. A reader sees the
    old file or the new one, and a full disk damages neither. Several processes may replace the same file at once.
    Temporary files of killed processes are removed.

    Args:
        path: the file to replace.
        new: `path` must not exist yet. Of several processes that write it, a single one succeeds.

    Raises:
        UserError: instead of OSError; with `new`, the file exists.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        _remove_abandoned(path)
        with open(partial, "xb") as file:
            with suppress(OSError):  # a disk without locks, where `_remove_abandoned` removes nothing
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


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write to. It takes the place of `folder` when the block has ended without an error.

    Whether `folder` may be replaced is for the caller to know.

    Raises:
        UserError: instead of OSError; what was there before is then still there.
    """
    folder = Path(folder)
    partial, old = (folder.with_name(f"{folder.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; nothing is left behind") from None
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(partial, ignore_errors=True)


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
    """Claim a folder for one kind of work. The claim ends with the block, or with the process however it ends.

    On a disk without locks there is no claim.

    Args:
        folder: the folder to claim.
        work: the kind of work. Claims for different kinds do not disturb one another.
        instead: the end of the message for other processes: what they can do instead of waiting.

    Raises:
        UserError: another process has claimed the folder for the same work. The message names that process.
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
    """The lock file, open, with this process's number in it; None where the disk has no locks or cannot be written to.

    Raises:
        UserError: another process holds the lock.
    """
    while True:
        try:
            file = open(path, "a+b", buffering=0)  # noqa: SIM115 (open as long as the lock is held)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise FileNotFoundError
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        except FileNotFoundError:  # the holder has just ended and removed the file
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
    """Delete the temporary files of `path` whose processes have ended."""
    for partial in path.parent.glob(f"{_literal(path.name)}.*.partial"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime < ABANDONED_SECONDS:
                continue
            with open(partial, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where the writer lives
                partial.unlink()


def private_folder(name: str) -> Path:
    """A folder of that name in the user's cache folder. Nobody else can write to it. It is made if it is missing.

    Raises:
        UserError: the folder belongs to somebody else, everybody may write to it, or it cannot be made.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            raise UserError(f"{folder} belongs to another user: set XDG_CACHE_HOME to a folder of your own")
        if found.st_mode & stat.S_IWOTH:
            raise UserError(f"everybody may write to {folder}: delete it, it is made again")
        if found.st_mode & stat.S_IWGRP:  # a umask for groups allowed it
            folder.chmod(stat.S_IMODE(found.st_mode) & ~stat.S_IWGRP)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        raise UserError(f"no folder {name} in the user's cache folder: {escaped(error, 200)}") from None
    return folder


def _literal(name: str) -> str:
    """The glob pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def sha256(path: str | Path) -> bytes:
    """The sha256 of a file's content, 32 bytes. OSError where the file cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def once_for_each_file(function: Callable) -> Callable:
    """The function of a file's path and more; each result is kept as long as the file's length and times are the same.

    A path that leads to no file goes to the function every time.
    """
    kept: dict[tuple, object] = {}

    @wraps(function)
    def of(path, *more):
        try:
            found = os.stat(path)
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return function(path, *more)
        key = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, *more
        if key not in kept:
            kept[key] = function(path, *more)
        return kept[key]

    return of


def quoted(word: object, length: int = 80) -> str:
    """A foreign word in a message: in quotes, unprintable characters escaped, a long word without its middle.

    Every word that came out of a user's file goes through `quoted` or `escaped` before it is printed.
    """
    return repr(_shortened(str(word), length))


def escaped(text: object, length: int = 80) -> str:
    """The same as `quoted` without the quotes, for names in a list."""
    shortened = _shortened(str(text), length)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shortened)


def _shortened(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[len(text) - half :]}"

"""The outputs of frozen networks on disk: one row per picture or caption, found by the content of either.

With a cache, neither the networks nor their outputs need memory while the UNet is trained, and a second run on the same
data starts at once. A row's key is its picture's or caption's content. The folder's name holds a key of the network and
its settings. A changed picture, caption, size or checkpoint therefore has another key, and its row is computed anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from ldm.checkpoint import release
from ldm.errors import UserError
from ldm.files import sha256
from ldm.pictures import make_folder

KEY_BYTES, SUM_BYTES = 32, 4
ENTRY_BYTES = KEY_BYTES + SUM_BYTES
CHECKED_BYTES = 1 << 30  # of a cache that are read when a run begins, in about a second
log = logging.getLogger(__name__)
OTHERWISE = "choose another --cache_path, or switch cache_latents and cache_text off"


def settings_key(tensors: dict[str, np.ndarray], **settings) -> str:
    """A key of 16 hexadecimal digits for a network's weights and the settings that decide its outputs.

    The pages of the checkpoint's file that are read for the key are released.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name], np.float32).reshape(-1).view(np.uint8))
        release(tensors[name])
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1 << 20)
def file_key(path: str) -> bytes:
    """The key of a picture: the sha256 of its file. UserError where the file cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"cannot read the picture '{path}': {error.strerror}") from None


def picture_key(path: str, mirrored: bool = False) -> bytes:
    """The key of a picture as it is seen: that of its file, and another one for the mirrored picture."""
    key = file_key(path)
    return hashlib.sha256(b"mirrored" + key).digest() if mirrored else key


def text_key(text: str) -> bytes:
    """The key of a caption: the sha256 of its UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class ArrayStore:
    """Rows (float32 arrays of one shape) in a file that only grows, and their keys in a second file.

    A row is written before its key. So a row that has a key is whole, even if the process is killed or the disk fills
    up in between. The row's checksum stands beside the key and shows later damage by disks and copies.

    Args:
        folder: the folder of the store, for one network and its settings alone.
        shape: the shape of one row.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, shape: tuple[int, ...]):
        self.folder, self.shape = make_folder(folder), tuple(shape)
        self.values_path, self.keys_path = self.folder / "rows.f32", self.folder / "keys.crc32"
        self.row_bytes = 4 * int(np.prod(shape))
        self.places: dict[bytes, int] = {}
        self.checksums: dict[bytes, int] = {}
        self.written = 0
        self.values = np.empty((0, *self.shape), np.float32)  # mapped when rows are taken
        self._read_keys()

    def __contains__(self, key: bytes) -> bool:
        return key in self.places

    def __len__(self) -> int:
        return len(self.places)

    def take(self, keys: Iterable[bytes]) -> np.ndarray:
        """The rows of these keys, float32 [len(keys), *shape]. All keys must be in the store.

        Raises:
            UserError: a row is damaged. Its key is struck out, so the next run computes the row anew.
        """
        keys = list(keys)
        rows = self._mapped()[[self.places[key] for key in keys]]
        bad = [key for key, row in zip(keys, rows) if self.checksums[key] != zlib.crc32(row)]
        if bad:
            self._strike_out(bad)
            raise UserError(f"{len(bad)} rows of the cache {self.folder} are damaged: --resume True computes them anew")
        return rows

    def forget_damaged(self, keys: Iterable[bytes]) -> None:
        """Drop the keys whose rows are damaged, so that the rows are computed again.

        Where the rows are larger than `CHECKED_BYTES` together, a sample of them is read, and all of them if one of the
        sample is damaged. `take` checks every row that it gives.
        """
        known = sorted((self.places[key], key) for key in set(keys) if key in self.places)
        sample = known[:: 1 + len(known) * self.row_bytes // CHECKED_BYTES]
        bad = self._damaged(sample)
        if bad and len(sample) < len(known):
            bad = self._damaged(known)
        for key in bad:
            del self.places[key], self.checksums[key]
        if bad:
            log.warning("%d damaged rows in the cache %s are computed again", len(bad), self.folder)

    def _damaged(self, known: list[tuple[int, bytes]]) -> list[bytes]:
        """The keys whose rows have another checksum, of pairs (place, key)."""
        return [key for place, key in known if self.checksums[key] != zlib.crc32(self._mapped()[place])]

    def _strike_out(self, keys: list[bytes]) -> None:
        """Overwrite these keys in the file with zeros, so that later runs do not find their rows."""
        with contextlib.suppress(OSError, UserError), self._locked("lock"), open(self.keys_path, "r+b") as file:
            for key in keys:
                file.seek(self.places[key] * ENTRY_BYTES)
                file.write(bytes(ENTRY_BYTES))

    def _mapped(self) -> np.ndarray:
        """All rows, float32 [written, *shape], as a map of the file."""
        if len(self.values) < self.written:
            self.values = np.memmap(self.values_path, np.float32, "r", shape=(self.written, *self.shape))
        return self.values

    def append(self, keys: list[bytes], values: np.ndarray) -> None:
        """Add rows, [len(keys), *shape]. Rows that another process has added meanwhile stay as they are.

        Raises:
            UserError: the disk is full or the folder is not writable. The earlier rows stay.
        """
        with self._locked("lock"):
            self._read_keys()  # other ranks may have added rows
            new = [n for n, key in enumerate(keys) if key not in self.places]
            self._write([keys[n] for n in new], values[new])

    def _write(self, keys: list[bytes], values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, np.float32)
        checksums = [zlib.crc32(row) for row in values]
        try:
            with open(self.values_path, "r+b" if self.values_path.exists() else "wb") as file:
                file.seek(self.written * self.row_bytes)  # over a row that was written without its key
                file.write(values.reshape(-1).view(np.uint8))
            with open(self.keys_path, "r+b" if self.keys_path.exists() else "wb") as file:
                file.seek(self.written * ENTRY_BYTES)
                file.write(b"".join(k + c.to_bytes(SUM_BYTES, "big") for k, c in zip(keys, checksums)))
        except OSError as error:
            raise UserError(f"cannot write the cache {self.folder}: {error.strerror}; make room, {OTHERWISE}") from None
        self.places.update({key: self.written + n for n, key in enumerate(keys)})
        self.checksums.update(zip(keys, checksums))
        self.written += len(keys)

    @contextlib.contextmanager
    def filling(self, share: tuple[int, int] = (0, 1)) -> Iterator[ArrayStore]:
        """One process at a time fills a share (rank, ranks). Other runs wait for it and then find its rows."""
        with self._locked("lock-{}-of-{}".format(*share)):
            self.refresh()
            yield self

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Inside, no other process holds the lock file of that name. UserError where the folder has no locks."""
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context(open(self.folder / name, "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise UserError(f"cannot lock {self.folder / name}: {error.strerror}; {OTHERWISE}") from None
            yield

    def refresh(self) -> None:
        """Read the keys that other processes have added."""
        with self._locked("lock"):
            self._read_keys()

    def _read_keys(self) -> None:
        """Read the keys from number `written` on, as far as their rows are in the file."""
        if not (self.keys_path.exists() and self.values_path.exists()):
            return
        with open(self.keys_path, "rb") as file:
            file.seek(self.written * ENTRY_BYTES)
            entries = file.read()
        rows = self.values_path.stat().st_size // self.row_bytes - self.written
        for i in range(min(len(entries) // ENTRY_BYTES, rows)):
            entry = entries[i * ENTRY_BYTES : (i + 1) * ENTRY_BYTES]
            key = entry[:KEY_BYTES]
            if any(entry):  # an entry of zeros was struck out
                self.places[key], self.checksums[key] = self.written, int.from_bytes(entry[KEY_BYTES:], "big")
            self.written += 1

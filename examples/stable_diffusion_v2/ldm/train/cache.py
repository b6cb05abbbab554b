"""What frozen networks answer, kept on disk: one row per picture or caption, found by its content.

Neither the networks nor their answers then need memory while the UNet is trained, and a second run on the same data
starts at once. Rows are keyed by content and stand in a folder keyed by the network and its settings, so a changed
picture, caption, size or checkpoint is computed anew, never mistaken.
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
CHECKED_BYTES = 1 << 30  # when a run begins: about a second
log = logging.getLogger(__name__)
OTHERWISE = "choose another --cache_path, or switch cache_latents and cache_text off"


def settings_key(tensors: dict[str, np.ndarray], **settings) -> str:
    """16 hexadecimal digits that stand for a network's weights and for what else decides its answers.

    Pages of a checkpoint's file that are read for it are let go.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name], np.float32).reshape(-1).view(np.uint8))
        release(tensors[name])
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1 << 20)
def file_key(path: str) -> bytes:
    """The key of a picture: sha256 of its file."""
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"cannot read the picture '{path}': {error.strerror}") from None


def text_key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class Rows:
    """Arrays float32 of one shape in a file that only grows, and their keys in another.

    A row is written before its key: whatever is killed or fills the disk in between, a row that has a key is whole. The
    row's checksum stands beside the key, for what disks and copies do to it later.

    Args:
        folder: for this network and these settings alone.
        shape: of one row.
    """

    def __init__(self, folder: str | Path, shape: tuple[int, ...]):
        self.folder, self.shape = make_folder(folder), tuple(shape)
        self.values_path, self.keys_path = self.folder / "rows.f32", self.folder / "keys.crc32"
        self.row_bytes = 4 * int(np.prod(shape))
        self.places: dict[bytes, int] = {}
        self.sums: dict[bytes, int] = {}  # of the rows
        self.written = 0
        self.values = np.empty((0, *self.shape), np.float32)  # mapped when it is needed
        self._read_keys()

    def __contains__(self, key: bytes) -> bool:
        return key in self.places

    def __len__(self) -> int:
        return len(self.places)

    def take(self, keys: Iterable[bytes]) -> np.ndarray:
        """The rows of these keys, [len(keys), *shape]; they must be there."""
        keys = list(keys)
        rows = self._mapped()[[self.places[key] for key in keys]]
        bad = [key for key, row in zip(keys, rows) if self.sums[key] != zlib.crc32(row)]
        if bad:
            self._strike_out(bad)
            raise UserError(f"{len(bad)} rows of the cache {self.folder} are damaged: --resume True computes them anew")
        return rows

    def forget_damaged(self, keys: Iterable[bytes]) -> None:
        """Drop those of these keys that have another row than was written for them, so that it is computed again.

        Of caches larger than `CHECKED_BYTES` a sample is read, and all the others too where one of these is damaged.
        `take` looks at every row.
        """
        known = sorted((self.places[key], key) for key in set(keys) if key in self.places)
        sample = known[:: 1 + len(known) * self.row_bytes // CHECKED_BYTES]
        bad = self._damaged(sample)
        if bad and len(sample) < len(known):
            bad = self._damaged(known)
        for key in bad:
            del self.places[key], self.sums[key]
        if bad:
            log.warning("%d damaged rows in the cache %s are computed again", len(bad), self.folder)

    def _damaged(self, known: list[tuple[int, bytes]]) -> list[bytes]:
        return [key for place, key in known if self.sums[key] != zlib.crc32(self._mapped()[place])]

    def _strike_out(self, keys: list[bytes]) -> None:
        """Overwrite these keys in the file, so that later runs do not find their rows."""
        with contextlib.suppress(OSError, UserError), self._locked("lock"), open(self.keys_path, "r+b") as file:
            for key in keys:
                file.seek(self.places[key] * ENTRY_BYTES)
                file.write(bytes(ENTRY_BYTES))

    def _mapped(self) -> np.ndarray:
        if len(self.values) < self.written:
            self.values = np.memmap(self.values_path, np.float32, "r", shape=(self.written, *self.shape))
        return self.values

    def append(self, keys: list[bytes], values: np.ndarray) -> None:
        """Add rows [len(keys), *shape]; those that another process has added meanwhile stay as they are.

        Raises:
            UserError: the disk is full or the folder not writable; the rows before stay.
        """
        with self._locked("lock"):
            self._read_keys()  # other ranks may have added theirs
            new = [n for n, key in enumerate(keys) if key not in self.places]
            self._write([keys[n] for n in new], values[new])

    def _write(self, keys: list[bytes], values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, np.float32)
        sums = [zlib.crc32(row) for row in values]
        try:
            with open(self.values_path, "r+b" if self.values_path.exists() else "wb") as file:
                file.seek(self.written * self.row_bytes)  # over a row that lost its key
                file.write(values.reshape(-1).view(np.uint8))
            with open(self.keys_path, "r+b" if self.keys_path.exists() else "wb") as file:
                file.seek(self.written * ENTRY_BYTES)
                file.write(b"".join(key + sum_.to_bytes(SUM_BYTES, "big") for key, sum_ in zip(keys, sums)))
        except OSError as error:
            raise UserError(f"cannot write the cache {self.folder}: {error.strerror}; make room, {OTHERWISE}") from None
        self.places.update({key: self.written + n for n, key in enumerate(keys)})
        self.sums.update(zip(keys, sums))
        self.written += len(keys)

    @contextlib.contextmanager
    def filling(self, share: tuple[int, int] = (0, 1)) -> Iterator[Rows]:
        """One process at a time may do a share of the work; other runs wait for it and then see its rows."""
        with self._locked("lock-{}-of-{}".format(*share)):
            self.refresh()
            yield self

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context(open(self.folder / name, "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise UserError(f"cannot lock {self.folder / name}: {error.strerror}; {OTHERWISE}") from None
            yield

    def refresh(self) -> None:
        """See what others have added."""
        with self._locked("lock"):
            self._read_keys()

    def _read_keys(self) -> None:
        if not (self.keys_path.exists() and self.values_path.exists()):
            return
        with open(self.keys_path, "rb") as file:
            file.seek(self.written * ENTRY_BYTES)
            entries = file.read()
        rows = self.values_path.stat().st_size // self.row_bytes - self.written
        for i in range(min(len(entries) // ENTRY_BYTES, rows)):
            entry = entries[i * ENTRY_BYTES : (i + 1) * ENTRY_BYTES]
            key = entry[:KEY_BYTES]
            if any(entry):  # or it was struck out
                self.places[key], self.sums[key] = self.written, int.from_bytes(entry[KEY_BYTES:], "big")
            self.written += 1

"""A side's pictures through the Inception network: moments of the features, and rows kept on disk; over ranks too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval import inception, metrics, pictures
from eval.sides import Side
from ldm import runtime
from ldm.errors import UserError
from ldm.files import replacing
from ldm.parallel.ranks import Ranks


class RowFile:
    """Rows of float32 in a temporary file, which grows batch by batch and is read as a memory map."""

    def __init__(self, width: int):
        self.file, self.width = tempfile.TemporaryFile(), width  # noqa: SIM115  it lives as long as the map

    def append(self, rows: np.ndarray) -> None:
        """Add rows [B, width]; UserError where the disk is full."""
        try:
            self.file.write(np.ascontiguousarray(rows, np.float32).data)
        except OSError as error:
            raise UserError(f"cannot keep features in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR") from None

    def mapped(self) -> np.ndarray:
        """All rows so far, [N, width]."""
        self.file.flush()
        if self.file.tell() == 0:  # an empty file cannot be mapped
            return np.empty((0, self.width), np.float32)
        return np.memmap(self.file, np.float32, "r").reshape(-1, self.width)


class Outputs:
    """What is collected of the network's outputs: the features' moments, and the rows that are asked for.

    Memory does not depend on the number of pictures.

    Args:
        kept: which rows are kept, of "features" and "logits".
    """

    def __init__(self, kept: Iterable[str]):
        widths = {"features": inception.FEATURES, "logits": inception.CLASSES}
        self.moments = metrics.Moments(inception.FEATURES)
        self.rows = {name: RowFile(widths[name]) for name in kept}

    def add(self, features: np.ndarray, logits: np.ndarray) -> None:
        """Take in a batch, [B, 2048] and [B, 1008]; UserError where the features are not finite."""
        if not np.isfinite(features).all():
            raise UserError("the Inception network gives NaN or infinity: are these its weights?")
        self.moments.add(features)
        outputs = {"features": features, "logits": logits}
        for name, file in self.rows.items():
            file.append(outputs[name])

    def join(self, ranks: Ranks, folder: Path) -> None:
        """Give rank 0 the outputs of all ranks, in the ranks' order, through files in a folder that all ranks share."""
        if not ranks.is_main:
            self._save(folder, ranks.rank)
        ranks.barrier("measured")
        if ranks.is_main:
            for rank in range(1, ranks.size):
                self._merge(folder, rank)
        ranks.barrier("parts read")

    def _save(self, folder: Path, rank: int) -> None:
        moments = self.moments
        with replacing(folder / f"{rank}-moments.npz") as file:
            np.savez(file, count=moments.count, mean=moments.mean, scatter=moments.scatter)
        for name, rows in self.rows.items():
            with replacing(folder / f"{rank}-{name}.npy") as file:
                np.save(file, rows.mapped())

    def _merge(self, folder: Path, rank: int) -> None:
        moments = metrics.Moments(inception.FEATURES)
        with np.load(folder / f"{rank}-moments.npz") as arrays:
            moments.count, moments.mean, moments.scatter = int(arrays["count"]), arrays["mean"], arrays["scatter"]
        self.moments.merge(moments)
        for name, file in self.rows.items():
            rows = np.load(folder / f"{rank}-{name}.npy", mmap_mode="r")
            for start in range(0, len(rows), metrics.BLOCK):
                file.append(rows[start : start + metrics.BLOCK])


def compute_statistics(
    side: Side, net: inception.Inception, resize: str, batch_size: int, kept: Iterable[str], ranks: Ranks, folder: Path
) -> None:
    """Fill in mean, covariance and count of a side, and the rows that are asked for.

    Each rank computes its share of the pictures; rank 0 has the whole. A side without pictures stays as it is.

    Args:
        side: the pictures.
        net: the network with its weights.
        resize: one of `pictures.RESIZE`.
        batch_size: pictures at once.
        kept: which rows the side keeps, of "features" and "logits".
        ranks: the processes that work together.
        folder: for the ranks' parts, on a disk that all ranks share; not used by one rank alone.

    Raises:
        UserError: fewer than two pictures can be read, or the network gives numbers that are not finite.
    """
    if not side.pictures:
        return
    total, own, outputs = len(side.pictures), ranks.share(side.pictures), Outputs(kept)
    with tqdm(total=len(own), unit="picture", desc=side.path) as bar:
        for batch, count, unreadable in pictures.batches(own, batch_size, pictures.RESIZE[resize]):
            side.unreadable += unreadable
            if count:
                outputs.add(*(output.asnumpy()[:count] for output in net(runtime.ms.Tensor.from_numpy(batch))))
            bar.update(count + len(unreadable))
    side.unreadable = sum(ranks.gather("unreadable pictures", side.unreadable), [])
    outputs.join(ranks, folder)
    if not ranks.is_main:
        return
    side.warn_of_unreadable()
    moments = outputs.moments
    if moments.count < 2:
        raise UserError(f"only {moments.count} of {total} pictures in {side.path} can be read")
    side.mean, side.covariance, side.count = moments.mean, moments.covariance(), moments.count
    rows = {name: file.mapped() for name, file in outputs.rows.items()}
    side.features, side.logits = rows.get("features"), rows.get("logits")

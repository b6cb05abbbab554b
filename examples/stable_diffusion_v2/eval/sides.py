"""The two sides of a comparison for eval_fid.py: a folder's pictures, or the statistics in an .npz file."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval import inception, npz
from eval.pictures import find_pictures
from ldm.data.captions import read_captions
from ldm.errors import UserError
from ldm.files import escaped, replacing

log = logging.getLogger("eval_fid")

LISTED = 10  # unreadable pictures that the screen names; the JSON file names all


@dataclass
class Side:
    """The pictures of one folder, or the statistics of a file; then the results of the network."""

    path: str
    pictures: list[Path] = field(default_factory=list)  # none where `path` is a statistics file
    settings: dict[str, str] = field(default_factory=dict)  # what a statistics file holds beside the numbers
    mean: np.ndarray | None = None  # [2048]
    covariance: np.ndarray | None = None  # [2048, 2048]
    count: int | None = None  # pictures; None where a statistics file does not say
    unreadable: list[str] = field(default_factory=list)  # one message for each unreadable picture
    features: np.ndarray | None = None  # [count, 2048], where they are asked for
    logits: np.ndarray | None = None  # [count, 1008], where they are asked for

    def check_settings(self, settings: dict[str, str]) -> None:
        """UserError where a statistics file was made with other settings; a warning where it does not say which."""
        for name, value in settings.items():
            if self.settings.get(name, value) != value:
                made = f"{self.path} was made with {name} {escaped(self.settings[name])}, not {value}"
                raise UserError(f"{made}: measure its pictures again")
        if not self.pictures and "resize" not in self.settings:
            hint = "pytorch-fid's files belong to --resize legacy, clean-fid's to clean"
            log.warning("%s does not say how its pictures were resized: %s", self.path, hint)

    def warn_of_unreadable(self) -> None:
        for message in self.unreadable[:LISTED]:
            log.warning("left out: %s", message)
        more = len(self.unreadable) - LISTED
        if more > 0:
            log.warning("left out: %d more of %s; --output names them all", more, self.path)


def find_side(path: str) -> Side:
    """The pictures of a folder or of its caption file, or a statistics file.

    Raises:
        UserError: there is neither, or there is only one picture.
    """
    if path.endswith(".npz"):
        return read_statistics(path)
    if path.endswith(".csv"):
        paths = [sample.path for sample in read_captions(Path(path).parent, Path(path).name)]
        found = [Path(path) for path in dict.fromkeys(paths)]  # several captions may share a picture
    else:
        found = find_pictures(path)
    if len(found) < 2:
        raise UserError(f"there is only one picture in {path}: a covariance needs two at least")
    return Side(path, found, count=len(found))


def read_statistics(path: str) -> Side:
    """The mu [2048] and sigma [2048, 2048] of an .npz file by pytorch-fid, clean-fid or `write_statistics`.

    Raises:
        UserError: the file cannot be read, or holds other arrays, or its numbers are not finite.
    """
    width = inception.FEATURES
    arrays, settings = npz.read(path, {"mu": (width,), "sigma": (width, width)})
    mean, covariance = arrays["mu"], arrays["sigma"]
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} holds numbers that are not finite: measure its pictures again, two at least")
    count = int(settings["count"]) if settings.get("count", "").isdecimal() else None
    return Side(path, settings=settings, mean=mean, covariance=covariance, count=count)


def write_statistics(path: str | Path, side: Side, settings: dict[str, str]) -> None:
    """Write mean, covariance and count of a side, with the settings that they depend on."""
    with replacing(path) as file:
        np.savez(file, mu=side.mean, sigma=side.covariance, count=side.count, **settings)

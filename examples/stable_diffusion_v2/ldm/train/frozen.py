"""What the frozen autoencoder and text encoder say of pictures and captions, computed once and kept on disk.

They give the same for the same picture and caption every time (ldm.train.cache has the files).
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.config.model import ModelConfig
from ldm.data.dataset import CaptionedImages
from ldm.data.images import DECODER, crop, to_float
from ldm.errors import UserError
from ldm.files import quoted
from ldm.model import StableDiffusion
from ldm.parts import TEXT, VAE
from ldm.train.cache import OTHERWISE, Rows, file_key, settings_key, text_key

log = logging.getLogger(__name__)


def require_finite(answers: np.ndarray, network: str, asked: list[str]) -> None:
    """UserError where a frozen network answers a picture or caption, by its name, with NaN or infinity."""
    bad = [name for name, answer in zip(asked, answers) if not np.isfinite(answer).all()]
    if bad:
        raise UserError(
            f"{network} gives NaN or infinity for {quoted(bad[0], 200)}, one of {len(bad)}: use --dtype float32, or "
            "take it out of the data"
        )


class FrozenOutputs:
    """The caches of a run: Gaussians of the latents by picture, features by caption.

    Args:
        folder: where they are kept.
        config: the model's.
        tensors: the checkpoint's; a cache belongs to the weights that filled it.
        image_size: side of the pictures in pixels.
        dtype: what the networks compute in.
        latents, text: which of the two are kept.
    """

    def __init__(
        self, folder: Path, config: ModelConfig, tensors: dict, image_size: int, dtype: str, latents: bool, text: bool
    ):
        def rows(kind: str, prefix: str, shape: tuple[int, ...], **settings) -> Rows:
            weights = {name: array for name, array in tensors.items() if name.startswith(prefix)}
            key = settings_key(weights, **settings)
            return Rows(folder / f"{kind}-{key}", shape)

        side, self.latents, self.features = image_size // config.vae.factor, None, None
        if latents:
            shape = (2, config.vae.embed_dim, side, side)  # mean and standard deviation
            facts = {"size": image_size, "scale": config.scale_factor, "dtype": dtype, "decoder": DECODER}
            self.latents = rows("latents", VAE, shape, **facts)
        if text:
            shape = (config.text.context_length, config.text.width)
            self.features = rows(
                "text",
                TEXT,
                shape,
                variant=config.text.variant,
                layers=config.text.layers,
                heads=config.text.heads,
                padding=config.text.padding,
                dtype=dtype,
            )

    def missing(self, data: CaptionedImages, share: tuple[int, int] = (0, 1)) -> tuple[list[str], list[str]]:
        """(paths, captions) that have no row, each once: of all, or of a share (rank, ranks) of all."""
        paths, texts = self._paths(data)[share[0] :: share[1]], self._texts(data)[share[0] :: share[1]]
        return (
            [path for path in paths if file_key(path) not in self.latents],
            [text for text in texts if text_key(text) not in self.features],
        )

    def _paths(self, data: CaptionedImages) -> list[str]:
        return [*dict.fromkeys(sample.path for sample in data.samples)] if self.latents is not None else []

    def _texts(self, data: CaptionedImages) -> list[str]:
        return [*dict.fromkeys(["", *(sample.text for sample in data.samples)])] if self.features is not None else []

    def forget_damaged(self, data: CaptionedImages, share: tuple[int, int] = (0, 1)) -> None:
        """Take the rows of a share (rank, ranks) of all for missing that are not what was written.

        Of large caches a sample is looked at: see `Rows.forget_damaged`.
        """
        for rows, names in ((self.latents, self._paths(data)), (self.features, self._texts(data))):
            if rows is not None:
                key = file_key if rows is self.latents else text_key
                rows.forget_damaged([key(name) for name in names[share[0] :: share[1]]])

    def fill(
        self, model: StableDiffusion, data: CaptionedImages, batch_size: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        """Compute what is missing of a share (rank, ranks) of all; what an earlier try has left is taken over.

        Raises:
            UserError: a picture is unreadable and such are not skipped; there is no room on the disk.
        """
        self._check_room(*self.missing(data))
        kinds = ((self.latents, "latents", self._fill_latents), (self.features, "text", self._fill_text))
        for n, (rows, title, fill) in enumerate(kinds):
            if rows is None:
                continue
            with rows.filling(share):
                todo = self.missing(data, share)[n]
                for start in tqdm(range(0, len(todo), batch_size), title, delay=2, leave=False):
                    fill(model, data, todo[start : start + batch_size], batch_size)

    def leave_out_missing(self, data: CaptionedImages) -> None:
        """After filling by all ranks, the pictures without a row are those that are unreadable and skipped."""
        for rows in (self.latents, self.features):
            if rows is not None:
                rows.refresh()
        unreadable, unknown = map(set, self.missing(data))
        if unknown or (unreadable and not data.skips_bad):
            where = (self.features if unknown else self.latents).folder
            raise UserError(f"{where} lacks what another rank has computed: is it on a disk that all hosts share?")
        if unreadable:
            log.warning("%d unreadable pictures are skipped", len(unreadable))
            data.leave_out(unreadable)

    def _fill_latents(self, model: StableDiffusion, data: CaptionedImages, paths: list[str], size: int) -> None:
        read = {path: data.read(path) for path in paths}
        pictures = {path: crop(picture, data.image_size) for path, picture in read.items() if picture is not None}
        if pictures:
            full = [*pictures.values()] + [next(iter(pictures.values()))] * (
                size - len(pictures)
            )  # one size, one graph
            gaussians = np.stack(model.encode_images(to_float(full)), 1)[: len(pictures)]
            require_finite(gaussians, "the autoencoder", [*pictures])
            self.latents.append([file_key(path) for path in pictures], gaussians)

    def _fill_text(self, model: StableDiffusion, data: CaptionedImages, texts: list[str], size: int) -> None:
        features = model.conditioner(texts + [""] * (size - len(texts))).context[: len(texts)]
        require_finite(features, "the text encoder", texts)
        self.features.append([text_key(text) for text in texts], features)

    def _check_room(self, paths: list[str], texts: list[str]) -> None:
        for rows, count in ((self.latents, len(paths)), (self.features, len(texts))):
            if rows is not None:
                free, needed = shutil.disk_usage(rows.folder).free, count * rows.row_bytes
                if needed > free:
                    raise UserError(
                        f"the cache {rows.folder} needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f}: "
                        + OTHERWISE
                    )

"""The outputs of the frozen autoencoder and text encoder, computed once per picture and caption and kept on disk.

A frozen network gives the same output for the same input every time, so one computation is enough. The files are those
of ldm.train.cache.
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
from ldm.train.cache import OTHERWISE, ArrayStore, file_key, settings_key, text_key

log = logging.getLogger(__name__)


def require_finite(outputs: np.ndarray, network: str, inputs: list[str]) -> None:
    """UserError where a frozen network's output for a picture or caption holds NaN or infinity.

    Args:
        outputs: float32 [B, ...].
        network: its name in the message.
        inputs: B file names or captions, for the message.
    """
    bad = [name for name, output in zip(inputs, outputs) if not np.isfinite(output).all()]
    if bad:
        raise UserError(
            f"{network} gives NaN or infinity for {quoted(bad[0], 200)}, one of {len(bad)}: use --dtype float32, or "
            "take it out of the data"
        )


class FrozenOutputs:
    """The caches of a run: the Gaussians of the latents by picture, and the text features by caption.

    Args:
        folder: the folder of the caches.
        config: the model's config.
        tensors: the checkpoint's tensors by name. A cache belongs to the weights that filled it.
        image_size: side of the pictures in pixels.
        dtype: the type in which the networks compute.
        latents: whether the Gaussians of the latents are kept.
        text: whether the text features are kept.
    """

    def __init__(
        self, folder: Path, config: ModelConfig, tensors: dict, image_size: int, dtype: str, latents: bool, text: bool
    ):
        def store(kind: str, prefix: str, shape: tuple[int, ...], **settings) -> ArrayStore:
            weights = {name: array for name, array in tensors.items() if name.startswith(prefix)}
            key = settings_key(weights, **settings)
            return ArrayStore(folder / f"{kind}-{key}", shape)

        side, self.latents, self.features = image_size // config.vae.factor, None, None
        if latents:
            shape = (2, config.vae.embed_dim, side, side)  # mean and standard deviation
            facts = {"size": image_size, "scale": config.scale_factor, "dtype": dtype, "decoder": DECODER}
            self.latents = store("latents", VAE, shape, **facts)
        if text:
            shape = (config.text.context_length, config.text.width)
            self.features = store(
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
        """The (paths, captions) without a row, each once, in a share (rank, ranks) of the data."""
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
        """Drop the damaged rows of a share (rank, ranks) of the data.

        Of a large cache only a sample is read: see `ArrayStore.forget_damaged`.
        """
        for store, names in ((self.latents, self._paths(data)), (self.features, self._texts(data))):
            if store is not None:
                key = file_key if store is self.latents else text_key
                store.forget_damaged([key(name) for name in names[share[0] :: share[1]]])

    def fill(
        self, model: StableDiffusion, data: CaptionedImages, batch_size: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        """Compute the missing rows of a share (rank, ranks) of the data. Rows of an earlier run stay.

        Raises:
            UserError: a picture is unreadable and unreadable pictures are not skipped; the disk has no room.
        """
        self._check_room(*self.missing(data))
        kinds = ((self.latents, "latents", self._fill_latents), (self.features, "text", self._fill_text))
        for n, (store, title, fill) in enumerate(kinds):
            if store is None:
                continue
            with store.filling(share):
                todo = self.missing(data, share)[n]
                for start in tqdm(range(0, len(todo), batch_size), title, delay=2, leave=False):
                    fill(model, data, todo[start : start + batch_size], batch_size)

    def leave_out_missing(self, data: CaptionedImages) -> None:
        """Leave the unreadable pictures out of the data: those without a row after all ranks have filled the caches.

        Raises:
            UserError: a row is missing that another rank has computed; no picture remains.
        """
        for store in (self.latents, self.features):
            if store is not None:
                store.refresh()
        unreadable, unknown = map(set, self.missing(data))
        if unknown or (unreadable and not data.skips_bad):
            where = (self.features if unknown else self.latents).folder
            raise UserError(f"{where} lacks what another rank has computed: is it on a disk that all hosts share?")
        if unreadable:
            log.warning("%d unreadable pictures are skipped", len(unreadable))
            data.leave_out(unreadable)

    def _fill_latents(self, model: StableDiffusion, data: CaptionedImages, paths: list[str], size: int) -> None:
        """Add the rows of up to `size` pictures, computed as a batch of that size."""
        read = {path: data.read(path) for path in paths}
        pictures = {path: crop(picture, data.image_size) for path, picture in read.items() if picture is not None}
        if pictures:
            filler = [next(iter(pictures.values()))] * (size - len(pictures))  # one batch size, so one graph
            batch = to_float([*pictures.values(), *filler])
            gaussians = np.stack(model.encode_images(batch), 1)[: len(pictures)]
            require_finite(gaussians, "the autoencoder", [*pictures])
            self.latents.append([file_key(path) for path in pictures], gaussians)

    def _fill_text(self, model: StableDiffusion, data: CaptionedImages, texts: list[str], size: int) -> None:
        """Add the rows of up to `size` captions, computed as a batch of that size."""
        features = model.conditioner(texts + [""] * (size - len(texts))).context[: len(texts)]
        require_finite(features, "the text encoder", texts)
        self.features.append([text_key(text) for text in texts], features)

    def _check_room(self, paths: list[str], texts: list[str]) -> None:
        """UserError where the disk has no room for so many new rows."""
        for store, count in ((self.latents, len(paths)), (self.features, len(texts))):
            if store is not None:
                free, needed = shutil.disk_usage(store.folder).free, count * store.row_bytes
                if needed > free:
                    raise UserError(
                        f"the cache {store.folder} needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f}: "
                        + OTHERWISE
                    )

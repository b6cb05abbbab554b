"""The outputs of the frozen autoencoder and text encoders, computed once per picture and caption and kept on disk.

A frozen network gives the same output for the same input every time, so one computation is enough. The files are those
of ldm.train.cache.
"""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ldm.conditioning import Condition, Wording
from ldm.config.model import ModelConfig
from ldm.data.dataset import CaptionedImages
from ldm.data.images import DECODER, crop, to_float
from ldm.errors import UserError
from ldm.files import quoted
from ldm.model import StableDiffusion
from ldm.parts import TEXT, VAE
from ldm.train.cache import OTHERWISE, ArrayStore, picture_key, settings_key, text_key

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


class View(NamedTuple):
    """A picture's path, and whether the picture is seen mirrored."""

    path: str
    mirrored: bool = False


class FrozenOutputs:
    """The caches of a run: the Gaussians of the latents by picture, and the condition by caption.

    Sizes are no part of that condition. A row of text is the features of all tokens, and the pooled text after them.

    Args:
        folder: the folder of the caches.
        config: the model's config.
        tensors: the checkpoint's tensors by name. A cache belongs to the weights that filled it.
        image_size: side of the pictures in pixels.
        dtype: the type in which the networks compute.
        latents: whether the Gaussians of the latents are kept.
        text: whether the conditions are kept.
        mirrored: whether the Gaussians of the mirrored pictures are kept too.
        pieces: of each caption; see `Wording`.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        tensors: dict,
        image_size: int,
        dtype: str,
        latents: bool,
        text: bool,
        mirrored: bool = False,
        pieces: int = 1,
    ):
        def store(kind: str, prefix: str, shape: tuple[int, ...], **settings) -> ArrayStore:
            weights = {name: array for name, array in tensors.items() if name.startswith(prefix)}
            key = settings_key(weights, **settings)
            return ArrayStore(folder / f"{kind}-{key}", shape)

        side, self.latents, self.features, self.mirrored = image_size // config.vae.factor, None, None, mirrored
        self.pieces = pieces
        if latents:
            shape = (2, config.vae.embed_dim, side, side)  # mean and standard deviation
            facts = {"size": image_size, "scale": config.scale_factor, "dtype": dtype, "decoder": DECODER}
            self.latents = store("latents", VAE, shape, **facts)
        if text:
            self.context = pieces * config.text.context_length, config.unet.context_dim
            pooled = config.texts[-1].projection or 0
            facts = {**_text_facts(config), "dtype": dtype, **({"pieces": pieces} if pieces > 1 else {})}
            self.features = store("text", TEXT, (math.prod(self.context) + pooled,), **facts)

    def condition(self, texts: list[str]) -> Condition:
        """The condition of these captions, without sizes. All must be in the cache. UserError as `ArrayStore.take`."""
        rows, end = self.features.take(map(text_key, texts)), math.prod(self.context)
        context, pooled = rows[:, :end].reshape(-1, *self.context), rows[:, end:]
        return Condition(context, pooled if pooled.size else None)

    def missing(self, data: CaptionedImages, share: tuple[int, int] = (0, 1)) -> tuple[list[View], list[str]]:
        """The (views, captions) without a row, each once, in a share (rank, ranks) of the data."""
        views, texts = self._views(data)[share[0] :: share[1]], self._texts(data)[share[0] :: share[1]]
        return (
            [view for view in views if picture_key(*view) not in self.latents],
            [text for text in texts if text_key(text) not in self.features],
        )

    def _views(self, data: CaptionedImages) -> list[View]:
        if self.latents is None:
            return []
        paths = dict.fromkeys(sample.path for sample in data.samples)
        return [View(path, way) for way in ((False, True) if self.mirrored else (False,)) for path in paths]

    def _texts(self, data: CaptionedImages) -> list[str]:
        return [*dict.fromkeys(["", *(sample.text for sample in data.samples)])] if self.features is not None else []

    def forget_damaged(self, data: CaptionedImages, share: tuple[int, int] = (0, 1)) -> None:
        """Drop the damaged rows of a share (rank, ranks) of the data.

        Of a large cache only a sample is read: see `ArrayStore.forget_damaged`.
        """
        views, texts = self._views(data)[share[0] :: share[1]], self._texts(data)[share[0] :: share[1]]
        if self.latents is not None:
            self.latents.forget_damaged([picture_key(*view) for view in views])
        if self.features is not None:
            self.features.forget_damaged([text_key(text) for text in texts])

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
        views, unknown = self.missing(data)
        unreadable = {view.path for view in views}
        if unknown or (unreadable and not data.skips_bad):
            where = (self.features if unknown else self.latents).folder
            raise UserError(f"{where} lacks what another rank has computed: is it on a disk that all hosts share?")
        if unreadable:
            log.warning("%d unreadable pictures are skipped", len(unreadable))
            data.leave_out(unreadable)

    def _fill_latents(self, model: StableDiffusion, data: CaptionedImages, views: list[View], size: int) -> None:
        """Add the rows of up to `size` pictures, computed as a batch of that size."""
        read = {view: data.read(view.path) for view in views}
        pictures = {view: crop(picture, data.image_size) for view, picture in read.items() if picture is not None}
        pictures = {view: picture[:, ::-1] if view.mirrored else picture for view, picture in pictures.items()}
        if pictures:
            filler = [next(iter(pictures.values()))] * (size - len(pictures))  # one batch size, so one graph
            batch = to_float([*pictures.values(), *filler])
            gaussians = np.stack(model.encode_images(batch), 1)[: len(pictures)]
            require_finite(gaussians, "the autoencoder", [view.path for view in pictures])
            self.latents.append([picture_key(*view) for view in pictures], gaussians)

    def _fill_text(self, model: StableDiffusion, data: CaptionedImages, texts: list[str], size: int) -> None:
        """Add the rows of up to `size` captions, computed as a batch of that size."""
        condition = model.conditioner(texts + [""] * (size - len(texts)), Wording(self.pieces))
        rows = np.concatenate([field.reshape(size, -1) for field in condition.given()], 1)[: len(texts)]
        require_finite(rows, "the text encoder", texts)
        self.features.append([text_key(text) for text in texts], rows)

    def _check_room(self, views: list[View], texts: list[str]) -> None:
        """UserError where the disk has no room for so many new rows."""
        for store, count in ((self.latents, len(views)), (self.features, len(texts))):
            if store is not None:
                free, needed = shutil.disk_usage(store.folder).free, count * store.row_bytes
                if needed > free:
                    raise UserError(
                        f"the cache {store.folder} needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f}: "
                        + OTHERWISE
                    )


def _text_facts(config: ModelConfig) -> dict:
    """The settings of the text encoders that decide their outputs."""
    text = config.text
    if config.size_numbers == 0 and text.context_layer is None:  # as older caches have them
        return {name: getattr(text, name) for name in ("variant", "layers", "heads", "padding")}
    return {"texts": [asdict(each) for each in config.texts]}

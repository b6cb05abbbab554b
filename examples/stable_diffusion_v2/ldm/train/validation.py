"""The pictures of a training run that show how far it is."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm import runtime
from ldm.config.model import ModelConfig
from ldm.model import StableDiffusion
from ldm.pictures import grid, make_folder, save_png
from ldm.pipeline import CACHED_PROMPTS, Pipeline, Settings, sampler_of, settings_for
from ldm.signals import Stopped

log = logging.getLogger(__name__)


def settings_of(args: argparse.Namespace, config: ModelConfig) -> Settings:
    """How validation pictures are drawn: as by text_to_image.py, unless an option says otherwise."""
    sampler, size = sampler_of(config, args.validation_sampler), args.image_size
    steps, scale = args.validation_steps, args.validation_scale
    settings = settings_for(config, sampler, args.seed, steps=steps, guidance_scale=scale, height=size, width=size)
    return replace(settings, long_prompts=args.text_chunks > 1)


class Validation:
    """One picture per validation prompt, always from the same noise, side by side.

    Args:
        args: the options of train_text_to_image.py.
        config: the model's config.
        model: draws with the weights that it has at that time.
        frozen_text: the text encoders are not trained, and nothing else needs them. The prompts are encoded now, and
            the encoders' memory is given back.
    """

    def __init__(self, args: argparse.Namespace, config: ModelConfig, model: StableDiffusion, frozen_text: bool):
        self.args, self.config, self.model, self.ahead = args, config, model, None
        if frozen_text and len(args.validation_prompts) <= CACHED_PROMPTS // 2:
            self.ahead, settings = Pipeline(config, model), settings_of(args, config)
            wordings = [self.ahead.wording([prompt], [""], settings) for prompt in args.validation_prompts]
            texts = dict.fromkeys([*zip(args.validation_prompts, wordings), *(("", wording) for wording in wordings)])
            self.ahead.encode_ahead(*zip(*texts))

    def draw(self, step: int, by_layers: bool) -> None:
        """Draw and write the pictures after so many steps; `by_layers`: with one graph for each kind of layer.

        Raises:
            Stopped: a signal has come.
        """
        args, pipeline = self.args, self.ahead or Pipeline(self.config, self.model)
        path = make_folder(Path(args.output_path) / "validation") / f"{step:06}.png"
        settings, prompts = settings_of(args, self.config), enumerate(args.validation_prompts)
        with self.model.unet_by_layers() if by_layers else nullcontext():
            pictures = [pipeline.draw([prompt], [""], [n], settings, until_asked)[0] for n, prompt in prompts]
        save_png(grid(np.stack(pictures), 1 if len(pictures) < 5 else 2), path)
        log.info("validation pictures: %s", path)


def until_asked(times: Iterable) -> Iterator:
    """The times of a sampler. Raises Stopped once a signal asks this process to end."""
    for t in times:
        if runtime.signals.asked:
            raise Stopped(runtime.signals.asked)
        yield t

"""Training low-rank adapters (LoRA, arXiv 2106.09685) beside the frozen weights of a model."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor

from ldm import checkpoint
from ldm.checkpoint import lora
from ldm.config.model import ModelConfig
from ldm.data.batches import Batch
from ldm.data.dataset import CaptionedImages
from ldm.errors import UserError
from ldm.files import quoted
from ldm.model import StableDiffusion
from ldm.networks import adapter
from ldm.networks.layers import fill
from ldm.parallel.ranks import Ranks
from ldm.parts import TEXT, UNET
from ldm.randomness import generator
from ldm.train.finetune import FineTune, ckpt_folder
from ldm.train.run import Plan

SUFFIXES = {"mindone": ".ckpt", "kohya": ".safetensors", "diffusers": ".safetensors", "peft": ""}  # by --lora_format


def check(args: argparse.Namespace) -> None:
    """UserError where the options for adapters contradict each other or others."""
    if args.lora_rank < 1:
        raise UserError(f"lora_rank is {args.lora_rank}; give a whole number from 1, 4 to 128 are usual")
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"lora_dropout is {args.lora_dropout}; give a number from 0 to below 1")
    if args.lora_alpha is not None and args.lora_scale != 1:
        raise UserError("lora_alpha and lora_scale say the same: the scale is alpha / rank; give one of them")
    if not np.isfinite(scale(args)) or scale(args) == 0:
        raise UserError(f"the adapters' scale is {scale(args)}: give another lora_alpha or lora_scale")
    if not (args.lora_ft_unet or args.lora_ft_text_encoder):
        raise UserError("lora_ft_unet and lora_ft_text_encoder are both False: nothing is left to train")
    others = ("train_text_encoder", "unet_initialize_random", "text_encoder_initialize_random", "trainable_modules")
    wrong = [name for name in others if getattr(args, name)]
    if wrong:
        raise UserError(f"use_lora trains adapters alone: leave out {' and '.join(wrong)}, or set use_lora to False")


def scale(args: argparse.Namespace) -> float:
    """What the product of an adapter's two matrices is multiplied by."""
    return args.lora_scale if args.lora_alpha is None else args.lora_alpha / args.lora_rank


class TrainAdapters(FineTune):
    """Adapters in the UNet, and in the text encoder if asked. All weights of the checkpoint stay as they are."""

    def __init__(self, args, config: ModelConfig, tensors: dict, data: CaptionedImages, dtype: str, ranks: Ranks):
        super().__init__(args, config, tensors, data, dtype, ranks)
        if ranks.is_main:
            self.try_export(ckpt_folder(args))

    def trained_parameters(self, dtype: str) -> list[Parameter]:
        args, parts = self.args, ((UNET, self.args.lora_ft_unet), (TEXT, self.args.lora_ft_text_encoder))
        under = tuple(part for part, asked in parts if asked)
        for param in self.model.get_parameters():
            param.requires_grad = False
        names = adapter.chosen(self.model, args.lora_targets, under)
        self.places = adapter.attach(self.model, names, args.lora_rank, scale(args))
        adapter.initialize(self.places, args.seed)
        if args.lora_ckpt_path:
            self.start_from(args.lora_ckpt_path)
        self.model.compute_in(dtype)
        return list(adapter.parameters(self.places))

    def twin(self, tensors: dict, dtype: str) -> StableDiffusion:
        args, model = self.args, super().twin(tensors, dtype)
        adapter.attach(model, adapter.chosen(model, args.lora_targets, (UNET,)), args.lora_rank, scale(args))
        model.compute_in(dtype)
        return model

    def start_from(self, path: str) -> None:
        """Give the adapters the values of a file, of any form, which must hold the same layers in the same rank.

        Raises:
            UserError: it cannot be read, is for another prediction type, or has other layers, ranks or shapes.
        """
        args, start, places = self.args, lora.load(path), dict(zip(self.modules(), self.places))
        lora.check_type(start, self.config.prediction_type)
        other = sorted(places.keys() ^ start.pairs.keys())
        if other:
            lora.check_family(start, lora.layout_of(self.model.shapes()))
            raise UserError(
                f"{path} has {len(start.pairs)} layers, this run trains {len(places)}: {len(other)} are in one of them "
                f"alone, first {quoted(other[0])}; choose its layers by --lora_targets and --lora_ft_text_encoder"
            )
        for module, place in places.items():
            pair, low_rank = start.pairs[module], place.adapter
            if pair.rank != args.lora_rank:
                raise UserError(f"{path} has rank {pair.rank} at {module}: go on with it by --lora_rank {pair.rank}")
            if (pair.down.size, pair.up.size) != (low_rank.lora_A.size, low_rank.lora_B.size):
                raise UserError(f"{path} has other shapes than the model at {module}: it is of another base")
            factor = np.float32(pair.scale / scale(args))
            fill(low_rank.lora_A, pair.down.reshape(low_rank.lora_A.shape), copy=True)
            fill(low_rank.lora_B, pair.up.reshape(low_rank.lora_B.shape) * factor, copy=True)

    def modules(self) -> list[str]:
        """The name of each adapter's layer in `checkpoint.lora`."""
        layout = lora.layout_of(self.model.shapes())
        return [lora.module(place.weight, layout, place.which) for place in self.places]

    def changed_source(self) -> str | None:
        return checkpoint.changed(self.model.views.values())

    def inputs(self, batch: Batch, step: int) -> tuple[Tensor, ...]:
        if self.args.lora_dropout:
            for n, place in enumerate(self.places):
                place.adapter.drop(generator(self.args.seed, "lora dropout", step, n), self.args.lora_dropout)
        return super().inputs(batch, step)

    def export_bytes(self) -> int:
        return 4 * sum(param.size for param in adapter.parameters(self.places))

    def export(self, step: int, plan: Plan) -> Path:
        """Write the adapters, averaged where there are averages; returns the path."""
        path = self.exported(step, plan)
        self.write(path)
        return path

    def exported(self, step: int, plan: Plan) -> Path:
        """The path of the adapters' file or folder.

        PEFT's folders of SDXL are where DiffEngine has them, in step{step} of the run's own folder.
        """
        if self.args.lora_format == "peft" and self.config.size_numbers:
            return Path(self.args.output_path) / f"step{step}"
        return super().exported(step, plan)

    def suffix(self) -> str:
        return SUFFIXES[self.args.lora_format]

    def write(self, path: Path) -> None:
        """UserError where the form has no place for some of the adapters."""
        args, ema = self.args, self.step.ema
        trained = {param.name: param.asnumpy() for param in adapter.parameters(self.places)}
        trained.update(ema.tensors() if ema else {})
        alpha, pairs = scale(args) * args.lora_rank, {}
        for module, place in zip(self.modules(), self.places):
            down, up = trained[place.adapter.lora_A.name], trained[place.adapter.lora_B.name]
            up = up.reshape(*up.shape, *(1 for _ in down.shape[2:]))
            pairs[module] = lora.Pair(down, up, alpha)
        lora.save(path, lora.Adapter(pairs, self.words(), args.lora_format), args.lora_format, args.ckpt_dtype)

    def try_export(self, folder: Path) -> None:
        """Write once, and delete: a form that cannot hold these adapters is found before the first step."""
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            self.write(Path(scratch) / f"sd-0{self.suffix()}")

    def validate(self, step: int) -> None:
        for place in self.places:
            place.adapter.drop(None, 0.0)  # until the next step
        super().validate(step)

"""UNet, autoencoder and text encoder together, with the tokenizer and the latents' scale; arrays in, arrays out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn

from ldm import checkpoint, runtime
from ldm.conditioning import Condition, Conditioner, embed_numbers
from ldm.config.model import TextConfig
from ldm.networks import text
from ldm.networks.blockwise import BlockwiseText, BlockwiseUNet, lent_parameters
from ldm.networks.layers import fill
from ldm.networks.text import Under
from ldm.networks.unet import UNet
from ldm.networks.vae import AutoencoderKL, VAEEncode
from ldm.parts import PARTS, TEXT, UNET, VAE
from ldm.text.tokenizer import Tokenizer, padding_of

log = logging.getLogger(__name__)


class Networks(NamedTuple):
    """The networks to be called; one that is not built is None. MindSpore finds no parameters in this tuple."""

    unet: UNet | BlockwiseUNet | None
    vae: AutoencoderKL | None
    text: nn.Cell | BlockwiseText | None
    vae_encode: VAEEncode | None


class StableDiffusion(nn.Cell):
    """The networks of one model config; parameters are named as in Stability's single-file checkpoints.

    Args:
        config: ModelConfig.
        parts: which networks to build; one that is left out takes no memory and must not be used.
    """

    def __init__(self, config, parts: tuple[str, ...] = PARTS):
        super().__init__()
        unet = UNet(config.unet) if UNET in parts else None
        vae = AutoencoderKL(config.vae) if VAE in parts else None
        text_encoder, named = text.build(config.texts) if TEXT in parts else (None, None)
        if unet:
            self.model = Under(diffusion_model=unet)
        if vae:
            self.first_stage_model = vae
        if text_encoder:
            self.cond_stage_model = named
        self.tokenizers = tuple(map(tokenizer_of, config.texts))
        self.networks = Networks(unet, vae, text_encoder, VAEEncode(vae) if vae else None)
        self.scale_factor = config.scale_factor
        self.vae_in_float32 = config.vae.force_upcast
        self.size_numbers, self.size_channels = config.size_numbers, config.unet.size_channels
        self.guidance_channels = config.unet.time_cond_proj_dim
        self.channels, self.factor = config.vae.embed_dim, config.vae.factor
        self.views: dict[str, np.ndarray] = {}  # of a checkpoint's file; parameters share their memory
        self.set_train(False)

    @property
    def unet(self) -> UNet:
        return self.networks.unet

    @property
    def vae(self) -> AutoencoderKL:
        return self.networks.vae

    @property
    def text_encoder(self) -> nn.Cell:
        return self.networks.text

    @property
    def conditioner(self) -> Conditioner:
        """Makes conditions for the UNet from texts."""
        return Conditioner(self.tokenizers, self.networks.text)

    def compile_blockwise(self) -> None:
        """Compile UNet and text encoder block by block, in a fraction of the time and the memory; for drawing alone."""
        unet, text = self.networks.unet, self.networks.text
        self.networks = self.networks._replace(unet=BlockwiseUNet(unet), text=BlockwiseText(text))

    @contextmanager
    def unet_by_layers(self) -> Iterator[None]:
        """Inside the block the UNet runs by one graph for each kind of layer; its weights must not change there."""
        networks, blocks = self.networks, BlockwiseUNet(self.networks.unet)
        self.networks = networks._replace(unet=blocks)
        try:
            yield
        finally:
            blocks.give_back()
            self.networks = networks

    def told_sizes(self, condition: Condition, numbers: np.ndarray) -> Condition:
        """The condition, with the sizes where the UNet is told them; `numbers`: [B, n], rows of `Sizes.numbers`."""
        return condition.with_sizes(embed_numbers(numbers, self.size_channels)) if self.size_numbers else condition

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, H / f, W / f] for a picture's height and width in pixels."""
        return self.channels, height // self.factor, width // self.factor

    def forget_text_encoder(self) -> None:
        """Free the text encoder, a quarter of the whole model's memory. It must not be used any more."""
        self.give_back(TEXT)
        self.views = {name: array for name, array in self.views.items() if not name.startswith(TEXT)}
        del self.cond_stage_model
        self.networks = self.networks._replace(text=None)

    def give_back(self, part: str) -> None:
        """Give back the memory of a network that is not needed for a while, if it can be read from its file again."""
        for name, array in self.views.items():
            if name.startswith(part):
                checkpoint.release(array)

    def encode_images(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the scaled latents' Gaussian, each [B, C, H / f, W / f].

        Args:
            images: float32 [B, 3, H, W] in [-1, 1].
        """
        mean, log_var = (part.asnumpy().astype(np.float32) for part in self.networks.vae_encode(Tensor(images)))
        return mean * self.scale_factor, np.exp(log_var / 2) * self.scale_factor

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures, float32 [B, 3, H, W] about [-1, 1], of scaled latents [B, C, H / f, W / f]."""
        return self.vae(Tensor(self.unscaled(latents))).asnumpy().astype(np.float32)

    def unscaled(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents, without their scale, for the autoencoder's own decoder; float32."""
        return (latents / self.scale_factor).astype(np.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape."""
        return {name: parameter.shape for name, parameter in self.parameters_and_names()}

    def compute_in(self, dtype: str, weights: bool = False) -> None:
        """Let the networks multiply in this type; the autoencoder stays in float32 where it must.

        weights: cast them too, for drawing alone; see `runtime.set_compute_dtype`.
        """
        for part in (self.networks.unet, self.networks.text, None if self.vae_in_float32 else self.networks.vae):
            if part:
                runtime.set_compute_dtype(part, dtype, weights)

    def load(
        self,
        tensors: dict[str, np.ndarray],
        path: str,
        prefixes: tuple[str, ...] = ("",),
        copy: bool = False,
        as_stored: tuple[str, ...] = (),
    ) -> None:
        """Set the parameters under these prefixes, all of them or none; UserError where names or shapes do not fit.

        Without `copy` they are views of the file where possible, for short runs: the file must not change then.
        `as_stored` are parts whose layers are run one by one: their weights stay in the file in its own type, and each
        layer gets them in float32 for as long as it runs; see ldm.networks.blockwise. NaN or infinity gives a warning.
        A thread checks the views while this one goes on. It reads the file ahead, in the order in which the networks
        are used.
        """
        fitting, bad, views = checkpoint.match(tensors, self.shapes(), path, prefixes), [], {}
        by_layers = {UNET: self.networks.unet, TEXT: self.networks.text}
        lent = lent_parameters(*(by_layers[part] for part in as_stored))
        for name, parameter in self.parameters_and_names():
            if name not in fitting:
                continue
            if id(parameter) in lent and fitting[name].dtype != np.float32:
                parameter.stored = views[name] = fitting[name]
            elif fill(parameter, fitting[name], copy):
                if not is_finite(fitting[name]):
                    bad.append(name)
                checkpoint.release(fitting[name])
            else:
                views[name] = fitting[name]
        self.views |= views

        def check() -> None:
            for part in (TEXT, UNET, VAE):
                bad.extend(name for name, array in views.items() if name.startswith(part) and not is_finite(array))
            self.give_back(VAE)  # it is used last
            if bad:
                log.warning("%s: NaN or infinity in %d of %d tensors, first %s", path, len(bad), len(fitting), bad[0])

        if views:
            Thread(target=check).start()
        else:
            check()

    def tensors(self) -> dict[str, np.ndarray]:
        """Every parameter by name, float32."""
        return {name: parameter.asnumpy() for name, parameter in self.parameters_and_names()}


def tokenizer_of(config: TextConfig) -> Tokenizer:
    """The tokenizer of a text encoder."""
    return Tokenizer(config.vocab_size, config.context_length, padding_of(config.variant, config.padding))


def is_finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(checkpoint.widened(array).sum(dtype=np.float32)))

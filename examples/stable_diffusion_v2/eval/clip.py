"""CLIP's two towers: pictures and texts to features, whose cosine tells how well they fit (arXiv 2103.00020).

The models are OpenAI's ViT-B/32, B/16 and L/14 (quick GELU) and OpenCLIP's ViT-H/14 (GELU, heads 80 wide; arXiv
2212.07143). The shapes in a file tell the model. They do not tell the activation, which differs in OpenCLIP's own B and
L models: `config_of` takes it as an argument. Parameters have OpenAI's names; `eval.clip_weights` translates others.

A text's feature is the state at its end token after the final layer norm, times `text_projection`; a picture's is the
state at the class token after the last layer norm, times `visual.proj`. Neither is normalized here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from PIL import Image

from ldm import checkpoint, kernels
from ldm.config.model import TextConfig
from ldm.data.images import LONGEST
from ldm.errors import UserError
from ldm.networks.layers import LayerNorm, MatMul, fill, parameter
from ldm.networks.text import OpenCLIPBlock, OpenCLIPBlocks, OpenCLIPText
from ldm.text.tokenizer import Tokenizer

ACTIVATIONS = {"quick_gelu": "QuickGELU", "gelu": "GELU"}
MODELS = {(768, 32): "ViT-B/32", (768, 16): "ViT-B/16", (1024, 14): "ViT-L/14", (1280, 14): "ViT-H/14"}
HEAD_WIDTH, WIDE_HEADS = 64, {1280: 80}  # WIDE_HEADS: by the picture tower's width; the text towers' heads are 64 wide
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of the training pictures, RGB in [0, 1]
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class ImageConfig:
    """The picture tower; `size` and `patch` in pixels."""

    width: int
    layers: int
    heads: int
    patch: int
    size: int
    mlp_ratio: int = 4


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers; `features` is the width of their outputs, `activation` one of ACTIVATIONS."""

    image: ImageConfig
    text: TextConfig
    features: int
    activation: str

    @property
    def name(self) -> str:
        """The published name, with the size of the pictures where it is not 224 pixels."""
        width, patch, size = self.image.width, self.image.patch, self.image.size
        name = MODELS.get((width, patch), f"ViT of width {width} with patches of {patch} pixels")
        return name if size == 224 else f"{name} at {size} pixels"


def config_of(tensors: Tensors, activation: str | None = None) -> CLIPConfig:
    """The configuration of a file by its shapes; names are OpenAI's.

    The default `activation` is OpenCLIP's GELU for ViT-H/14 and OpenAI's quick GELU for the others.

    Raises:
        UserError: it is no CLIP with two transformers.
    """
    first, table, places = (
        tensors[name].shape if name in tensors else ()
        for name in ("visual.conv1.weight", "token_embedding.weight", "positional_embedding")
    )
    patches = tensors.get("visual.positional_embedding", np.zeros((0, 0))).shape[0] - 1  # the class token has one too
    side = round(max(patches, 0) ** 0.5)
    projection = tensors.get("text_projection", np.zeros(())).shape
    if (
        [len(shape) for shape in (first, table, places, projection)] != [4, 2, 2, 2]
        or side * side != patches
        or not side
    ):
        raise UserError("it is no CLIP with a vision transformer and a text transformer: give ViT-B, ViT-L or ViT-H")
    width, text_width = first[0], table[1]
    head_width = WIDE_HEADS.get(width, HEAD_WIDTH)
    if width % head_width or text_width % HEAD_WIDTH or table[0] < 514:
        raise UserError(f"its widths {width} and {text_width} or its {table[0]} tokens are of no CLIP known here")
    image = ImageConfig(width, _count_blocks(tensors, "visual."), width // head_width, first[-1], side * first[-1])
    text = TextConfig(
        vocab_size=table[0],
        context_length=places[0],
        width=text_width,
        layers=_count_blocks(tensors, ""),
        heads=text_width // HEAD_WIDTH,
    )
    return CLIPConfig(image, text, projection[1], activation or ("gelu" if width in WIDE_HEADS else "quick_gelu"))


def _count_blocks(tensors: Tensors, tower: str) -> int:
    """The number of blocks in a tower, "visual." or ""."""
    begin = f"{tower}transformer.resblocks."
    return len({name[len(begin) :].split(".")[0] for name in tensors if name.startswith(begin)})


class Patches(nn.Cell):
    """A convolution whose stride is its width, without bias: pixels [B, 3, S, S] to [B, (S / patch)^2, width]."""

    def __init__(self, config: ImageConfig):
        super().__init__()
        self.weight = parameter(config.width, 3, config.patch, config.patch)
        self.side, self.patch, self.width = config.size // config.patch, config.patch, config.width
        self.matmul = MatMul()

    def construct(self, pixels):
        x = pixels.reshape(-1, 3, self.side, self.patch, self.side, self.patch)
        x = x.transpose(0, 2, 4, 1, 3, 5).reshape(-1, self.side * self.side, 3 * self.patch * self.patch)
        return self.matmul(x, self.weight.reshape(self.width, -1))


class LastBlock(OpenCLIPBlock):
    """A tower's last block, computed for the first token alone: x [B, N, width] to [B, 1, width]."""

    def construct(self, x, mask):
        y, width, attn = self.ln_1(x), x.shape[-1], self.attn
        q = attn.affine(y[:, :1], attn.in_proj_weight[:width], attn.in_proj_bias[:width])  # [B, 1, width]
        k, v = ops.split(attn.affine(y, attn.in_proj_weight[width:], attn.in_proj_bias[width:]), width, -1)
        x = x[:, :1] + attn.out_proj(attn.heads(q, k, v, mask))
        return x + self.mlp(self.ln_2(x))


class ImageTower(nn.Cell):
    """Pixels float32 [B, 3, size, size], normalized, to features [B, features]."""

    def __init__(self, config: ImageConfig, features: int):
        super().__init__()
        self.conv1 = Patches(config)
        self.class_embedding = parameter(config.width)
        self.positional_embedding = parameter((config.size // config.patch) ** 2 + 1, config.width)
        self.ln_pre, self.ln_post = LayerNorm(config.width), LayerNorm(config.width)
        self.transformer = OpenCLIPBlocks(config)
        self.transformer.resblocks[-1] = LastBlock(config)
        self.proj = parameter(config.width, features)

    def construct(self, pixels):
        patches = self.conv1(pixels)
        first = ops.broadcast_to(self.class_embedding, (patches.shape[0], 1, patches.shape[2]))
        x = self.ln_pre(ops.concat((first, patches), 1) + self.positional_embedding)  # [B, 1 + patches, width]
        for block in self.transformer.resblocks:
            x = block(x, None)
        return ops.matmul(self.ln_post(x[:, 0]), self.proj)


class CLIP:
    """Both towers and the tokenizer; arrays in, arrays out."""

    def __init__(self, config: CLIPConfig):
        self.config = config
        self.tokenizer = Tokenizer(config.text.vocab_size, config.text.context_length)
        self.image = ImageTower(config.image, config.features)
        self.text = OpenCLIPText(replace(config.text, projection=config.features))
        activation = getattr(kernels.select(), ACTIVATIONS[config.activation])
        for tower in (self.image, self.text):
            tower.set_train(False)
            for block in tower.transformer.resblocks:
                block.mlp.gelu = activation()

    def parameters(self) -> dict[str, Parameter]:
        """Every parameter by OpenAI's name."""
        image = {f"visual.{name}": weight for name, weight in self.image.parameters_and_names()}
        return {**image, **dict(self.text.parameters_and_names())}

    def load(self, tensors: Tensors, path: str) -> None:
        """Set all weights, as views of the file where possible; UserError where names or shapes do not fit."""
        weights = self.parameters()
        shapes = {name: weight.shape for name, weight in weights.items()}
        fitting = checkpoint.match(tensors, shapes, path)
        for name, weight in weights.items():
            fill(weight, fitting[name])

    def image_features(self, pixels: np.ndarray) -> np.ndarray:
        """Float32 [B, features] for pictures from `preprocess`, [B, 3, size, size]."""
        return self.image(Tensor(pixels)).asnumpy()

    def text_features(self, texts: list[str]) -> np.ndarray:
        """Float32 [B, features]; a text that is too long is cut, and the end token follows its first tokens."""
        return self.text(Tensor(self.tokenizer.encode(texts)))[1].asnumpy()

    def is_cut(self, text: str) -> bool:
        """Whether a text has more tokens than the encoder sees."""
        return len(self.tokenizer.tokens(text)) > self.config.text.context_length - 2  # beside start and end


def preprocess(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture, uint8 [height, width, 3], as CLIP's input: float32 [3, size, size].

    It is the transform of OpenAI and OpenCLIP: the short side is scaled to `size` (bicubic, antialiased), the middle
    square is cut out, and the pixels are normalized by CLIP's mean and deviation. transformers cuts one pixel beside
    this square where the remainder is odd. Of a picture longer than 8 : 1 only the middle is scaled, to limit memory.
    """
    image = Image.fromarray(picture)
    short, keep = min(image.size), LONGEST * min(image.size)
    image = _middle(image, min(image.width, keep), min(image.height, keep))
    image = image.resize(tuple(int(size * side / short) for side in image.size), Image.BICUBIC)
    pixels = np.asarray(_middle(image, size, size), np.float32) / 255
    return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1))


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))

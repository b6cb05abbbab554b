"""The configuration of a model: one YAML file that training and sampling both read, so they cannot disagree.

The sections are typed, and their defaults are Stable Diffusion 2.x's. Reading is strict: an unknown key or another type
is an error. Writing is exact, also as the text that a checkpoint carries. `changed` makes the changes of a command's
--set. `ldm.diffusion` owns the names of prediction types, noise schedules and samplers, and checks them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.config.mindone import find_model_file, from_mindone, is_foreign, without_training_sections
from ldm.config.yaml_file import (
    dump_yaml,
    interpolated,
    nearest,
    parse_carried,
    parse_value,
    read_yaml,
    save_yaml,
)
from ldm.diffusion.prediction import own_name
from ldm.diffusion.samplers import DEFAULT_SAMPLER
from ldm.errors import UserError
from ldm.files import escaped, quoted
from ldm.text.tokenizer import PADDINGS

LEAST_BETA = 1e-12  # 1 - beta has 16 digits
GROUPS = 32  # of every group norm of Stable Diffusion
NEEDS = {"mask": "paints a masked part of a picture anew", "depth": "draws by a depth map"}  # see `ModelConfig.joined`
REFINER_NUMBERS, BASE_NUMBERS = 5, 6  # that SDXL's UNets are told of a picture's size; see `ldm.conditioning.Sizes`

# A larger size is a mistake or an attack: such a network would take all memory, or hours until it is built.
LARGEST_SIZE = 16_384
LARGER_SIZES = {"vocab_size": 1 << 20, "timesteps": 1_000_000}
MOST_LEVELS = 12
MOST_LAYERS = 1000
MOST_WEIGHTS = 4e9  # by the rough count that is made here, which gives 0.2e9 for Stable Diffusion's UNet


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_sizes(section: object, where: str) -> None:
    """UserError where a number of the section is not positive, or absurdly large."""
    for field in fields(section):
        value = getattr(section, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                _require(number > 0, f"{where}.{field.name} must be positive, got {escaped(number)}")
            if isinstance(number, int):
                most = LARGER_SIZES.get(field.name, LARGEST_SIZE)
                _require(number <= most, f"{where}.{field.name} must be at most {most:,}, got {escaped(number)}")
        if isinstance(value, tuple):
            _require(len(value) <= MOST_LEVELS, f"{where}.{field.name} has more than {MOST_LEVELS} numbers")
        _require(value != (), f"{where}.{field.name} must not be empty")


def _require_possible(where: str, layers: int, weights: int) -> None:
    """UserError for an absurdly large network.

    Args:
        where: the section.
        layers, weights: lower bounds of the network's numbers of them.
    """
    _require(layers <= MOST_LAYERS, f"{where} has {layers:,} layers: more than {MOST_LAYERS:,} are not built here")
    billions = f"{weights / 1e9:,.1f} billion weights in a part of its layers"
    _require(weights <= MOST_WEIGHTS, f"{where} has {billions}: more than {MOST_WEIGHTS / 1e9:.0f} are not built here")


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule; `name` is explained in `ldm.diffusion.schedule`."""

    name: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    timesteps: int = 1000
    zero_terminal_snr: bool = False

    def __post_init__(self):
        _require_sizes(self, "model.schedule")
        _require(self.timesteps > 1, "model.schedule.timesteps must be at least 2: time goes from data to noise")
        lost = f"model.schedule.beta_start {self.beta_start} is lost in float64's rounding: give at least {LEAST_BETA}"
        _require(self.beta_start >= LEAST_BETA, lost)
        ordered = self.beta_start <= self.beta_end < 1
        _require(ordered, f"model.schedule needs beta_start <= beta_end < 1, got {self.beta_start} and {self.beta_end}")


@dataclass(frozen=True)
class SamplingConfig:
    """How the model is sampled, where the command says nothing else.

    `ldm.diffusion.samplers` explains the words. None: the guidance scale is `ModelConfig.guidance_scale`, spacing and
    final sigma are the sampler's own, guidance is not rescaled.

    A student (`ldm.diffusion.distillation`) has learnt these settings, and it draws worse with others. It has
    `distilled_guidance`: the scale that is in its weights, and it is drawn with scale 1; or the least and the largest
    scale that it can be told. None: the model is no student.
    """

    sampler: str = DEFAULT_SAMPLER
    steps: int = 20
    guidance_scale: float | None = None
    spacing: str | None = None
    final_sigma: str | None = None
    guidance_rescale: float | None = None  # of arXiv 2305.08891, section 3.4; at most 1
    zeros_for_empty_prompt: bool = False  # zeros in the place of an empty negative prompt's features, as in SDXL's base
    distilled_guidance: tuple[float, ...] | None = None

    def __post_init__(self):
        _require_sizes(self, "model.sampling")
        rescale = self.guidance_rescale or 0
        _require(rescale <= 1, f"model.sampling.guidance_rescale must be between 0 and 1, got {rescale}")
        baked = self.distilled_guidance or (1.0,)
        ordered = len(baked) == 1 or (len(baked) == 2 and baked[0] < baked[1])
        _require(ordered, f"model.sampling.distilled_guidance must be one scale, or the least and the largest: {baked}")


@dataclass(frozen=True)
class UNetConfig:
    """The denoising network.

    `in_channels` are the latents', and those of what is joined to them; see `ModelConfig.joined`.

    Attention has `num_heads` heads (SD 1.x), or heads of the width `num_head_channels` (SD 2.x); the other one is None.
    SDXL has `adm_in_channels`, the width of the vector that is joined to the time embedding: the pooled text, then
    `size_channels` for each number of the picture's size and crop. None: there is no such vector.

    A network that was distilled for a range of guidance scales has `time_cond_proj_dim`, diffusers' name for the width
    of the embedded scale, which is added to the embedded time (`ldm.conditioning.embed_guidance`). None: it is told
    none.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # downsampling factors that have attention
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_heads: int | None = None
    num_head_channels: int | None = 64
    use_linear_in_transformer: bool = True  # False: 1x1 convolutions, as in SD 1.x
    transformer_depth: int | tuple[int, ...] = 1  # of all levels, or of each; the middle has the last one's
    context_dim: int = 1024
    use_checkpoint: bool = False  # recompute activations while training: half the memory, a third more time
    adm_in_channels: int | None = None
    size_channels: int | None = None
    time_cond_proj_dim: int | None = None

    def __post_init__(self):
        where = "model.unet"
        one = (self.num_heads is None) != (self.num_head_channels is None)
        _require(one, f"{where}: give num_heads or num_head_channels, not both; the other one is null")
        _require_sizes(self, where)
        width = self.model_channels
        levels = [width * mult for mult in self.channel_mult]
        depths = self.transformer_depths
        fits = len(depths) == len(levels)
        _require(fits, f"{where}.transformer_depth has {len(depths)} numbers for {len(levels)} levels")
        layers = self.num_res_blocks * sum(1 + depth for depth in depths)
        _require_possible(where, layers, 36 * self.num_res_blocks * sum(level**2 for level in levels))
        _require(width % GROUPS == 0, f"{where}.model_channels must be a multiple of {GROUPS}, got {width}")
        factors = [2**level for level in range(len(self.channel_mult))]
        strange = sorted(set(self.attention_resolutions) - set(factors))
        _require(not strange, f"{where}.attention_resolutions: {strange} are none of its factors {factors}")
        divisor = self.num_heads or self.num_head_channels
        for factor, mult in zip(factors, self.channel_mult):
            if factor in self.attention_resolutions or factor == self.factor:  # the middle block always attends
                name = "num_heads" if self.num_heads else "num_head_channels"
                _require(width * mult % divisor == 0, f"{where}: {name} {divisor} does not divide width {width * mult}")
        both = (self.adm_in_channels is None) == (self.size_channels is None)
        _require(both, f"{where}: give both adm_in_channels and size_channels, or neither")
        _require((self.size_channels or 2) % 2 == 0, f"{where}.size_channels must be even, got {self.size_channels}")
        told = self.time_cond_proj_dim
        fits = told is None or (told % 2 == 0 and told >= 4)
        _require(fits, f"{where}.time_cond_proj_dim must be even and at least 4, got {told}; 256 is usual")

    @property
    def transformer_depths(self) -> tuple[int, ...]:
        """The number of blocks in a transformer of each level."""
        depth = self.transformer_depth
        return depth if isinstance(depth, tuple) else (depth,) * len(self.channel_mult)

    @property
    def joined(self) -> int:
        """How many channels go in beside the latents."""
        return self.in_channels - self.out_channels

    @property
    def factor(self) -> int:
        """How much smaller each side of the deepest level is than the latent's."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between pictures and latents (AutoencoderKL)."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    embed_dim: int = 4
    force_upcast: bool = False  # compute in float32 always: the activations of SDXL's own exceed float16

    def __post_init__(self):
        _require_sizes(self, "model.vae")
        levels = [self.ch * mult for mult in self.ch_mult]
        layers = len(levels) * self.num_res_blocks
        _require_possible("model.vae", layers, 36 * self.num_res_blocks * sum(level**2 for level in levels))
        _require(self.ch % GROUPS == 0, f"model.vae.ch must be a multiple of {GROUPS}, got {self.ch}")

    @property
    def factor(self) -> int:
        """How much smaller each side of the latent is than the picture's."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class TextConfig:
    """A text encoder: "openclip" (SD 2.x, GELU) or "clip" (SD 1.x, quick GELU).

    The features are the last block's output after the final norm, or the output of block `context_layer`, counted from
    1, without the norm (SDXL). With `projection` the encoder gives a pooled vector of that width too: the last block's
    output at the end token, after the final norm, projected.

    `padding` fills short prompts up: "zero", or "end", the end token. None is what the encoder was trained with
    (`ldm.text.tokenizer.padding_of`); MindONE trains and samples SD 2.x with "end".
    """

    variant: str = "openclip"
    vocab_size: int = 49408
    context_length: int = 77
    width: int = 1024
    layers: int = 23  # blocks that run; the final layer norm follows. SD 2.x leaves out the last of its encoder's 24
    heads: int = 16
    mlp_ratio: int = 4
    padding: str | None = None
    context_layer: int | None = None
    projection: int | None = None

    def __post_init__(self):
        where = "model.text"
        _require(
            self.padding in (None, *PADDINGS),
            f"{where}.padding must be {' or '.join(PADDINGS)}, got {quoted(self.padding)}",
        )
        known = ("openclip", "clip")
        _require(
            self.variant in known, f"{where}.variant must be one of {', '.join(known)}, got {quoted(self.variant)}"
        )
        _require_sizes(self, where)
        _require_possible(where, self.layers, self.layers * (4 + 2 * self.mlp_ratio) * self.width**2)
        divides = self.width % self.heads == 0
        _require(divides, f"{where}: heads {self.heads} does not divide width {self.width}")
        there = (self.context_layer or 1) <= self.layers
        _require(there, f"{where}.context_layer {self.context_layer} is none of the {self.layers} layers")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model.

    `image_size` is the pictures' side in pixels, in training and in sampling, where the command says no other.
    `scale_factor` brings the autoencoder's latents to unit variance. SDXL has a second text encoder, `text_2`, whose
    features follow the first one's, and which gives the pooled text.
    """

    prediction_type: str
    image_size: int = 512
    scale_factor: float = 0.18215
    schedule: ScheduleConfig = ScheduleConfig()
    sampling: SamplingConfig = SamplingConfig()
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text: TextConfig = TextConfig()
    text_2: TextConfig | None = None

    def __post_init__(self):
        _require_sizes(self, "model")
        unet, vae = self.unet, self.vae
        width, of = sum(text.width for text in self.texts), "model.text.width"
        of = of if self.text_2 is None else "the sum of model.text.width and model.text_2.width"
        fits = width == unet.context_dim
        _require(fits, f"{of}, {width}, and model.unet.context_dim {unet.context_dim} must be equal")
        same = len({text.context_length for text in self.texts}) == 1
        _require(same, "model.text.context_length and model.text_2.context_length must be equal")
        self._require_vector()
        several = len(self.sampling.distilled_guidance or ()) == 2
        fits = unet.time_cond_proj_dim is not None or not several
        _require(fits, "model.sampling.distilled_guidance is a range, but model.unet.time_cond_proj_dim is missing")
        fits = unet.out_channels == vae.embed_dim and unet.joined in self._joined_by_channels
        _require(
            fits,
            "model.unet.in_channels and model.unet.out_channels must equal model.vae.embed_dim; in_channels may have 1 "
            "more for a depth map, or 1 and embed_dim more for a mask and the picture around it",
        )
        step = vae.factor * unet.factor
        fits = self.image_size % step == 0
        _require(fits, f"model.image_size {self.image_size} must be a multiple of {step} (VAE's factor times UNet's)")

    def _require_vector(self) -> None:
        """UserError where the pooled text and the sizes do not make the vector that the UNet takes."""
        pooled, width = self.texts[-1].projection, self.unet.adm_in_channels
        if pooled is None and width is None:
            return
        _require(width is not None, "model.unet.adm_in_channels is missing: the text encoder has a projection")
        _require(pooled is not None, "model.unet.adm_in_channels needs the projection of the last text encoder")
        _require(
            width - pooled in (REFINER_NUMBERS * self.unet.size_channels, BASE_NUMBERS * self.unet.size_channels),
            f"model.unet.adm_in_channels must be the projection {pooled} and 5 or 6 times size_channels "
            f"{self.unet.size_channels}, got {width}",
        )

    @property
    def texts(self) -> tuple[TextConfig, ...]:
        """The text encoders, in the order of their features."""
        return (self.text,) if self.text_2 is None else (self.text, self.text_2)

    @property
    def _joined_by_channels(self) -> dict[int, str | None]:
        return {0: None, 1: "depth", 1 + self.vae.embed_dim: "mask"}

    @property
    def joined(self) -> str | None:
        """What is joined to the latents that go into the UNet.

        "mask": a mask and the latents of the picture around it (inpainting models). "depth": a depth map. None:
        nothing.
        """
        return self._joined_by_channels[self.unet.joined]

    @property
    def size_numbers(self) -> int:
        """How many numbers of the picture's size and crop the UNet is told: 0, 5 (SDXL's refiner) or 6 (SDXL)."""
        if self.unet.adm_in_channels is None:
            return 0
        return (self.unet.adm_in_channels - self.texts[-1].projection) // self.unet.size_channels

    @property
    def guidance_scale(self) -> float:
        """The model's own, or the usual scale of SD 1.x, 2.x or SDXL."""
        usual = 7.5 if self.text.variant == "clip" else 9.0
        return self.sampling.guidance_scale or (5.0 if self.size_numbers else usual)


_SECTIONS = {
    "model": ModelConfig,
    "model.schedule": ScheduleConfig,
    "model.sampling": SamplingConfig,
    "model.unet": UNetConfig,
    "model.vae": VAEConfig,
    "model.text": TextConfig,
    "model.text_2": TextConfig,
}


_OF_A_RUN = {
    "train_batch_size",
    "epochs",
    "train_steps",
    "start_learning_rate",
    "scheduler",
    "model_config",
    "data_path",
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def _is_ints(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_int, value))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_number, value))


_KINDS = {  # a field's type: what to call it, and whether a value is one
    "str": ("a word", lambda v: isinstance(v, str)),
    "str | None": ("a word", lambda v: v is None or isinstance(v, str)),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "int": ("a whole number", _is_int),
    "int | None": ("a whole number", lambda v: v is None or _is_int(v)),
    "float": ("a number", _is_number),
    "float | None": ("a number", lambda v: v is None or _is_number(v)),
    "tuple[int, ...]": ("a list of whole numbers", _is_ints),
    "tuple[float, ...] | None": ("a list of numbers", lambda v: v is None or _is_numbers(v)),
    "int | tuple[int, ...]": ("a whole number or a list of them", lambda v: _is_int(v) or _is_ints(v)),
}


def _build(data: Any, where: str) -> Any:
    """The section whose dotted path is `where`, from plain data."""
    _require(isinstance(data, dict), f"{where} must be a section with keys of its own, got {quoted(data)}")
    cls = _SECTIONS[where]
    known = {field.name: field for field in fields(cls)}
    for key in data:
        _require(
            key in known,
            f"unknown key '{where}.{escaped(key)}'; the nearest known key is '{_nearest_path(f'{where}.{key}')}'",
        )
    for name, field in known.items():
        _require(name in data or field.default is not MISSING, f"the key '{where}.{name}' is missing")
    return cls(**{key: _value(known[key].type, value, f"{where}.{key}") for key, value in data.items()})


def _value(kind: str, value: Any, path: str) -> Any:
    if path in _SECTIONS:
        return None if value is None and kind.endswith("| None") else _build(value, path)
    name, is_one = _KINDS[kind]
    _require(is_one(value), f"{path} must be {name}, got {quoted(value)}")
    if kind.startswith("float") and value is not None:
        return float(value)
    if kind.startswith("tuple[float") and value is not None:
        return tuple(map(float, value))
    return tuple(value) if isinstance(value, list) else value


def _paths() -> list[str]:
    """All keys, with their sections before them."""
    return [f"{where}.{field.name}" for where, cls in _SECTIONS.items() for field in fields(cls)]


def _nearest_path(path: str) -> str:
    """The known key that a wrong one most likely means: the right name in another section, or else the same look."""
    name = path.rpartition(".")[2]
    return nearest(path, [known for known in _paths() if known.endswith(f".{name}")] or _paths())


def load_model_config(path: str | Path) -> ModelConfig:
    """The model described by a YAML file. The content decides whether the file is ours or MindONE's.

    UserError, naming the file, where it is missing or not YAML, or where a key or value is unknown, of the wrong type,
    in contradiction to another, or asks for something that is not supported.
    """
    file = find_model_file(path)
    return from_dict(read_yaml(file), str(file))


def save_model_config(cfg: ModelConfig, path: str | Path) -> None:
    """Writes the file that `load_model_config` reads back as the same config."""
    save_yaml(to_dict(cfg), path)


def to_yaml(cfg: ModelConfig) -> str:
    """The config as text, every key written out; the same text for the same config."""
    return dump_yaml(to_dict(cfg))


def from_yaml(text: str, source: str) -> ModelConfig:
    """The inverse of `to_yaml`, for text that a checkpoint carries; `source` says in messages where it came from.

    UserError as `load_model_config`, and for what `to_yaml` never writes, such as aliases and interpolations.
    """
    return from_dict(parse_carried(text, source), source)


def to_dict(cfg: ModelConfig) -> dict:
    """The config as plain data, every key written out: {"model": {...}}.

    But what students alone have is left out where it is None, so that files and keys of other models stay as they were.
    """
    model = asdict(cfg)
    for section, key in (("unet", "time_cond_proj_dim"), ("sampling", "distilled_guidance")):
        if model[section][key] is None:
            del model[section][key]
    return {"model": model}


def from_dict(data: dict, source: str) -> ModelConfig:
    """A config from plain data as in a model file; `source` as in `from_yaml`."""
    try:
        model = data.get("model")
        if is_foreign(model):
            data, model = without_training_sections(data), from_mindone(model)
        run = sorted(_OF_A_RUN & data.keys())
        _require(
            not run, f"it says how to train ({', '.join(run)}): give it as --train_config, not as the model's file"
        )
        for key in data:
            _require(key == "model", f"unknown key '{escaped(key)}'; the only key at the top is 'model'")
        for section, translate in _IN_OTHER_WORDS.items():
            if isinstance(model, dict) and isinstance(model.get(section), dict):
                model = translate(model)
        return _model(model)
    except UserError as e:
        raise UserError(f"{source}: {e}") from None


def _model(model: Any) -> ModelConfig:
    if isinstance(model, dict) and "prediction_type" in model:
        model = {**model, "prediction_type": own_name(model["prediction_type"])}
    return _build(model, "model")


def _move_spacing(model: dict) -> dict:
    """Older files of ours, and diffusers', say the spacing in the schedule: put it into the sampling.

    Such files say "leading" where nobody has chosen anything.
    """
    schedule, sampling = dict(model["schedule"]), model.get("sampling", {})
    spacing = schedule.pop("spacing", "leading")
    if isinstance(sampling, dict) and spacing != "leading":
        sampling = {"spacing": spacing, **sampling}
    return {**model, "schedule": schedule, "sampling": sampling}


def _choose_heads(model: dict) -> dict:
    """A file may say `num_heads` alone: put None for `num_head_channels`, whose default would contradict it."""
    unet = {key: value for key, value in model["unet"].items() if value is not None or key not in _HEADS}
    if "num_heads" in unet:
        unet = {"num_head_channels": None, **unet}
    return {**model, "unet": unet}


def _drop_double_z(model: dict) -> dict:
    """Older files say `double_z`: leave it out, for every encoder here gives a mean and a variance."""
    vae = dict(model["vae"])
    double_z = vae.pop("double_z", True)
    _require(double_z is True, "model.vae.double_z must be true: the encoder gives a mean and a variance")
    return {**model, "vae": vae}


_HEADS = ("num_heads", "num_head_channels")
_IN_OTHER_WORDS = {"schedule": _move_spacing, "unet": _choose_heads, "vae": _drop_double_z}


def add_set(add: Callable) -> None:
    """Add --set, whose values `changed` takes, to a script that reads a model's config; `add`: its add_argument."""
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="other values in the model's config, such as model.sampling.steps=12 model.unet.use_checkpoint=false",
    )


def changed(config: ModelConfig, changes: Sequence[str]) -> ModelConfig:
    """The config with other values, as --set gives them.

    Args:
        changes: each is "KEY=VALUE". The key has its sections before it, as in "model.unet.use_checkpoint"; the value
            is YAML. A later change of a key replaces an earlier one, and only the result of all is checked.

    Raises:
        UserError: there is no such key, a value has the wrong type, or the result is no model.
    """
    if not changes:
        return config
    try:
        tree = OmegaConf.create(to_dict(config))
        for change in changes:
            key, value = _key_and_value(change)
            OmegaConf.update(tree, key, value, force_add=True)
        return _model(interpolated(OmegaConf.to_container(tree), "model")["model"])
    except UserError as e:
        raise UserError(f"--set: {e}") from None


def _key_and_value(change: str) -> tuple[str, Any]:
    key, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"{quoted(change)} must be KEY=VALUE, such as model.unet.use_checkpoint=false")
    _require(key in _paths(), f"unknown key {quoted(key)}; the nearest known key is '{_nearest_path(key)}'")
    return key, parse_value(text, key)

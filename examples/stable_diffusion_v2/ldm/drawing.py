"""The pictures of one run of text_to_image.py: their list, the facts that decide each, and their way to the disk."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np

from ldm import a1111, modes, runtime
from ldm.checkpoint import content_key
from ldm.conditioning import Sizes, Wording
from ldm.config.model import REFINER_NUMBERS, ModelConfig, changed, load_model_config
from ldm.config.options import require_at_least
from ldm.config.versions import VERSIONS, existing, find_checkpoint, rest_of
from ldm.config.yaml_file import search
from ldm.data.prompts import has_near_settings, own_settings, paired, read_lines
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.files import escaped
from ldm.model import StableDiffusion
from ldm.parallel.ranks import Ranks
from ldm.pictures import (
    enlarged,
    find_drawn,
    grid,
    make_folder,
    next_number,
    read_facts,
    read_png,
    require_room,
    save_drawn,
    save_png,
)
from ldm.pipeline import Pipeline, Settings, sampler_of, settings_for
from ldm.preview import Preview
from ldm.text.emphasis import check_weights, has_weights
from ldm.text.tokenizer import Tokenizer
from ldm.weights import (
    choose_config,
    config_key,
    each_with_scale,
    open_weights,
    own_config,
    tensors_of,
    with_adapters,
)

log = logging.getLogger(__name__)

LOADED_ELSEWHERE = r"<(?:lora|lyco|hypernet):[^<>\n]*>"  # in the prompts of other programs
WEIGHTS = r"\([^()\n]*:\s*\d*\.?\d+\s*\)|\(\([^()\n]*\)\)"
DEFAULT_VERSION = "2.1"  # where neither a checkpoint nor a version is named; MindONE's
WITHOUT = {
    "lora": [],
    "guidance_rescale": 0.0,
    "guidance_interval": None,
    "check_safety": False,
    "watermark": False,
    **dict.fromkeys(modes.FACTS),
}  # facts that pictures once had not, and how they were drawn
MOST_PICTURES = 1_000_000  # of a run; their list takes some hundred bytes for each
ROOM_FOR_FILES = 1024  # bytes of the facts that are not known before pictures are drawn
IN_GRID = 64  # the most pictures: those of a long prompt file would fill the memory


class Picture(NamedTuple):
    """One picture to be drawn.

    number: its place in the whole run.
    own: the settings of its line, see `ldm.data.prompts.own_settings`; those of the run where it has none.
    index: its place among the pictures of its line.
    """

    prompt: str
    negative_prompt: str
    number: int
    own: tuple = ()
    index: int = 0


def paired_prompts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(prompt, negative prompt) of all prompts to be drawn."""
    lines = read_lines(args.data_path) if args.data_path else [args.prompt]
    if args.negative_data_path:
        pairs = paired(lines, read_lines(args.negative_data_path))
    else:
        pairs = [(line, args.negative_prompt) for line in lines if line or not args.data_path]
    without = sum(not negative for _, negative in pairs)
    if without and args.negative_data_path:
        log.info("%d of %d prompts have a blank line for a negative prompt, which is none", without, len(pairs))
    return pairs


def _check_texts(pictures: list[Picture], weighted: bool) -> None:
    """UserError where a prompt is no text, or has weights that nothing can be made of."""
    for text in dict.fromkeys(text for picture in pictures for text in picture[:2]):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"the prompt {text!r} is not UTF-8: convert it, or set the terminal's locale") from None
        if weighted:
            check_weights(text)


def plan(args: argparse.Namespace) -> list[Picture]:
    """Every picture of the run, prompt by prompt: n_iter times n_samples of each, or as many as its line says."""
    require_at_least(1, args, "n_iter", "n_samples", "sampling_steps", "batch_size", "preview_interval")
    require_at_least(0, args, "n_rows")
    if args.preview_interval and args.check_safety:
        raise UserError("--check_safety does not see previews: leave out --preview_interval, or the check")
    if args.from_image:
        own = (("seed", args.seed),)  # its noise is the seed's for this number
        pictures = [Picture(args.prompt, args.negative_prompt, 0, own, args.repeated["number"])]
    else:
        pictures = _pictures_of_lines(args)
    _check_texts(pictures, args.prompt_weights)
    return pictures


def _pictures_of_lines(args: argparse.Namespace) -> list[Picture]:
    pictures: list[Picture] = []
    for line, negative in paired_prompts(args):
        prompt, own = own_settings(line) if args.data_path else (line, ())
        wanted = dict(own).get("n", args.n_iter * args.n_samples)
        own = tuple((key, value) for key, value in own if key != "n")
        if len(pictures) + wanted > MOST_PICTURES:
            raise UserError(f"more than {MOST_PICTURES:,} pictures are asked for: draw fewer in one run")
        pictures += [Picture(prompt, negative, len(pictures) + i, own, i) for i in range(wanted)]
    if args.data_path:
        _warn_of_near_settings(list(dict.fromkeys(picture.prompt for picture in pictures)))
    return pictures


def _warn_of_near_settings(prompts: list[str]) -> None:
    near = [prompt for prompt in prompts if has_near_settings(prompt)]
    if near:
        log.warning(
            "%d prompts such as %s are read as words alone: settings stand behind ' | ', as in a fox | seed=3 steps=30",
            len(near),
            escaped(near[0]),
        )


class Model(NamedTuple):
    """The model to draw with: the config, the checkpoint's path, and its tensors as views of the file."""

    config: ModelConfig
    path: str
    tensors: dict[str, np.ndarray]


def find_model(args: argparse.Namespace) -> Model:
    """The model that the command means.

    Raises:
        UserError: the command names no model, or its file is not there or is of another model.
    """
    path, version = args.ckpt_path, args.version
    if not path:
        config = changed(load_model_config(args.config), args.set) if args.config else None
        version = version or default_version(config.prediction_type if config else None, args.download)
        config = config or changed(load_model_config(VERSIONS[version].config), args.set)
        path = find_checkpoint(version, args.download, config.prediction_type)
    args.pretrained_model_path = args.pretrained_model_path or rest_of(path)
    weights = open_weights(existing(path), args.pretrained_model_path, widen=False)
    choice = choose_config(weights, args.config, version, args.set)
    if args.use_lora and not args.lora_ckpt_path:
        raise UserError("use_lora needs the adapter: give it as --lora_ckpt_path")
    tensors = tensors_of(weights, choice, args.vae_path)
    tensors, config = with_adapters(tensors, choice.config, args.lora_ckpt_path, args.lora_scale)
    return Model(config, path, tensors)


def find_refiner(args: argparse.Namespace, base: ModelConfig) -> Model:
    """SDXL's refiner, which draws the last steps; UserError where the file is none, or does not go with the base."""
    weights = open_weights(existing(args.refiner), widen=False)
    config = choose_config(weights, version=None if own_config(args.refiner, weights.checkpoint) else "xl-refiner")
    if config.config.size_numbers != REFINER_NUMBERS:
        raise UserError(f"--refiner {args.refiner} is no refiner of SDXL: give it as --ckpt_path to draw with it alone")
    if (config.config.scale_factor, config.config.schedule) != (base.scale_factor, base.schedule):
        raise UserError(
            f"--refiner {args.refiner} has other latents or another noise schedule than the model, so it cannot go on "
            "with its pictures: leave it out"
        )
    return Model(config.config, args.refiner, tensors_of(weights, config))


def settings_of(args: argparse.Namespace, config: ModelConfig) -> Settings:
    """How the command draws: by its options, and by the model's config where they say nothing.

    Raises:
        UserError: more than one sampler, or values that mean nothing.
    """
    wanted = [name for name in SAMPLERS if getattr(args, name) or args.sampler == name]
    if len(wanted) > 1:
        raise UserError(f"more than one sampler asked for: {', '.join(wanted)}; choose one")
    settings = settings_for(
        config,
        sampler_of(config, wanted[0] if wanted else None, args.ddim_eta, args.spacing, args.final_sigma),
        args.seed,
        steps=args.sampling_steps or None,
        guidance_scale=args.scale,
        height=args.H or None,
        width=args.W or None,
        guidance_rescale=args.guidance_rescale,
        zeros_for_empty=args.zeros_for_empty_prompt,
    )
    if not np.isfinite(settings.guidance_scale):
        raise UserError(f"--scale must be a finite number, got {settings.guidance_scale}")
    if not 0 <= settings.guidance_rescale <= 1:
        raise UserError(f"--guidance_rescale must be between 0 and 1, got {settings.guidance_rescale}")
    settings = replace(
        settings,
        guidance_interval=_interval(args, settings, config),
        prompt_weights=args.prompt_weights,
        long_prompts=args.support_long_prompts,
    )
    settings = _with_sizes(modes.with_inputs(settings, args, config), args, config)
    again = modes.larger(settings, args, config)
    return replace(settings, again=again and _with_sizes(again, args, config))


OPTIONS = {"steps": "sampling_steps"}  # the options that a line's settings are, where they have other names


def ways_to_draw(args: argparse.Namespace, config: ModelConfig, pictures: list[Picture]) -> dict[tuple, Settings]:
    """The settings of every line that has settings of its own, and of the run, (); UserError as from `settings_of`.

    Where each line has its own, those of the first one stand for the run's.
    """
    ways = {}
    for own in dict.fromkeys(picture.own for picture in pictures):
        changes = {OPTIONS.get(key, key): value for key, value in own}
        if changes.get("scale") == 1:
            changes["guidance_interval"] = None
        ways[own] = settings_of(argparse.Namespace(**{**vars(args), **changes}), config)
    most = max(way.runs for way in ways.values())
    if args.preview_interval and args.preview_interval > most:
        raise UserError(f"--preview_interval {args.preview_interval} shows nothing of {most} steps: make it smaller")
    return {(): next(iter(ways.values())), **ways}


def _interval(args: argparse.Namespace, settings: Settings, config: ModelConfig) -> tuple[float, float] | None:
    """The noise levels where guidance works; UserError where there is none, or no guidance at all."""
    if args.guidance_interval is None:
        return None
    low, high = args.guidance_interval
    if not 0 <= low < high:
        raise UserError(f"--guidance_interval must be two noise levels, 0 <= LOW < HIGH, got {low:g} {high:g}")
    if settings.guidance_scale == 1:
        raise UserError("--guidance_interval is for a guidance scale: raise --scale above 1, or leave it out")
    if config.unet.time_cond_proj_dim:
        raise UserError("--guidance_interval does not go with this model, which has learnt guidance: leave it out")
    return low, high


def _with_sizes(settings: Settings, args: argparse.Namespace, config: ModelConfig) -> Settings:
    """The settings with what SDXL is told; UserError where another model is to be told something."""
    names = [f"{side}{name}" for side in ("", "negative_") for name in ("original_size", "crop", "target_size")]
    given = [name for name in names if getattr(args, name)]
    if not config.size_numbers:
        if given or args.refiner:
            raise UserError(f"--{[*given, 'refiner'][0]} is for Stable Diffusion XL: this model is told no sizes")
        return settings
    for name in given:
        if min(getattr(args, name)) < (0 if name.endswith("crop") else 1):
            raise UserError(f"--{name} must be two numbers of pixels, got {' '.join(map(str, getattr(args, name)))}")
    if not 0 <= args.refiner_start <= 1:
        raise UserError(f"--refiner_start must be between 0 and 1, got {args.refiner_start}")
    side = settings.height, settings.width
    sizes = _sizes(args, "", Sizes(side, (0, 0), side))
    negative = _sizes(args, "negative_", sizes)
    return replace(settings, sizes=sizes, negative_sizes=negative, refiner_start=args.refiner_start)


def _sizes(args: argparse.Namespace, side: str, default: Sizes) -> Sizes:
    """What an option of that side says, else the default."""
    fields = zip(("original_size", "crop", "target_size"), default)
    said = [tuple(getattr(args, side + name) or usual) for name, usual in fields]
    return Sizes(*said, getattr(args, f"{side}aesthetic_score"))


def default_version(prediction_type: str | None, download: bool) -> str:
    """MindONE's default, if its type fits and its file can be had; otherwise UserError: the command must name one."""
    own = load_model_config(VERSIONS[DEFAULT_VERSION].config).prediction_type
    there = search(f"models/{VERSIONS[DEFAULT_VERSION].checkpoint}") is not None
    if prediction_type in (None, own) and (there or download):
        return DEFAULT_VERSION
    raise UserError(
        f"nothing says what to draw with: give a checkpoint by --ckpt_path, or a published model by --version "
        f"({', '.join(VERSIONS)}), with --download where its file is not there"
    )


def batches(
    pictures: list[Picture], size: int, alike: Callable[[Picture], Hashable] = lambda picture: None
) -> Iterator[tuple[list[Picture], list[Picture]]]:
    """(slice, slice filled up to `size` with its last picture): the graph is compiled for one size.

    Only pictures of which `alike` says the same stand in one batch.
    """
    groups: dict[Hashable, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(alike(picture), []).append(picture)
    for group in groups.values():
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            yield batch, batch + batch[-1:] * (size - len(batch))


def run_facts(args: argparse.Namespace, config: ModelConfig, checkpoint: str, settings: Settings) -> dict:
    """The facts that decide the pictures, beside prompts and numbers, as written into their files."""
    sampler, told = settings.sampler, {}
    if config.size_numbers:
        told = {"sizes": _plain(settings.sizes), "negative_sizes": _plain(settings.negative_sizes)}
        told["zeros_for_empty_prompt"] = settings.zeros_for_empty
        told["refiner"] = [Path(args.refiner).name, settings.refiner_start] if args.refiner else None
    return {
        "seed": settings.seed,
        "sampler": sampler.name,
        "eta": sampler.eta,
        "spacing": sampler.spacing,
        "final_sigma": sampler.final_sigma,
        "sampling_steps": settings.steps,
        "scale": settings.guidance_scale,
        "guidance_rescale": settings.guidance_rescale,
        "guidance_interval": settings.guidance_interval and list(map(_finite, settings.guidance_interval)),
        "H": settings.height,
        "W": settings.width,
        "prediction_type": config.prediction_type,
        "model_config": config_key(config),
        "dtype": runtime.compute_dtype(args.dtype, args.device_target),
        "checkpoint": Path(checkpoint).name,
        "lora": [[Path(path).name, by] for path, by in each_with_scale(args.lora_ckpt_path, args.lora_scale)],
        "check_safety": args.check_safety,
        "watermark": args.add_watermark,
        **told,
        **modes.facts(settings),
    }


def _finite(number: float) -> float | None:
    """A number as JSON has it: None for infinity."""
    return number if np.isfinite(number) else None


def _plain(sizes: Sizes) -> list:
    """Sizes as JSON has them."""
    return [*map(list, sizes[:3]), sizes.aesthetic_score]


def file_facts(args: argparse.Namespace, checkpoint: str) -> dict[str, str]:
    """The sha256 of the checkpoints, which tells files of one name apart; reads them whole."""
    files = {"checkpoint": checkpoint, "pretrained_model": args.pretrained_model_path, "vae": args.vae_path}
    files["refiner"] = args.refiner
    facts = {f"{name}_sha256": content_key(path) for name, path in files.items() if path}
    if args.lora_ckpt_path:
        facts["lora_sha256"] = [content_key(path) for path in args.lora_ckpt_path]
    return facts


def in_background(function: Callable, *args) -> Future:
    """Run a function in a thread that the end of the process does not wait for; its result or exception."""
    future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except Exception as error:  # to be raised where the result is wanted
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future


def counted(bar) -> Callable[[Iterable], Iterator]:
    """The times of a sampler; each moves the bar when its step is done."""

    def steps(times: Iterable) -> Iterator:
        for t in times:
            yield t
            bar.update()

    return steps


def noise_number(picture: Picture, args: argparse.Namespace) -> int:
    """The key of a picture's noise: with --fixed_code all batches of --n_samples begin with the same noises.

    A line with a seed of its own counts from 0, so that it is drawn the same wherever it stands.
    """
    if "seed" in dict(picture.own):
        return picture.index
    return picture.number % args.n_samples if args.fixed_code else picture.number


def picture_facts(picture: Picture, args: argparse.Namespace, run: dict) -> dict:
    """All facts in a picture's file."""
    read = {
        "prompt_weights": args.prompt_weights and any(map(has_weights, picture[:2])),
        "long_prompts": args.support_long_prompts,
    }
    number = noise_number(picture, args)
    return {"prompt": picture.prompt, "negative_prompt": picture.negative_prompt, "number": number, **read, **run}


def check_room(pictures: list[Picture], args: argparse.Namespace, facts: dict) -> None:
    """UserError where the file of a picture has no room for what it is to say; `facts` as in `missing`."""
    longest = max(pictures, key=lambda picture: len(ascii(picture[:2])))
    said = {**picture_facts(longest, args, facts[longest.own]), "files": "0" * ROOM_FOR_FILES}
    require_room(args.image_format, said, a1111.parameters(said))


def missing(pictures: list[Picture], samples: Path, args: argparse.Namespace, facts: dict) -> list[Picture]:
    """The pictures without a file; UserError where a file was drawn with other settings or from another prompt.

    Args:
        facts: those of `run_facts` for each way to draw.
    """
    left = []
    for picture in pictures:
        path = find_drawn(samples, picture.number)
        if path is None:
            left.append(picture)
            continue
        said, wanted = (
            {**WITHOUT, **each} for each in (read_facts(path), picture_facts(picture, args, facts[picture.own]))
        )
        known = [key for key in wanted if key in said or not key.endswith("_sha256")]  # old pictures lack these
        other = next((key for key in known if said.get(key) != wanted[key]), None)
        if other:
            raise UserError(
                f"cannot resume: {path} was drawn with {other} {said.get(other)!r}, not {wanted[other]!r}; "
                "choose another --output_path"
            )
    return left


class Output:
    """Where the pictures of a run go: their files, and the grid.

    Args:
        args: the options of text_to_image.py.
        ranks: all processes of the run.
        samples: the folder of the single pictures.
        pictures: all that are to be drawn, by all ranks.
        facts: those of `run_facts` for each way to draw; see `ways_to_draw`.
        files: the coming result of `file_facts`; None where `facts` has it already, or no picture is saved.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        ranks: Ranks,
        samples: Path,
        pictures: list[Picture],
        facts: dict,
        files: Future | None,
    ):
        self.args, self.ranks, self.samples, self.facts, self.files = args, ranks, samples, facts, files
        self.count, self.drawn, self.preview = len(pictures), {}, None
        self.shown = [picture.number for picture in pictures[:IN_GRID]]
        first = 0 if args.resume else next_number(samples)
        self.first = ranks.broadcast("first number", first)  # no rank draws before all know it

    def save(self, batch: list[Picture], images: np.ndarray) -> None:
        """Write the pictures of a batch; KeyboardInterrupt where a signal has come meanwhile."""
        if not self.args.skip_grid:
            self.drawn.update((p.number, image) for p, image in zip(batch, images) if p.number in self.shown)
        if self.args.skip_save:
            return
        if self.files:
            for facts in self.facts.values():
                facts.update(self.files.result())
        with runtime.signals.held("when these pictures are saved"):
            for picture, image in zip(batch, images):
                facts = picture_facts(picture, self.args, self.facts[picture.own])
                save_drawn(image, self.path(picture.number), facts, a1111.parameters(facts))
        runtime.signals.raise_if_asked()

    def path(self, number: int) -> Path:
        return self.samples / f"{self.first + number:05}.{self.args.image_format}"

    def previews(self, batch: list[Picture], model: StableDiffusion) -> Callable[[np.ndarray], None] | None:
        """What saves the estimates of a batch's clean latents, every `preview_interval` steps; None: nothing does."""
        every, steps = self.args.preview_interval, count(1)
        if not every:
            return None

        def show(x0: np.ndarray) -> None:
            step = next(steps)
            if step % every:
                return
            self.preview = self.preview or Preview(model)
            folder = make_folder(self.samples.with_name("previews"))
            images = enlarged(self.preview(x0), *(model.factor * side for side in x0.shape[2:]))
            for picture, image in zip(batch, images):
                save_png(image, folder / f"{self.path(picture.number).stem}-{step:03}.png")

        return show

    def finish(self) -> None:
        """Say where the pictures are, and write the grid."""
        self.ranks.barrier("all drawn")
        if not self.args.skip_save:
            log.info("%d pictures are in %s", self.count, self.samples)
        if self.ranks.is_main and not self.args.skip_grid:
            self._write_grid()

    def _write_grid(self) -> None:
        args, shown = self.args, self.shown
        files = {k: find_drawn(self.samples, self.first + k) for k in shown if k not in self.drawn}
        tiles = [self.drawn[k] if k in self.drawn else read_png(files[k]) for k in shown]
        if len({tile.shape for tile in tiles}) > 1:
            log.info("the pictures have several sizes: they are not shown together")
            return
        name = Path(args.output_path) / f"grid-{self.first + shown[0]:05}.png"
        while name.exists() and not args.resume:  # a grid whose pictures were not saved or are gone
            name = name.with_name(f"grid-{int(name.stem[5:]) + 1:05}.png")
        save_png(grid(np.stack(tiles), args.n_rows or max(1, len(tiles) // args.n_samples)), name)
        log.info("%s together: %s", "all" if len(tiles) == self.count else f"the first {len(tiles)}", name)


def wording_of(picture: Picture, pipeline: Pipeline, settings: Settings) -> Wording:
    """How the picture's prompts are read."""
    return pipeline.wording([picture.prompt], [picture.negative_prompt], settings)


def texts_of(pictures: list[Picture], pipeline: Pipeline, ways: dict[tuple, Settings]) -> set[tuple[str, Wording]]:
    """All texts that are encoded for the pictures, and how they are read."""
    texts = set()
    for picture in pictures:
        settings = ways[picture.own]
        wording = wording_of(picture, pipeline, settings)
        texts.add((picture.prompt, wording))
        if settings.guidance_scale != 1:
            texts.add((picture.negative_prompt, wording))
    return texts


def warn_of_other_steps(ways: Iterable[Settings], config: ModelConfig) -> None:
    """One line where a student (`SamplingConfig.distilled_guidance`) is drawn otherwise than it was distilled."""
    if config.sampling.distilled_guidance is None:
        return
    other = [words for settings in ways for words in _unlike_distilled(settings, config)]
    if other:
        log.warning("the model was distilled for %s: expect worse pictures", "; ".join(dict.fromkeys(other)))


def _unlike_distilled(settings: Settings, config: ModelConfig) -> list[str]:
    """What of the settings differs from the student's own."""
    own, scales = config.sampling, config.sampling.distilled_guidance
    sampler, scale = settings.sampler, settings.guidance_scale
    fits = scale == 1 if len(scales) == 1 else scales[0] <= scale <= scales[1]
    wanted = "1" if len(scales) == 1 else f"from {scales[0]:g} to {scales[1]:g}"
    facts = (  # the option, what was distilled, what is asked for
        ("sampler", own.sampler, sampler.name),
        ("sampling_steps", own.steps, settings.steps),
        ("spacing", own.spacing, sampler.spacing),
        ("final_sigma", own.final_sigma, sampler.final_sigma),
        ("ddim_eta", 0.0, sampler.eta),
        ("scale", wanted, wanted if fits else f"{scale:g}"),
    )
    return [f"--{option} {then}, not {now}" for option, then, now in facts if then != now]


def warn_of_plain_words(pictures: list[Picture], settings: Settings, config: ModelConfig) -> None:
    """Warn once of words that only other programs understand, and of negative prompts without effect."""
    prompts = "\n".join(dict.fromkeys(text for picture in pictures for text in picture[:2]))
    patterns = {LOADED_ELSEWHERE: "prompts load nothing here"}
    if not settings.prompt_weights:
        patterns[WEIGHTS] = "--prompt_weights True makes them weights"
    for pattern, what in patterns.items():
        found = re.search(pattern, prompts)
        if found:
            log.warning("%s and the like are read as plain words: %s", escaped(found.group()), what)
    why = "with --scale 1, which is no guidance" if settings.guidance_scale == 1 else None
    why = "with this model, which has learnt guidance without them" if config.unet.time_cond_proj_dim else why
    if why and any(picture.negative_prompt for picture in pictures):
        log.warning("negative prompts have no effect %s", why)


def warn_of_long_prompts(pictures: list[Picture], tokenizer: Tokenizer, settings: Settings) -> None:
    if settings.long_prompts:
        return
    room, wording = tokenizer.context_length - 2, Wording(weighted=settings.prompt_weights)
    for prompt in dict.fromkeys(text for picture in pictures for text in picture[:2]):
        excess = len(wording.read(tokenizer, prompt)[0]) - room
        if excess > 0:
            log.warning(
                "the last %d of %d tokens are not seen without --support_long_prompts True: %s",
                excess,
                excess + room,
                prompt,
            )

"""Pictures from prompts with Stable Diffusion 1.x, 2.x or the embedded tiny model.

python text_to_image.py --version tiny --prompt "a drawing of a red apple, noto style"
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ldm import runtime
from ldm.checkpoint import content_key
from ldm.config.mindone import IGNORED_TRAIN_OPTIONS
from ldm.config.model import ModelConfig, load_model_config
from ldm.config.options import Parser, draw_seed, read_options, require_at_least, seed, str2bool
from ldm.config.versions import VERSIONS, existing, find_checkpoint, version
from ldm.config.yaml_file import search
from ldm.data.prompts import paired, read_lines
from ldm.diffusion.samplers import FINAL_SIGMAS, SAMPLERS, Sampler
from ldm.diffusion.schedule import build_schedule
from ldm.diffusion.spacing import SPACINGS
from ldm.errors import UserError
from ldm.files import claimed, escaped
from ldm.model import StableDiffusion
from ldm.networks.blockwise import MANY_WEIGHTS
from ldm.pictures import grid, make_folder, next_number, read_facts, read_png, save_drawn, save_png
from ldm.pipeline import CACHED_PROMPTS, Pipeline, Settings, check_config, sampler_of
from ldm.text.tokenizer import Tokenizer
from ldm.weights import choose_config, config_key, open_weights, tensors_of

log = logging.getLogger("text_to_image")

OLD_SAMPLER_FLAGS = {"ddim": "ddim", "ddpm": "ddpm", "dpm_solver": "dpm_solver", "dpm_solver_pp": "dpm_solver_pp"}
OTHER_SAMPLER = f"samplers are {', '.join(SAMPLERS)}"
NOT_HERE = {  # MindONE's options that would change the pictures
    "plms": OTHER_SAMPLER,
    "uni_pc": OTHER_SAMPLER,
    "check_safety": "there is no safety checker, pictures are saved as they are drawn",
    "add_watermark": "there is no watermark; who made a picture can be told by its text entries",
    "ti_ckpt_path": "embeddings of textual inversion are not read",
}
SPECIAL_ELSEWHERE = {  # patterns that mean something in the prompts of other programs
    r"<(?:lora|lyco|hypernet):[^<>\n]*>": "prompts load nothing here",
    r"\([^()\n]*:\s*\d*\.?\d+\s*\)|\(\([^()\n]*\)\)": "prompts have no weights here",
}
DEFAULT_VERSION = "2.1"  # where neither a checkpoint nor a version is named; MindONE's
IN_GRID = 64  # pictures at most, lest a long prompt file fill the memory
WITHOUT_EFFECT = {
    "support_long_prompts": "a prompt is cut at the encoder's length, with a warning",
    "lora_ckpt_path": "it belongs to use_lora",
    "lora_rank": "it belongs to use_lora",
    "lora_scale": "it belongs to use_lora",
    "log_level": "progress and warnings always show",
    "jit_level": IGNORED_TRAIN_OPTIONS["jit_level"],
    "clip_ckpt_path": "there is no safety checker",
    "safety_version": "there is no safety checker",
    "lora_ft_unet": "it belongs to use_lora",
    "lora_ft_text_encoder": "it belongs to use_lora",
}


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--prompt", default="A cute wolf in winter forest", help="what to draw")
    add("--data_path", "--from-file", default="", help="a text file with one prompt per line, instead of --prompt")
    add("--negative_prompt", default="", help="what not to draw; for every prompt")
    add("--negative_data_path", default="", help="a text file of negative prompts; line n is for line n of the prompts")
    add("--output_path", default="output", help="pictures go to its folder samples/, numbered on from what is there")
    add(
        "-v",
        "--version",
        type=version,
        choices=list(VERSIONS),
        help="which published model (default: the checkpoint's own, or 2.1)",
    )
    add("--config", help="the model's YAML file (default: the checkpoint's own, or the version's)")
    add("--ckpt_path", help="the checkpoint (default: the version's file in models/)")
    add("--download", action="store_true", help="fetch the version's checkpoint where it is not there")
    add("--pretrained_model_path", help="a checkpoint that brings what ckpt_path lacks, where that is a UNet alone")
    add("--vae_path", help="an autoencoder's own file or folder, in the place of the checkpoint's")
    add("--sampler", choices=list(SAMPLERS), help="default: the model's")
    for flag, name in OLD_SAMPLER_FLAGS.items():
        add(f"--{flag}", action="store_true", help=f"the same as --sampler {name}")
    add("--sampling_steps", type=int, help="how often the network runs for a picture (default: the model's, 20)")
    add("--spacing", choices=list(SPACINGS), help="of the times where it runs (default: the model's, or the sampler's)")
    add("--final_sigma", choices=list(FINAL_SIGMAS), help="noise that is left (default: the model's, or the sampler's)")
    add("--ddim_eta", type=float, help="fresh noise per step, 0 to 1 (default: the sampler's own)")
    add("--scale", type=float, help="guidance scale; 1 is none (default: the model's)")
    add("--n_iter", type=int, default=2, help="batches per prompt")
    add("--n_samples", type=int, default=4, help="pictures per batch and prompt")
    add(
        "--batch_size", type=int, help="pictures drawn at once, across prompts too; changes the speed, not the pictures"
    )
    add("--H", type=int, help="height in pixels (default: the config's image_size)")
    add("--W", type=int, help="width in pixels")
    add("--seed", type=seed, default=42, help="picture k depends on the seed and k alone")
    add("--fixed_code", action="store_true", help="the same starting noises for every batch of n_samples")
    add("--resume", action="store_true", help="number from 0 and keep the pictures that this command has drawn before")
    add("--skip_grid", action="store_true", help="no grid picture")
    add("--skip_save", action="store_true", help="no single pictures")
    add("--n_rows", type=int, default=0, help="rows of the grid (default: one per prompt and iteration)")
    add("--device_target", choices=runtime.DEVICES, help="default: Ascend where there is one, else CPU")
    add("--mode", "--ms_mode", type=int, choices=(0, 1), default=0, help="0: graph, 1: PyNative")
    add("--dtype", choices=list(runtime.DTYPES), help="default: float16 on Ascend, float32 on a CPU")
    add("--use_parallel", type=str2bool, default=False, help="with scripts/run_infer_distributed.sh: one of several")
    add("--use_lora", type=str2bool, default=False, help=argparse.SUPPRESS)
    parser.ignore(WITHOUT_EFFECT)
    parser.refuse(NOT_HERE)
    return parser


class Picture(NamedTuple):
    """One picture to be drawn; `number` is its place in the whole run."""

    prompt: str
    negative_prompt: str
    number: int


def paired_prompts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(prompt, negative prompt) of everything that is to be drawn."""
    lines = read_lines(args.data_path) if args.data_path else [args.prompt]
    if args.negative_data_path:
        pairs = paired(lines, read_lines(args.negative_data_path))
    else:
        pairs = [(line, args.negative_prompt) for line in lines if line or not args.data_path]
    without = sum(not negative for _, negative in pairs)
    if without and args.negative_data_path:
        log.info("%d of %d prompts have a blank line for a negative prompt, which is none", without, len(pairs))
    for text in (text for pair in pairs for text in pair):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"the prompt {text!r} is not UTF-8: convert it, or set the terminal's locale") from None
    return pairs


def plan(args: argparse.Namespace) -> list[Picture]:
    """Every picture of the run, in order: prompt by prompt, n_iter times n_samples of each."""
    require_at_least(1, args, "n_iter", "n_samples", "sampling_steps", "batch_size")
    require_at_least(0, args, "n_rows")
    each = args.n_iter * args.n_samples
    return [
        Picture(prompt, negative, line * each + i)
        for line, (prompt, negative) in enumerate(paired_prompts(args))
        for i in range(each)
    ]


def chosen_sampler(args: argparse.Namespace, config: ModelConfig) -> Sampler:
    wanted = {name for flag, name in OLD_SAMPLER_FLAGS.items() if getattr(args, flag)} | {args.sampler} - {None}
    if len(wanted) > 1:
        raise UserError(f"more than one sampler asked for: {', '.join(sorted(wanted))}; choose one")
    if args.use_lora:
        raise UserError("--use_lora is not available here")
    return sampler_of(config, wanted.pop() if wanted else None, args.ddim_eta, args.spacing, args.final_sigma)


def batches(pictures: list[Picture], size: int):
    """Slices of `size`; the last one is filled up with its last picture, for the graph is compiled for one size."""
    for start in range(0, len(pictures), size):
        batch = pictures[start : start + size]
        yield batch, batch + batch[-1:] * (size - len(batch))


class Model(NamedTuple):
    """What is drawn with: the config, the checkpoint's path, and its tensors as views of the file."""

    config: ModelConfig
    path: str
    tensors: dict[str, np.ndarray]


def find_model(args: argparse.Namespace) -> Model:
    """The model that the command means.

    Raises:
        UserError: nothing says which model it is, its file is not there, or it is of another model.
    """
    path, version = args.ckpt_path, args.version
    if not path:
        wanted = load_model_config(args.config).prediction_type if args.config else None
        version = version or default_version(wanted, args.download)
        path = find_checkpoint(version, args.download, wanted)
    weights = open_weights(existing(path), args.pretrained_model_path)
    choice = choose_config(weights, args.config, version)
    return Model(choice.config, path, tensors_of(weights, choice, args.vae_path))


def default_version(prediction_type: str | None, download: bool) -> str:
    """MindONE's, where it can serve; UserError where the command has to say what to draw with."""
    own = load_model_config(VERSIONS[DEFAULT_VERSION].config).prediction_type
    there = search(f"models/{VERSIONS[DEFAULT_VERSION].checkpoint}") is not None
    if prediction_type in (None, own) and (there or download):
        return DEFAULT_VERSION
    raise UserError(
        f"nothing says what to draw with: give a checkpoint by --ckpt_path, or a published model by --version "
        f"({', '.join(VERSIONS)}), with --download where its file is not there"
    )


def run_facts(args: argparse.Namespace, config: ModelConfig, checkpoint: str) -> dict:
    """What decides the pictures beside their prompts and numbers, as their files tell it."""
    sampler = chosen_sampler(args, config)
    return {
        "seed": args.seed,
        "sampler": sampler.name,
        "eta": sampler.eta,
        "spacing": sampler.spacing,
        "final_sigma": sampler.final_sigma,
        "sampling_steps": args.sampling_steps or config.sampling.steps,
        "scale": config.guidance_scale if args.scale is None else args.scale,
        "H": args.H or config.image_size,
        "W": args.W or config.image_size,
        "prediction_type": config.prediction_type,
        "model_config": config_key(config),
        "dtype": runtime.compute_dtype(args.dtype, args.device_target),
        "checkpoint": Path(checkpoint).name,
    }


def file_facts(args: argparse.Namespace, checkpoint: str) -> dict[str, str]:
    """What tells checkpoints of one name apart; reads them whole."""
    files = {"checkpoint": checkpoint, "pretrained_model": args.pretrained_model_path, "vae": args.vae_path}
    return {f"{name}_sha256": content_key(path) for name, path in files.items() if path}


def in_background(function: Callable, *args) -> Future:
    """What it returns or raises, from a thread that the end of the process does not wait for."""
    future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except Exception as error:  # to be raised where the result is wanted
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future


def noise_number(picture: Picture, args: argparse.Namespace) -> int:
    """What keys a picture's noise: with --fixed_code all batches of --n_samples begin with the same noises."""
    return picture.number % args.n_samples if args.fixed_code else picture.number


def picture_facts(picture: Picture, args: argparse.Namespace, run: dict) -> dict:
    """All that a picture's file tells."""
    number = noise_number(picture, args)
    return {"prompt": picture.prompt, "negative_prompt": picture.negative_prompt, "number": number, **run}


def missing(pictures: list[Picture], samples: Path, args: argparse.Namespace, run: dict) -> list[Picture]:
    """Those that have no file yet; UserError where a file was drawn with other settings or from another prompt."""
    left = []
    for picture in pictures:
        path = samples / f"{picture.number:05}.png"
        if not path.exists():
            left.append(picture)
            continue
        said, wanted = read_facts(path), picture_facts(picture, args, run)
        known = [key for key in wanted if key in said or not key.endswith("_sha256")]  # which pictures once lacked
        other = next((key for key in known if said.get(key) != wanted[key]), None)
        if other:
            raise UserError(
                f"cannot resume: {path} was drawn with {other} {said.get(other)!r}, not {wanted[other]!r}; "
                "choose another --output_path"
            )
    return left


def main() -> None:
    args = read_options(build_parser())
    ranks = runtime.join(args.use_parallel)
    draw_seed(args, ranks)
    pictures = plan(args)
    if ranks.size > 1 and args.skip_save and not args.skip_grid:
        raise UserError("several processes make the grid from the saved pictures: leave out --skip_save")
    with ranks.main_first("checkpoint"):
        config, path, tensors = find_model(args)
    height, width = args.H or config.image_size, args.W or config.image_size
    check_config(config, height, width)
    sampler, steps = chosen_sampler(args, config), args.sampling_steps or config.sampling.steps
    sampler.times(build_schedule(config.schedule), steps)  # or the number of steps is refused
    with ranks.main_first("folder"):
        samples = make_folder(Path(args.output_path) / "samples")
        if ranks.is_main:
            runtime.until_end(claimed(args.output_path, "drawing"))
    ranks.check_shared(samples)
    facts = run_facts(args, config, path)
    settings = Settings(sampler, steps, facts["scale"], height, width, args.seed)
    if args.resume:
        if next_number(samples):
            facts.update(file_facts(args, path))
        pictures = missing(pictures, samples, args, facts)
        if not pictures:
            log.info("all pictures are in %s", samples)
            return
    warn_of_plain_words(pictures, settings.guidance_scale)
    device = runtime.start(args.device_target, args.mode, ranks)
    files = None if args.skip_save or "checkpoint_sha256" in facts else in_background(file_facts, args, path)
    model = StableDiffusion(config)
    model.load(tensors, path)
    runtime.set_compute_dtype(model, facts["dtype"])
    if device == "CPU" and args.mode == 0 and sum(map(np.prod, model.shapes().values())) > MANY_WEIGHTS:
        model.compile_blockwise()
    pipeline = Pipeline(config, model)
    warn_of_long_prompts(pictures, model.tokenizer)
    guided = settings.guidance_scale != 1
    texts = {p.prompt for p in pictures} | ({p.negative_prompt for p in pictures} if guided else set())
    if len(texts) <= CACHED_PROMPTS:
        pipeline.encode_ahead(sorted(texts))

    first = ranks.broadcast("first number", 0 if args.resume else next_number(samples))  # none draws before all know
    shown, drawn = [picture.number for picture in pictures[:IN_GRID]], {}
    size = min(args.batch_size or args.n_samples, len(pictures))
    mine = list(batches(pictures, size))[ranks.rank :: ranks.size]  # the same batches as alone, hence the same bits
    bar = tqdm(total=len(mine) * steps, unit="step", desc=f"{sum(len(b) for b, _ in mine)} pictures")

    def progress(times):
        for t in times:
            yield t
            bar.update()

    for batch, filled in mine:
        numbers = [noise_number(picture, args) for picture in filled]
        prompts, negatives = [p.prompt for p in filled], [p.negative_prompt for p in filled]
        images = pipeline.draw(prompts, negatives, numbers, settings, progress)[: len(batch)]
        if not args.skip_grid:
            drawn.update((p.number, image) for p, image in zip(batch, images) if p.number in shown)
        if not args.skip_save:
            facts.update(files.result() if files else {})
            with runtime.signals.held("when these pictures are saved"):
                for picture, image in zip(batch, images):
                    save_drawn(image, samples / f"{first + picture.number:05}.png", picture_facts(picture, args, facts))
            runtime.signals.raise_if_asked()
    bar.close()
    ranks.barrier("all drawn")
    if not args.skip_save:
        log.info("%d pictures are in %s", len(pictures), samples)
    if ranks.is_main and not args.skip_grid:
        tiles = [drawn[k] if k in drawn else read_png(samples / f"{first + k:05}.png") for k in shown]
        name = Path(args.output_path) / f"grid-{first + shown[0]:05}.png"
        while name.exists() and not args.resume:  # that of pictures which were not saved, or are no longer there
            name = name.with_name(f"grid-{int(name.stem[5:]) + 1:05}.png")
        save_png(grid(np.stack(tiles), args.n_rows or max(1, len(tiles) // args.n_samples)), name)
        log.info("%s together: %s", "all" if len(tiles) == len(pictures) else f"the first {len(tiles)}", name)


def warn_of_plain_words(pictures: list[Picture], guidance_scale: float) -> None:
    """Say once what other programs would see in the prompts, and what is not looked at."""
    prompts = "\n".join(dict.fromkeys(text for picture in pictures for text in picture[:2]))
    for pattern, what in SPECIAL_ELSEWHERE.items():
        found = re.search(pattern, prompts)
        if found:
            log.warning("%s and the like are read as plain words: %s", escaped(found.group()), what)
    if guidance_scale == 1 and any(picture.negative_prompt for picture in pictures):
        log.warning("negative prompts have no effect with --scale 1, which is no guidance")


def warn_of_long_prompts(pictures: list[Picture], tokenizer: Tokenizer) -> None:
    room = tokenizer.context_length - 2  # beside start and end token
    for prompt in dict.fromkeys(text for picture in pictures for text in picture[:2]):
        excess = len(tokenizer.tokens(prompt)) - room
        if excess > 0:
            log.warning("the last %d of %d tokens are not seen: %s", excess, excess + room, prompt)


if __name__ == "__main__":
    runtime.run(main)

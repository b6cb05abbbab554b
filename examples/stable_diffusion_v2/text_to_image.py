"""Pictures from prompts with Stable Diffusion 1.x, 2.x, XL or the embedded tiny model.

python text_to_image.py --version tiny --prompt "a drawing of a red apple, noto style"
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ldm import runtime
from ldm.config.mindone import IGNORED_DRAW_OPTIONS, REFUSED_DRAW_OPTIONS
from ldm.config.model import add_set
from ldm.config.options import Parser, read_options, str2bool
from ldm.config.versions import VERSIONS, version
from ldm.diffusion.schedule import build_schedule
from ldm.draw_options import add_beginning, add_output, add_sdxl, add_ways_to_draw
from ldm.drawing import (
    Model,
    Output,
    Picture,
    batches,
    check_room,
    counted,
    file_facts,
    find_model,
    find_refiner,
    in_background,
    missing,
    noise_number,
    plan,
    run_facts,
    texts_of,
    warn_of_long_prompts,
    warn_of_other_steps,
    warn_of_plain_words,
    ways_to_draw,
    wording_of,
)
from ldm.errors import UserError
from ldm.files import claimed
from ldm.marks import Marks, marks_of
from ldm.model import StableDiffusion
from ldm.networks.blockwise import MANY_WEIGHTS
from ldm.parallel.ranks import Ranks
from ldm.parts import PARTS, TEXT, UNET
from ldm.pictures import make_folder, next_number
from ldm.pipeline import CACHED_PROMPTS, Pipeline, Settings, check_config
from ldm.randomness import settled_seed
from ldm.repeat import check_same, take_facts

log = logging.getLogger("text_to_image")


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--prompt", default="A cute wolf in winter forest", help="what to draw")
    add("--data_path", "--from-file", default="", help="a text file with one prompt per line, instead of --prompt")
    add("--from_image", help="a picture of this program, to be drawn again; further options change what it says")
    add("--negative_prompt", default="", help="what not to draw; for every prompt")
    add("--negative_data_path", default="", help="a text file of negative prompts; line n is for line n of the prompts")
    add("--prompt_weights", type=str2bool, default=True, help="(word:1.2), (word), [word] weigh words, as in A1111")
    add("--support_long_prompts", type=str2bool, default=False, help="see prompts as a whole, 75 tokens at a time")
    add("--output_path", default="output", help="pictures go to its folder samples/, numbered on from what is there")
    add(
        "-v",
        "--version",
        type=version,
        choices=list(VERSIONS),
        help="which published model (default: the checkpoint's own, or 2.1)",
    )
    add("--config", help="the model's YAML file (default: the checkpoint's own, or the version's)")
    add_set(add)
    add("--ckpt_path", help="the checkpoint (default: the version's file in models/)")
    add("--download", action="store_true", help="fetch the version's checkpoint where it is not there")
    add("--pretrained_model_path", help="a checkpoint that brings what ckpt_path lacks, where that is a UNet alone")
    add("--vae_path", help="an autoencoder's own file or folder, in the place of the checkpoint's")
    add("--use_lora", type=str2bool, default=False, help="lora_ckpt_path alone says it too")
    add("--lora_ckpt_path", nargs="+", default=[], help="adapters (LoRA) to draw with: files or folders of any form")
    add("--lora_scale", type=float, nargs="+", default=[1.0], help="strength of the adapters: one for all, or one each")
    add_ways_to_draw(add)
    add_beginning(parser.add_argument_group("What a drawing begins with").add_argument)
    add_sdxl(parser.add_argument_group("Stable Diffusion XL").add_argument)
    add_output(add)
    runtime.add_device_options(add)
    add(
        "--dtype",
        choices=list(runtime.DTYPES),
        help="default: float16 on Ascend, float32 on a CPU (bfloat16 needs AVX-512 BF16)",
    )
    add("--use_parallel", type=str2bool, default=False, help="with scripts/run_infer_distributed.sh: one of several")
    parser.ignore(IGNORED_DRAW_OPTIONS)
    parser.refuse(REFUSED_DRAW_OPTIONS)
    return parser


class Job(NamedTuple):
    """The pictures that are not drawn yet, the models, the settings and facts of each way to draw (`ways_to_draw`)."""

    pictures: list[Picture]
    model: Model
    refiner: Model | None
    ways: dict[tuple, Settings]
    facts: dict[tuple, dict]
    samples: Path
    marks: Marks


def prepare(args: argparse.Namespace, ranks: Ranks) -> Job:
    """Find the job, and all mistakes in it, before a network is built; UserError."""
    runtime.find_device(args.device_target)
    pictures = plan(args)
    if ranks.size > 1 and args.skip_save and not args.skip_grid:
        raise UserError("several processes make the grid from the saved pictures: leave out --skip_save")
    with ranks.main_first("checkpoint"):
        model = find_model(args)
        refiner = find_refiner(args, model.config) if args.refiner else None
    config = model.config
    ways = ways_to_draw(args, config, pictures)
    for way in ways.values():
        for found in filter(None, (model, refiner)):
            check_config(found.config, *way.sides)
        way.sampler.times(build_schedule(config.schedule), way.steps)  # raises for a wrong number of steps
    marks = marks_of(args.check_safety, args.add_watermark, {way.sides[-2:] for way in ways.values()})
    facts = {own: run_facts(args, config, model.path, way) for own, way in ways.items()}
    if args.from_image:
        facts = {own: {**each, **file_facts(args, model.path)} for own, each in facts.items()}
        check_same(args, facts[pictures[0].own])
    check_room(pictures, args, facts)
    with ranks.main_first("folder"):
        samples = make_folder(Path(args.output_path) / "samples")
        if args.preview_interval:
            make_folder(samples.with_name("previews"))
        if ranks.is_main:
            runtime.until_end(claimed(args.output_path, "drawing"))
    ranks.check_shared(samples)
    if args.resume:
        files = file_facts(args, model.path) if next_number(samples) else {}
        facts = {own: {**each, **files} for own, each in facts.items()}
        pictures = missing(pictures, samples, args, facts)
    return Job(pictures, model, refiner, ways, facts, samples, marks)


def build(args: argparse.Namespace, job: Job, device: str) -> Pipeline:
    """Build the networks, and encode the prompts if they are few."""

    def networks(found: Model, parts: tuple[str, ...]) -> StableDiffusion:
        model = StableDiffusion(found.config, parts)
        blockwise = device == "CPU" and args.mode == 0 and sum(map(np.prod, model.shapes().values())) > MANY_WEIGHTS
        model.load(found.tensors, found.path, parts, as_stored=(UNET, TEXT) if blockwise else ())
        model.compute_in(job.facts[()]["dtype"], weights=device != "CPU")
        if blockwise:
            model.compile_blockwise()
        return model

    refiner = Pipeline(job.refiner.config, networks(job.refiner, (UNET, TEXT))) if job.refiner else None
    model = networks(job.model, PARTS)
    pipeline = Pipeline(job.model.config, model, refiner)
    warn_of_long_prompts(job.pictures, model.tokenizers[0], job.ways[()])
    texts = texts_of(job.pictures, pipeline, job.ways)
    if len(texts) <= CACHED_PROMPTS:
        pipeline.encode_ahead(*zip(*sorted(texts)))
    return pipeline


def main() -> None:
    parser = build_parser()
    args = read_options(parser)
    if args.from_image:
        take_facts(args, parser)
    ranks = runtime.join(args.use_parallel)
    args.seed = settled_seed(args.seed, ranks.broadcast)
    job = prepare(args, ranks)
    pictures, ways, settings = job.pictures, job.ways, job.ways[()]
    if not pictures:
        log.info("all pictures are in %s", job.samples)
        return
    warn_of_plain_words(pictures, settings, job.model.config)
    warn_of_other_steps(ways.values(), job.model.config)
    device = runtime.start(args.device_target, args.mode, ranks, runtime.ascend_settings(args))
    known = args.skip_save or "checkpoint_sha256" in job.facts[()]
    files = None if known else in_background(file_facts, args, job.model.path)
    pipeline = build(args, job, device)
    output = Output(args, ranks, job.samples, pictures, job.facts, files)
    size = args.batch_size if args.from_image else min(args.batch_size or args.n_samples, len(pictures))
    for facts in job.facts.values():
        facts["batch_size"] = size  # the last bit of a picture can depend on it
    every = batches(pictures, size, lambda each: (ways[each.own], wording_of(each, pipeline, ways[each.own])))
    mine = list(every)[ranks.rank :: ranks.size]  # the batches of one process, hence the same bits
    with tqdm(total=sum(ways[batch[0].own].runs for batch, _ in mine), unit="step") as bar:
        bar.set_description(f"{sum(len(batch) for batch, _ in mine)} pictures")
        for batch, filled in mine:
            numbers = [noise_number(picture, args) for picture in filled]
            prompts, negatives = [p.prompt for p in filled], [p.negative_prompt for p in filled]
            shown = output.previews(batch, pipeline.model)
            images = pipeline.draw(prompts, negatives, numbers, ways[batch[0].own], counted(bar), shown)
            output.save(batch, job.marks(images[: len(batch)]))
    output.finish()


if __name__ == "__main__":
    runtime.run(main)

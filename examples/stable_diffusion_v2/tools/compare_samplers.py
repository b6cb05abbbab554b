"""How near samplers without fresh noise come to the exact solution, at equal numbers of network calls.

    python tools/compare_samplers.py [--ckpt_path MODEL] [--output_path output/samplers]

It draws from the same noise with every such sampler of SAMPLERS, once with captions, once with the words of a style
alone and without guidance, where the noise decides what is drawn. It prints a table: the root mean square of the
pixels' distance, in units of 255, to a reference of many more calls. A sampler that cannot make exactly so many calls
makes fewer. Other lines tell how far two references, and two pictures, are from one another. OUTPUT/SET.png shows some
pictures at the fewest calls.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ldm import runtime
from ldm.config.options import Parser
from ldm.data.captions import read_captions
from ldm.diffusion.samplers import SAMPLERS, Sampler
from ldm.diffusion.schedule import NoiseSchedule
from ldm.pictures import captioned_rows, make_folder, save_png
from ldm.pipeline import sampler_of, settings_for
from tools.measure_few_steps import HERE, pipelines, rms

CALLS = (5, 10, 20)
REFERENCES = {"dpm_solver_pp_3m": 250, "heun": 250}  # sampler -> steps; the first one is what all are compared with
STYLE = "noto style"
SHOWN = 6
CAPTIONS = HERE / "datasets/emoji/noto/test"


def calls_of(sampler: Sampler, steps: int, schedule: NoiseSchedule) -> int:
    """How often the sampler asks the network in so many steps."""
    asked = []

    def denoise(x: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        asked.append(t)
        return np.zeros_like(x), x

    sampler(denoise, np.ones((1, 1, 1, 1)), sampler.times(schedule, steps), schedule)
    return len(asked)


def steps_of(sampler: Sampler, calls: int, schedule: NoiseSchedule) -> int:
    """The most steps that ask the network at most so often."""
    return max(steps for steps in range(1, calls + 1) if calls_of(sampler, steps, schedule) <= calls)


def measure(
    draw: Callable[[str, int], np.ndarray], samplers: dict[str, Sampler], schedule: NoiseSchedule
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """(sampler -> distances, sampler -> pictures at the fewest calls) of one set of prompts.

    Args:
        draw: (sampler, steps) -> pictures, uint8 [N, H, W, 3].
        samplers: name -> sampler.
    """
    best, other = (draw(*each) for each in REFERENCES.items())
    print(f"the other reference is at {rms(other, best):.2f}, pictures of each other at {rms(best[1:], best[:-1]):.0f}")
    distances, shown = {}, {"reference": best}
    for name, sampler in samplers.items():
        drawn = [draw(name, steps_of(sampler, calls, schedule)) for calls in CALLS]
        distances[name], shown[name] = [rms(each, best) for each in drawn], drawn[0]
        print(name, *(f"{each:.1f}" for each in distances[name]), flush=True)
    return distances, shown


def main() -> None:
    args = _options()
    runtime.start()
    config, pipeline = pipelines()(args.ckpt_path)
    samplers = {name: sampler_of(config, name) for name in SAMPLERS}
    samplers = {name: each for name, each in samplers.items() if not each.eta and not each.renews}
    captions = [sample.text for sample in read_captions(CAPTIONS)][:: 121 // args.count][: args.count]
    table = {}
    for kind, prompts, scale in (("captions", captions, None), ("style", [STYLE] * len(captions), 1.0)):

        def draw(name: str, steps: int, prompts=prompts, scale=scale) -> np.ndarray:
            settings = settings_for(config, samplers[name], args.seed, steps=steps, guidance_scale=scale)
            return pipeline.draw(prompts, [""] * len(prompts), list(range(len(prompts))), settings)

        table[kind], shown = measure(draw, samplers, pipeline.schedule)
        shown = {name: pictures[:SHOWN] for name, pictures in shown.items()}
        save_png(captioned_rows(shown, prompts[:SHOWN], scale=2), make_folder(args.output_path) / f"{kind}.png")
    heads = [f"{kind}, {calls} calls" for kind in table for calls in CALLS]
    print(f"| sampler | {' | '.join(heads)} |\n{'| --- ' * (len(heads) + 1)}|")
    for name in samplers:
        print(f"| `{name}` | {' | '.join(f'{each:.1f}' for kind in table for each in table[kind][name])} |")


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt_path", type=Path, default=HERE / "models/tiny-vpred.safetensors")
    parser.add_argument("--output_path", default="output/samplers")
    parser.add_argument("--count", type=int, default=12, help="captions, at most 121")
    parser.add_argument("--seed", type=int, default=1, help="of the noise")
    return parser.parse_args()


if __name__ == "__main__":
    runtime.run(main)

"""eval/results_table.py: its rows, resuming and table, with stand-ins for the scripts that draw and measure.

tests/test_scripts.py has it whole, on a narrow model.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import text_to_image
from PIL import Image

from eval import results_runs, results_table
from ldm import checkpoint
from ldm.errors import UserError
from ldm.pictures import save_drawn

CAPTIONS = ["a cat", "two dogs,\nrunning", "a | b"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A data set with three pictures, two checkpoints, and `calls`: the scripts that were run."""
    (tmp_path / "birds" / "test").mkdir(parents=True)
    with open(tmp_path / "birds/test/img_txt.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dir", "text"])
        for i, caption in enumerate(CAPTIONS):
            Image.new("RGB", (30 + i, 20), (80 * i, 0, 0)).save(tmp_path / f"birds/test/{i}.png")
            writer.writerow([f"{i}.png", caption])
    for name in ("one", "two"):
        checkpoint.save(tmp_path / f"{name}.safetensors", {"x": np.ones(len(name), np.float32)}, {}, "safetensors")
    (tmp_path / "weights.pth").write_bytes(b"x")
    monkeypatch.setattr(results_runs, "run_script", stand_in)
    monkeypatch.setattr(results_runs, "find_spec", lambda name: True)
    for module in (results_runs.inception, results_runs.clip_weights):
        monkeypatch.setattr(module, "search", lambda path: Path(path) if Path(path).is_absolute() else None)
    stand_in.calls = []
    return tmp_path


def stand_in(script, words, stdout=None):
    stand_in.calls.append(script)
    words = [str(word) for word in words]
    if script == "text_to_image.py":
        args = text_to_image.build_parser().parse_args(words)
        assert args.resume
        for picture in text_to_image.plan(args):
            path = Path(args.output_path, f"samples/{picture.number:05}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                save_drawn(np.full((64, 64, 3), 50, np.uint8), path, {"prompt": picture.prompt})
    elif script == "tools/measure_offline.py":
        return json.dumps({"pictures": 3, "kid_x1000": 7.25, "subset_std": 1.0, "top1": 1 / 3, "top5": 1.0})
    else:
        figures = {
            "eval/eval_fid.py": {"fid": 123.456, "kid": 0.01, "resize": "clean", "weights": "weights.pth"},
            "eval/eval_clip_score.py": {
                "clip_score": {"mean": 31.25, "standard_error": 0.5},
                **dict.fromkeys(("model", "activation", "checkpoint", "prompts_cut"), "said"),
            },
        }
        Path(words[words.index("--output") + 1]).write_text(json.dumps(figures[script]))
    return ""


def table(place, *words) -> list[list[str]]:
    """The cells of the table's rows."""
    base = ["--data_path", place / "birds/test", "--output_path", place / "out", "--config", "configs/tiny-vpred.yaml"]
    results_table.main([str(word) for word in [*base, *words]])
    lines = (place / "out" / "table.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and set(rows[1]) == {"---"}
    return rows[2:]


def test_rows_of_two_checkpoints_with_all_figures(place, capsys):
    weights = ["--inception_checkpoint", place / "weights.pth", "--clip_checkpoint", place / "weights.pth"]
    models = ["--ckpt_path", place / "one.safetensors", place / "two.safetensors", "--name", "first", "second"]
    rows = table(place, *models, *weights, "--dpm_solver", "--sampling_steps", 15, "--scale", 9, "--H", 128)
    common = ["birds/test", "v", "128 × 64", "DPM-Solver (15 steps, scale 9)", "123.5", "10.00", "31.2", "3", "7.2"]
    assert rows == [[name, *common, "33.3%", "100.0%"] for name in ("first", "second")]
    text = (place / "out/table.md").read_text()
    assert "—" not in text and text in capsys.readouterr().out
    with open(place / "out/table.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first["checkpoint"] == "one.safetensors" and first["checkpoint_sha256"] != second["checkpoint_sha256"]
    for key, value in {"sampler": "dpm_solver", "seed": "42", "dtype": "float32", "clip_score": "31.25"}.items():
        assert first[key] == value
    page = (place / "out/samples.md").read_text()
    sheets = [Image.open(place / "out" / part.split(")")[0]) for part in page.split("](")[1:]]
    assert [sheet.height for sheet in sheets] == [sheets[0].height] * 2 and sheets[0].height > 3 * 128
    drawn = sorted((place / "out").glob("first-*/samples/prompts.jsonl"))[0].read_text()
    assert [json.loads(line)["prompt"] for line in drawn.splitlines()] == ["a cat", "two dogs, running", "a | b"]


def test_what_is_drawn_is_kept_and_settings_do_not_mix(place):
    model = ["--ckpt_path", place / "one.safetensors"]
    table(place, *model)
    (samples,) = place.glob("out/*/samples")
    assert stand_in.calls.count("text_to_image.py") == 1
    assert len(table(place, *model, "--batch_size", 2)) == 1  # it changes no picture
    assert stand_in.calls.count("text_to_image.py") == 1
    (samples / "00001.png").unlink()
    assert len(table(place, *model)) == 1 and (samples / "00001.png").exists()
    assert len(table(place, *model, "--set", "model.sampling.steps=9", "model.unet.use_checkpoint=true")) == 2
    with open(place / "out/table.csv", newline="") as file:
        assert {row["set"]: row["sampling_steps"] for row in csv.DictReader(file)} == {
            "": "20",
            "model.sampling.steps=9 model.unet.use_checkpoint=true": "9",
        }
    other = [["--seed", 1], ["--scale", 3], ["--n_samples", 2], ["--limit", 2], ["--negative_prompt", "red"]]
    for number, words in enumerate(other, 3):
        assert len(table(place, *model, *words)) == number
    checkpoint.save(place / "one.safetensors", {"x": np.zeros(3, np.float32)}, {}, "safetensors")  # of the same name
    rows = table(place, *model)
    assert len(rows) == 8 == len(list(place.glob("out/*/samples")))
    # Of equal labels each says its folder. The rows of scale 3 and of 9 steps have labels of their own.
    assert len({row[0] for row in rows}) == 7
    assert sum(row[0] == "one" for row in rows) == 2


def test_what_cannot_be_measured_is_a_dash_and_says_why(place, monkeypatch):
    monkeypatch.setattr(results_runs, "find_spec", lambda name: None)
    (row,) = table(place, "--ckpt_path", place / "one.safetensors")
    assert row[5:] == ["—", "—", "3"]
    text = (place / "out/table.md").read_text()
    assert "— FID: no weights of the Inception network: get https://" in text and "--inception_checkpoint" in text
    assert "— CLIP score: no CLIP checkpoint" in text and "into models" in text
    assert "— offline figures: the package" in text and stand_in.calls == ["text_to_image.py"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--ckpt_path", "{}/one.safetensors", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--ckpt_path", "{}/one.safetensors", "--name", "a", "b", "--version", "tiny", "tiny", "tiny"], "2 values of"),
        (["--ckpt_path", "{}/one.safetensors", "--inception_checkpoint", "nowhere.pth"], "no file nowhere.pth"),
        (["--ckpt_path", "{}/one.safetensors", "--clip_checkpoint", "nowhere.pt"], "no CLIP checkpoint nowhere.pt"),
        (["--ckpt_path", "{}/one.safetensors", "--data_path", "nowhere"], "nowhere' does not exist"),
        (
            ["--ckpt_path", "{}/one.safetensors", "--pretrained_model_path", "nowhere.ckpt"],
            "nowhere.ckpt does not exist",
        ),
        (["--ckpt_path", "{}/one.safetensors", "--limit", "1"], "limit is 1"),
        (["--ckpt_path", "{}/one.safetensors", "--H", "60"], "not divisible"),
        (["--ckpt_path", "{}/one.safetensors", "--skip_save"], "nothing to measure"),
    ],
)
def test_mistakes_are_told_before_anything_is_drawn(place, words, message):
    with pytest.raises(UserError, match=message) as error:
        table(place, *(str(word).replace("{}", str(place)) for word in words))
    assert "\n" not in str(error.value) and not stand_in.calls and not list(place.glob("out/*/"))


def test_an_option_that_no_script_knows_is_refused(place, capsys):
    with pytest.raises(SystemExit):
        table(place, "--ckpt_path", place / "one.safetensors", "--sampling_stepz", 3)
    assert "unknown option --sampling_stepz; the nearest known option is --sampling_steps" in capsys.readouterr().err


def test_captions_that_nothing_can_be_drawn_from(place):
    (place / "birds/test/img_txt.csv").write_text('dir,text\n0.png,a cat\n1.png," "\n')
    with pytest.raises(UserError, match=r"1 pictures in .* have no caption to draw from, the first: \S+1\.png"):
        table(place, "--ckpt_path", place / "one.safetensors")


def test_a_script_that_fails_leaves_what_was_drawn(place, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UserError, match="nowhere.py failed.*the same command goes on"):
        results_runs.run_script("nowhere.py", [])

"""CLIP of eval/: the towers against their definition in NumPy, foreign names, preprocessing, and the script as run."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from odd_pictures import odd_pictures
from PIL import Image
from ranks_in_threads import run_ranks

from eval import clip_inputs, clip_scores, clip_weights, eval_clip_score
from eval.clip import CLIP, MEAN, STD, config_of, preprocess
from ldm.checkpoint import formats
from ldm.errors import UserError
from ldm.pictures import read_record, save_drawn, save_png

WIDTH, LAYERS, PATCH, SIZE, TOKENS, FEATURES, VOCABULARY = 64, 2, 32, 64, 77, 48, 1024
PROMPTS = ["a red square", "a blue square", "green"]


def shapes(
    width=WIDTH,
    patch=PATCH,
    size=SIZE,
    layers=LAYERS,
    text=WIDTH,
    text_layers=LAYERS,
    features=FEATURES,
    vocab=VOCABULARY,
):
    """OpenAI's names and shapes."""
    table = {
        "visual.class_embedding": (width,),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.positional_embedding": ((size // patch) ** 2 + 1, width),
        "visual.proj": (width, features),
        "token_embedding.weight": (vocab, text),
        "positional_embedding": (TOKENS, text),
        "text_projection": (text, features),
    }
    norms = {"visual.ln_pre": width, "visual.ln_post": width, "ln_final": text}
    for tower, depth, w in (("visual.", layers, width), ("", text_layers, text)):
        for i in range(depth):
            block = f"{tower}transformer.resblocks.{i}."
            norms.update({f"{block}ln_1": w, f"{block}ln_2": w})
            table.update({f"{block}attn.in_proj_weight": (3 * w, w), f"{block}attn.in_proj_bias": (3 * w,)})
            for part, out, inner in (("attn.out_proj", w, w), ("mlp.c_fc", 4 * w, w), ("mlp.c_proj", w, 4 * w)):
                table.update({f"{block}{part}.weight": (out, inner), f"{block}{part}.bias": (out,)})
    for name, w in norms.items():
        table.update({f"{name}.weight": (w,), f"{name}.bias": (w,)})
    return table


def random_tensors(seed=0):
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes().items():
        norm = ".ln_" in f".{name}" and name.endswith("weight")
        tensors[name] = (rng.standard_normal(shape) * 0.15 + norm).astype(np.float32)
    return tensors


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


def build(tensors, activation=None):
    model = CLIP(config_of(tensors, activation))
    model.load(tensors, "the test's file")
    return model


@pytest.fixture(scope="module")
def model(tensors):
    return build(tensors)


# ---- the definition, float64 ----


def norm(x, w, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


ACTIVATE = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
}


def block(x, w, name, mask, activation):
    y = norm(x, w, f"{name}ln_1")
    q, k, v = np.split(y @ w[f"{name}attn.in_proj_weight"].T + w[f"{name}attn.in_proj_bias"], 3, -1)  # one head
    scores = q @ k.swapaxes(1, 2) / math.sqrt(WIDTH) + mask
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    x = (
        x
        + scores / scores.sum(-1, keepdims=True) @ v @ w[f"{name}attn.out_proj.weight"].T
        + w[f"{name}attn.out_proj.bias"]
    )
    y = ACTIVATE[activation](norm(x, w, f"{name}ln_2") @ w[f"{name}mlp.c_fc.weight"].T + w[f"{name}mlp.c_fc.bias"])
    return x + y @ w[f"{name}mlp.c_proj.weight"].T + w[f"{name}mlp.c_proj.bias"]


def image_definition(pixels, w, activation):
    w = {name: array.astype(np.float64) for name, array in w.items()}
    tokens = [np.broadcast_to(w["visual.class_embedding"], (len(pixels), WIDTH))]
    for top in range(0, SIZE, PATCH):
        for left in range(0, SIZE, PATCH):
            patch = pixels[:, :, top : top + PATCH, left : left + PATCH]
            tokens.append(np.einsum("bchw,ochw->bo", patch, w["visual.conv1.weight"]))
    x = norm(np.stack(tokens, 1) + w["visual.positional_embedding"], w, "visual.ln_pre")
    for i in range(LAYERS):
        x = block(x, w, f"visual.transformer.resblocks.{i}.", 0, activation)
    return norm(x[:, 0], w, "visual.ln_post") @ w["visual.proj"]


def text_definition(ids, w, activation):
    w = {name: array.astype(np.float64) for name, array in w.items()}
    x = w["token_embedding.weight"][ids] + w["positional_embedding"]
    mask = np.triu(np.full((TOKENS, TOKENS), -np.inf), 1)
    for i in range(LAYERS):
        x = block(x, w, f"transformer.resblocks.{i}.", mask, activation)
    return norm(x, w, "ln_final")[np.arange(len(ids)), ids.argmax(1)] @ w["text_projection"]


def close(got, wanted):
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))) < 1e-5


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_features_are_the_definition(tensors, model, activation):
    model = model if activation == "quick_gelu" else build(tensors, activation)
    pixels = np.random.default_rng(1).standard_normal((3, 3, SIZE, SIZE)).astype(np.float32)
    assert close(model.image_features(pixels), image_definition(pixels, tensors, activation))
    texts = ["", "word " * 100, "before <|endoftext|> after"]
    assert close(model.text_features(texts), text_definition(model.tokenizer.encode(texts), tensors, activation))


def test_a_long_prompt_keeps_its_first_tokens_and_the_end(model):
    long = " ".join(["a"] * 100)
    ids = model.tokenizer.encode([long])[0]
    assert ids[-1] == model.tokenizer.end and (ids[1:-1] == model.tokenizer.tokens("a")[0]).all()
    assert [model.is_cut(" ".join(["a"] * n)) for n in (1, 75, 76)] == [False, False, True]


# ---- which CLIP ----

PUBLISHED = {  # name: (width, patch, size, layers, width of texts, their layers, features)
    "ViT-B/32": (768, 32, 224, 12, 512, 12, 512),
    "ViT-B/16": (768, 16, 224, 12, 512, 12, 512),
    "ViT-L/14": (1024, 14, 224, 24, 768, 12, 768),
    "ViT-L/14 at 336 pixels": (1024, 14, 336, 24, 768, 12, 768),
    "ViT-H/14": (1280, 14, 224, 32, 1024, 24, 1024),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_tell_the_model(name):
    empty = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes(*PUBLISHED[name], 49408).items()}
    config = config_of(empty)
    width, patch, size, layers, text, text_layers, features = PUBLISHED[name]
    assert (config.name, config.features) == (name, features)
    assert config.activation == ("gelu" if "H" in name else "quick_gelu")
    assert config_of(empty, "gelu").activation == "gelu"
    image = config.image
    assert (image.width, image.patch, image.size, image.layers) == (width, patch, size, layers)
    assert (image.heads, config.text.heads) == {768: (12, 8), 1024: (16, 12), 1280: (16, 16)}[width]
    assert (config.text.width, config.text.layers, config.text.context_length) == (text, text_layers, 77)


@pytest.mark.parametrize("lost", ["visual.conv1.weight", "text_projection", "visual.positional_embedding"])
def test_what_is_no_clip_is_refused(tensors, lost):
    with pytest.raises(UserError, match="no CLIP with a vision transformer"):
        config_of({name: array for name, array in tensors.items() if name != lost})


def test_a_missing_weight_is_an_error(tensors):
    part = {name: array for name, array in tensors.items() if not name.endswith("0.ln_1.bias")}
    with pytest.raises(UserError, match="missing 2"):
        build(part)


# ---- names ----


def as_transformers(tensors):
    """The same weights as CLIPModel of transformers has them."""
    named = {"logit_scale": np.float32(4.6), "text_model.embeddings.position_ids": np.arange(77)[None]}
    for name, array in tensors.items():
        new = clip_weights.TRANSFORMERS.to_right(name)
        if "in_proj_" in new:
            for x, part in zip("qkv", np.split(array, 3)):
                named[new.replace("in_proj_", f"{x}_proj.")] = part
        else:
            named[new] = array.T if new in clip_weights.TRANSPOSED else array
    return named


def as_mindone(tensors):
    return {
        **{clip_weights.MINDONE.to_right(name): array for name, array in tensors.items()},
        "logit_scale": np.zeros(()),
    }


def as_trained_by_openclip(tensors):
    return {f"module.{name}": array for name, array in {**tensors, "logit_scale": np.zeros(())}.items()}


@pytest.mark.parametrize("naming", [dict, as_transformers, as_mindone, as_trained_by_openclip])
def test_every_naming_is_the_same_model(tensors, naming):
    read = clip_weights.to_openai(naming(tensors))
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name], array) for name, array in tensors.items())


def test_names_as_the_projects_write_them(tensors):
    foreign = as_transformers(tensors)
    layer = "vision_model.encoder.layers.1."
    expected = {"vision_model.pre_layrnorm.weight", "text_model.final_layer_norm.bias", "visual_projection.weight"}
    expected |= {layer + "self_attn.q_proj.bias", layer + "mlp.fc1.weight", layer + "layer_norm2.bias"}
    assert expected <= foreign.keys()
    mindone = as_mindone(tensors)
    expected = {"token_embedding.embedding_table", "visual.ln_pre.gamma", "ln_final.beta", "visual.proj"}
    expected |= {"transformer.resblocks.0.attn.in_proj.weight", "visual.transformer.resblocks.1.ln_2.gamma"}
    assert expected <= mindone.keys()


def test_two_names_for_one_weight_are_an_error(tensors):
    with pytest.raises(UserError, match="holds ln_final.weight twice"):
        clip_weights.to_openai({**tensors, "ln_final.gamma": tensors["ln_final.weight"]})


def test_files_beside_the_weights_say_the_activation(tmp_path):
    weights = tmp_path / "model.safetensors"
    assert clip_weights.stated_activation(weights) is None
    part = {"hidden_act": "gelu"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    assert clip_weights.stated_activation(weights) == "quick_gelu"
    (tmp_path / "config.json").write_text(json.dumps({"text_config": part, "vision_config": part}))
    assert clip_weights.stated_activation(weights) == "gelu"
    (tmp_path / "config.json").write_text("no json")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 1024}}))
    assert clip_weights.stated_activation(weights) == "gelu"


def test_a_checkpoint_that_is_not_there_says_which_to_get(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clip_weights, "search", lambda path: None)
    with pytest.raises(UserError, match=r"get https://openaipublic\S+/ViT-L-14\.pt and put it into \S+models"):
        clip_weights.find(None)
    with pytest.raises(UserError, match=r"models/clip_vit_b_16\.ckpt: get https://ascend-repo\S+clip_vit_b_16\.ckpt"):
        clip_weights.find("models/clip_vit_b_16.ckpt")
    with pytest.raises(UserError, match="holds no CLIP checkpoint"):
        clip_weights.find(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert clip_weights.find(str(tmp_path)) == tmp_path / "pytorch_model.bin"


# ---- preprocessing ----


def test_a_picture_of_the_right_size_is_only_normalized():
    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    expected = (picture / 255 - MEAN) / STD
    assert np.abs(preprocess(picture, SIZE) - expected.transpose(2, 0, 1)).max() < 1e-5


def test_the_middle_is_kept_and_the_proportions():
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, 100:200] = 255
    assert (preprocess(picture, 50) == ((1 - MEAN) / STD)[:, None, None]).mean() > 0.9
    assert preprocess(np.zeros((1, 5000, 3), np.uint8), 50).shape == (3, 50, 50)


# ---- scores ----


def test_the_scale_and_the_standard_error():
    assert clip_scores.scaled(np.array([0.3, -0.2, 1.0])) == pytest.approx([30, 0, 100])
    facts = clip_scores.summary(np.array([30.0, 32.0, 34.0, 36.0]), "x")
    assert facts["mean"] == 33 and facts["standard_error"] == pytest.approx(math.sqrt(20 / 3 / 4))
    assert clip_scores.summary(np.array([30.0]), "x")["standard_error"] is None


def test_directional_similarity_is_the_cosine_of_the_changes():
    rows = clip_scores.unit(np.random.default_rng(0).standard_normal((4, 3, 8)))
    images, sources, texts, source_texts = rows
    got = clip_scores.directional(images, sources, texts, source_texts)
    for i in range(3):
        a, b = images[i] - sources[i], texts[i] - source_texts[i]
        assert got[i] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert clip_scores.directional(images, sources, images, sources) == pytest.approx(1)
    assert (clip_scores.directional(images, images, texts, source_texts) == 0).all()


def test_matching():
    assert clip_inputs.matched(["a", "b"], 4, "prompts") == ["a", "a", "b", "b"]
    assert clip_inputs.matched(["a"], 2, "prompts") == ["a", "a"]
    for number in (1, 3):
        with pytest.raises(UserError, match=f"^{number} pictures cannot be matched to 2 prompts"):
            clip_inputs.matched(["a", "b"], number, "prompts")


# ---- the script ----


@pytest.fixture(scope="module")
def place(tmp_path_factory, tensors):
    """clip.safetensors, six pictures in samples/ whose numbers and names sort differently, and prompts."""
    folder = tmp_path_factory.mktemp("clip")
    formats.write(folder / "clip.safetensors", tensors, {}, "safetensors")
    (folder / "samples").mkdir()
    rng = np.random.default_rng(3)
    for i in range(6):
        text = {"parameters": json.dumps({"prompt": PROMPTS[i // 2], "number": i})}
        save_png(rng.integers(0, 256, (80, 70 + i, 3), np.uint8), folder / "samples" / f"{i + 7}.png", text)
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "", ""]))
    return folder


def run(monkeypatch, place, *words, model=None):
    base = ["--image_path", place / "samples", "--load_checkpoint", place / "clip.safetensors", "--batch_size", 3]
    words = list(map(str, [*base, "--output", place / "out.json", *words]))
    monkeypatch.setattr(sys, "argv", ["eval_clip_score.py", *words])
    if model:  # with its graphs compiled already
        monkeypatch.setattr(eval_clip_score, "load_model", lambda *_: model)
    eval_clip_score.main()
    return json.loads((place / "out.json").read_text())


def test_scores_of_a_folder(monkeypatch, place, model, capsys):
    result = run(monkeypatch, place, "--prompt", place / "prompts.txt")
    assert [pair["image"].rsplit("/")[-1] for pair in result["pairs"]] == [f"{i}.png" for i in range(7, 13)]
    assert [pair["prompt"] for pair in result["pairs"]] == [prompt for prompt in PROMPTS for _ in range(2)]
    pixels = [preprocess(np.asarray(Image.open(place / "samples" / f"{i}.png")), SIZE) for i in range(7, 13)]
    images = np.concatenate([model.image_features(np.stack(pixels[i : i + 3])) for i in (0, 3)])
    texts = model.text_features(PROMPTS)
    for i, pair in enumerate(result["pairs"]):
        a, b = images[i].astype(np.float64), texts[i // 2].astype(np.float64)
        expected = max(0, 100 * a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert pair["clip_score"] == pytest.approx(expected, abs=1e-3)
    assert result["clip_score"]["scale"] == "100 * max(cosine, 0)"
    assert result["clip_score"]["mean"] == pytest.approx(np.mean([pair["clip_score"] for pair in result["pairs"]]))
    assert (result["activation"], result["prompts"], result["prompts_cut"]) == ("quick_gelu", 3, 0)
    line = capsys.readouterr().out
    assert line.startswith("clip_score ") and "100 * max(cosine, 0)" in line and "6 pictures" in line
    own = run(monkeypatch, place, "--prompt", "from_png", model=model)
    assert own["clip_score"] == pytest.approx(result["clip_score"])
    record = place / "elsewhere.jsonl"  # in no order, one picture drawn twice, one not in it, the last line cut
    lines = [{"file": f"{i}.png", "prompt": PROMPTS[(i - 7) // 2]} for i in (12, 10, 9, 8, 7)]
    text = "\n".join(map(json.dumps, [{"file": "12.png", "prompt": "another"}, *lines]))
    record.write_text(text + '\n{"file": "13.png", "pro')
    recorded = run(monkeypatch, place, "--prompt", record, model=model)
    assert recorded["clip_score"] == pytest.approx(result["clip_score"])
    assert [pair["prompt"] for pair in recorded["pairs"]] == [pair["prompt"] for pair in result["pairs"]]


def test_a_folder_with_its_record_needs_no_prompts(monkeypatch, tmp_path, place, model, caplog):
    for i, prompt in enumerate(PROMPTS):
        save_drawn(np.full((8, 8, 3), 80 * i, np.uint8), tmp_path / f"{i}.png", {"prompt": prompt + "\u2028\nline"})
    result = run(monkeypatch, place, "--image_path", tmp_path, model=model)
    assert [pair["prompt"] for pair in result["pairs"]] == [f"{prompt}\u2028\nline" for prompt in PROMPTS]
    whole = SimpleNamespace(image_path=str(tmp_path / "run"), prompt=None, source_prompt=None, source_path=None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").symlink_to(tmp_path)
    vars(whole).update(reference_path=None, batch_size=1, output=None)
    eval_clip_score.check_options(whole)
    assert clip_inputs.list_inputs(whole)["prompts"] == [pair["prompt"] for pair in result["pairs"]]
    (tmp_path / "run" / "samples").unlink()
    assert result["clip_score"]["pictures"] == 3
    record = tmp_path / "prompts.jsonl"
    record.write_bytes(record.read_bytes()[:-20])  # as a full disk leaves it
    save_drawn(np.zeros((8, 8, 3), np.uint8), tmp_path / "3.png", {"prompt": "new"})
    assert sorted(read_record(record)) == ["0.png", "1.png", "3.png"] and "1 of 4 lines" in caplog.text
    alone = SimpleNamespace(image_path=str(tmp_path / "1.png"), prompt=str(record), source_prompt=None)
    alone.reference_path = None
    assert clip_inputs.list_inputs(alone)["prompts"] == ["a blue square\u2028\nline"]
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "3.png", tmp_path / "more")
    with pytest.raises(UserError, match="some pictures share theirs"):
        run(monkeypatch, place, "--image_path", tmp_path, model=model)


class Small:
    """What stands for a CLIP: the mean colour, and the same for every text."""

    config = SimpleNamespace(name="small", activation="gelu", image=SimpleNamespace(size=8), text=SimpleNamespace())
    config.text.context_length = 77

    def image_features(self, pixels):
        return np.concatenate([pixels.mean((2, 3)), np.ones((len(pixels), 1))], 1)

    def text_features(self, texts):
        return np.ones((len(texts), 4))

    def is_cut(self, text):
        return False


@pytest.mark.parametrize("size", [2, 7])
def test_ranks_score_their_shares(monkeypatch, tmp_path, place, size):
    words = ["--prompt", place / "prompts.txt", "--reference_path", place / "samples" / "7.png"]
    alone = run(monkeypatch, place, *words, model=Small())
    words += ["--image_path", place / "samples", "--load_checkpoint", place / "clip.safetensors"]
    run_ranks(monkeypatch, size, eval_clip_score, [*map(str, words), "--output", str(tmp_path / "together.json")])
    assert len({pair["clip_score"] for pair in alone["pairs"]}) == 6
    assert json.loads((tmp_path / "together.json").read_text()) == alone


def test_pictures_of_every_kind_and_one_alone(monkeypatch, tmp_path, place):
    odd = odd_pictures(tmp_path / "odd")
    result = run(monkeypatch, place, "--image_path", odd, "--prompt", "a picture", model=Small())
    assert result["clip_score"]["pictures"] == 12 and 0 <= result["clip_score"]["mean"] <= 100
    alone = run(monkeypatch, place, "--image_path", odd / "grey.png", "--prompt", "a picture", model=Small())
    (pair,) = [pair for pair in result["pairs"] if pair["image"].endswith("grey.png")]
    assert alone["clip_score"]["standard_error"] is None
    assert alone["clip_score"]["mean"] == pytest.approx(pair["clip_score"])


def test_ten_thousand_files(monkeypatch, tmp_path, place):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(10_000):
        os.link(place / "samples" / "7.png", folder / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(map(str, range(5_000))))
    monkeypatch.setattr(clip_scores, "decode", lambda path: None)
    monkeypatch.setattr(clip_scores, "preprocess", lambda picture, size: np.zeros((3, size, size), np.float32))
    words = ["--image_path", folder, "--prompt", tmp_path / "prompts.txt", "--batch_size", 100]
    result = run(monkeypatch, place, *words, model=Small())
    assert [pair["prompt"] for pair in result["pairs"]] == [str(i // 2) for i in range(10_000)]
    assert result["pairs"][-1]["image"].endswith("/9999.png")


def test_many_pictures_to_one_real_picture(monkeypatch, place, model):
    (place / "real").mkdir()
    for i in (7, 9, 11):
        shutil.copy(place / "samples" / f"{i}.png", place / "real")
    result = run(monkeypatch, place, "--reference_path", place / "real", model=model)
    assert "clip_score" not in result
    scores = [pair["clip_i"] for pair in result["pairs"]]
    assert scores[::2] == pytest.approx([100, 100, 100], abs=1e-3) and max(scores[1::2]) < 99.9
    assert result["pairs"][3]["reference"].endswith("9.png")


def test_directional_similarity_of_unchanged_pictures(monkeypatch, place, model):
    (place / "long.txt").write_text("\n".join(["word " * 90, "b", "c"]))
    words = ("--prompt", place / "long.txt", "--source_prompt", "a square", "--source_path", place / "samples")
    result = run(monkeypatch, place, *words, model=model)
    assert result["directional_similarity"]["mean"] == 0 and "-1 to 1" in result["directional_similarity"]["scale"]
    assert (result["prompts"], result["prompts_cut"], result["tokens_seen"]) == (4, 1, 77)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to compare with"),
        (("--prompt", "a\nb.txt"), "cannot read the prompt file"),
        (("--prompt", " "), "no prompt in"),
        (("--prompt", "a", "--source_prompt", "b"), "needs both"),
        (("--source_prompt", "b", "--source_path", "c"), "needs --prompt"),
        (("--prompt", "a", "--batch_size", "0"), "batch_size is 0"),
        (("--prompt", "a", "--output", "nowhere/x.json"), "cannot write nowhere/x.json"),
        (("--prompt", "a", "--reference_path", "nowhere"), "there is no folder nowhere"),
        (("--prompt", "a", "--load_checkpoint", "nowhere.pt"), "no CLIP checkpoint nowhere.pt: get https"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, place, words, message):
    base = ["--image_path", str(place / "samples"), "--load_checkpoint", str(place / "clip.safetensors")]
    monkeypatch.setattr(sys, "argv", ["eval_clip_score.py", *base, *words])
    with pytest.raises(UserError, match=message) as error:
        eval_clip_score.main()
    assert "\n" not in str(error.value).replace("a\nb", "")


def test_pictures_without_a_prompt_and_broken_ones(monkeypatch, tmp_path, place):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    base = ["eval_clip_score.py", "--image_path", str(tmp_path), "--load_checkpoint", str(place / "clip.safetensors")]
    monkeypatch.setattr(sys, "argv", [*base, "--prompt", "from_png"])
    with pytest.raises(UserError, match=r"0\.png does not say its prompt"):
        eval_clip_score.main()
    whole = (place / "samples" / "7.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"1 of 2 pictures cannot be used.*1\.png"):
        eval_clip_score.main()

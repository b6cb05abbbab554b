"""CLIP's features and scores against transformers and OpenCLIP at the same random weights, from files as they write."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity")
try:  # beside a PyTorch for CPUs a torchvision for GPUs lacks its operators, which nothing here needs
    import torchvision  # noqa: F401
except RuntimeError:
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except ImportError:
    pass
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")

from eval import clip, clip_scores, clip_weights, eval_clip_score
from eval.clip import preprocess
from ldm.checkpoint import formats

pytestmark = pytest.mark.parity
SIZE, VOCABULARY = 64, 1024
TEXTS = ["a drawing of a red apple", "two birds", "word " * 100, "", "A green square."]


def pixels():
    return np.random.default_rng(0).standard_normal((len(TEXTS), 3, SIZE, SIZE)).astype(np.float32)


def randomize(network):
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        norm = parameter.ndim == 1 and ("norm" in name or "layrnorm" in name or ".ln_" in f".{name}")
        torch.nn.init.normal_(parameter, 1.0 if norm and name.endswith("weight") else 0.0, 0.1)
    return network.eval()


def relative_rms(got, wanted):
    assert got.shape == wanted.shape
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


def compare(path, wanted_images, wanted_texts, activation=None):
    """Features to 1e-4 and scores to 1e-3 of what another implementation gives for the weights in that file."""
    model = eval_clip_score.load_model(path, activation)
    images, texts = model.image_features(pixels()), model.text_features(TEXTS)
    assert relative_rms(images, wanted_images) < 1e-4
    assert relative_rms(texts, wanted_texts) < 1e-4
    a, b, c, d = (clip_scores.unit(x.astype(np.float64)) for x in (images, texts, wanted_images, wanted_texts))
    assert np.abs(100 * a @ b.T - 100 * c @ d.T).max() < 1e-3
    return model


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def reference(request):
    """transformers' CLIPModel and its features of pixels() and TEXTS."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    sizes["hidden_act"] = request.param
    ends = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": VOCABULARY},
        vision_config={**sizes, "image_size": SIZE, "patch_size": 32},
        projection_dim=48,
    )
    network = randomize(transformers.CLIPModel(config))
    ids = clip.Tokenizer(VOCABULARY).encode(TEXTS).astype(np.int64)
    with torch.no_grad():
        out = network(torch.from_numpy(ids), torch.from_numpy(pixels()))
        images = network.visual_projection(network.vision_model(torch.from_numpy(pixels())).pooler_output)
        texts = network.text_projection(network.text_model(torch.from_numpy(ids)).pooler_output)
    return network, images.numpy(), texts.numpy(), out.logits_per_image.numpy() / network.logit_scale.exp().item()


def test_a_folder_of_transformers(reference, tmp_path):
    network, images, texts, cosines = reference
    network.save_pretrained(tmp_path)
    model = compare(clip_weights.find(str(tmp_path)), images, texts)  # config.json says the activation
    assert model.config.activation == network.config.text_config.hidden_act
    a, b = clip_scores.unit(model.image_features(pixels())), clip_scores.unit(model.text_features(TEXTS))
    assert np.abs(100 * a @ b.T - 100 * cosines).max() < 1e-3


class Table(torch.nn.Module):
    """A tree of modules with the given parameters, by their dotted names."""

    def __init__(self, tensors):
        super().__init__()
        for name in dict.fromkeys(name.split(".")[0] for name in tensors):
            if name in tensors:
                setattr(self, name, torch.nn.Parameter(tensors[name]))
            else:
                self.add_module(
                    name, Table({k[len(name) + 1 :]: t for k, t in tensors.items() if k.startswith(f"{name}.")})
                )

    def forward(self):
        return torch.zeros(1)


def openai_names(network):
    """transformers' state dict by OpenAI's names, written out beside what eval/clip_weights.py does."""
    table = {}
    state = network.state_dict()
    for ours, theirs in (("visual.", "vision_model."), ("", "text_model.")):
        for i in range(2):
            block, layer = f"{ours}transformer.resblocks.{i}.", f"{theirs}encoder.layers.{i}."
            for leaf in ("weight", "bias"):
                trio = [state[f"{layer}self_attn.{x}_proj.{leaf}"] for x in "qkv"]
                table[f"{block}attn.in_proj_{leaf}"] = torch.cat(trio)
                table[f"{block}attn.out_proj.{leaf}"] = state[f"{layer}self_attn.out_proj.{leaf}"]
                table[f"{block}mlp.c_fc.{leaf}"] = state[f"{layer}mlp.fc1.{leaf}"]
                table[f"{block}mlp.c_proj.{leaf}"] = state[f"{layer}mlp.fc2.{leaf}"]
                for norm in "12":
                    table[f"{block}ln_{norm}.{leaf}"] = state[f"{layer}layer_norm{norm}.{leaf}"]
    for leaf in ("weight", "bias"):
        table[f"visual.ln_pre.{leaf}"] = state[f"vision_model.pre_layrnorm.{leaf}"]
        table[f"visual.ln_post.{leaf}"] = state[f"vision_model.post_layernorm.{leaf}"]
        table[f"ln_final.{leaf}"] = state[f"text_model.final_layer_norm.{leaf}"]
    table["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    table["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    table["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    table["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    table["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    table["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    table["text_projection"] = state["text_projection.weight"].T.contiguous()
    table["logit_scale"] = state["logit_scale"]
    return table


def test_a_torchscript_archive_with_openai_names(reference, tmp_path):
    network, images, texts, _ = reference
    table = openai_names(network)
    table["input_resolution"] = torch.tensor(float(SIZE))  # what OpenAI's archives hold beside the weights
    torch.jit.save(torch.jit.script(Table(table)), tmp_path / "ViT.pt")
    read = formats.read(tmp_path / "ViT.pt")[0]
    assert read.keys() == table.keys()
    assert all(np.array_equal(read[name], tensor.numpy()) for name, tensor in table.items())
    compare(tmp_path / "ViT.pt", images, texts, network.config.text_config.hidden_act)


def test_half_precision_and_buffers_of_torchscript(tmp_path):
    network = torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3).half(), torch.nn.BatchNorm2d(8)))
    network.save(str(tmp_path / "t.pt"))
    read = formats.read(tmp_path / "t.pt")[0]
    assert read.keys() == network.state_dict().keys() and read["0.weight"].dtype == np.float16
    assert all(np.array_equal(read[name], tensor.numpy()) for name, tensor in network.state_dict().items())


# ---- OpenCLIP ----


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip", reason="pip install --no-deps open_clip_torch timm torchvision==0.28.0")


@pytest.mark.parametrize("heads_of_80", [False, True])
def test_openclip(open_clip, tmp_path, monkeypatch, heads_of_80):
    width = 160 if heads_of_80 else 64
    if heads_of_80:  # as ViT-H/14, which is 1280 wide
        monkeypatch.setitem(clip.WIDE_HEADS, width, 80)
    image = {"image_size": SIZE, "patch_size": 32, "width": width, "layers": 2, "head_width": 80 if heads_of_80 else 64}
    text = {"context_length": 77, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 2}
    network = randomize(open_clip.CLIP(48, image, text, quick_gelu=not heads_of_80))
    ids = torch.from_numpy(clip.Tokenizer(VOCABULARY).encode(TEXTS).astype(np.int64))
    with torch.no_grad():
        images, texts = network.encode_image(torch.from_numpy(pixels())), network.encode_text(ids)
    torch.save({f"module.{name}": tensor for name, tensor in network.state_dict().items()}, tmp_path / "epoch_1.pt")
    compare(tmp_path / "epoch_1.pt", images.numpy(), texts.numpy())
    torch.save(network.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": not heads_of_80}}))
    compare(clip_weights.find(str(tmp_path)), images.numpy(), texts.numpy())


SIZES = [(64, 64), (97, 64), (64, 131), (300, 201), (40, 50), (33, 100), (1000, 130)]


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_of_openclip(open_clip, size):
    from open_clip.transform import image_transform

    picture = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    wanted = image_transform(SIZE, is_train=False)(clip.Image.fromarray(picture)).numpy()
    assert np.abs(preprocess(picture, SIZE) - wanted).max() < 1e-5


@pytest.mark.parametrize("size", [(64, 64), (128, 96), (300, 200), (40, 50)])
def test_preprocessing_of_transformers(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    picture = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    wanted = processor(clip.Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
    assert np.abs(preprocess(picture, SIZE) - wanted).max() < 1e-5


@pytest.mark.parametrize("text", TEXTS[:4] + ["don't &amp; “stop”", "x" * 200])
def test_long_prompts_are_cut_as_openclip_does(open_clip, text):
    ours = clip.Tokenizer().encode([text])[0]
    assert (ours == open_clip.tokenize([text])[0].numpy()).all()

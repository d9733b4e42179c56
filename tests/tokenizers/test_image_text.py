"""Frames and texts get the embeddings that transformers' own models give them, from tiny checkpoints at random."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokenmill.pipeline.relevance import FrameEncoder, calibrated
from tokenmill.schemas.errors import RecipeError, TokenizerError
from tokenmill.schemas.relevance import STANDARDIZED
from tokenmill.tokenizers.image_text import CLIP_MEAN, CLIP_STD, ImageTextEncoder, patch_grid, resized

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "square", "dog", "big", "runs"]
MODEL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = MODEL | {"vocab_size": 16, "max_position_embeddings": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
VISION = MODEL | {"patch_size": 8}
SQUARE = {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
EDGE = {
    "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 3,
    "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
}  # fmt: skip
SETTINGS = {"clip": EDGE, "siglip": SQUARE, "siglip2": {"resample": 2, "max_num_patches": 12, "patch_size": 8}}
KINDS = tuple(SETTINGS)
Folder = Callable[..., Path]


def frames(num: int = 3, height: int = 48, width: int = 60, seed: int = 0) -> np.ndarray:
    """Pictures of smooth random colours, and edges."""
    coarse = np.random.default_rng(seed).integers(0, 256, (num, 3, 6, 7)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), size=(height, width), mode="bicubic")
    made = smooth.permute(0, 2, 3, 1).clamp(0, 255).to(torch.uint8).numpy().copy()
    made[:, height // 4 : height // 2, width // 3 : width // 2] = (250, 20, 20)
    return made


def build(kind: str) -> Any:
    """A model of transformers at random, whose embeddings differ a lot between frames."""
    import transformers

    name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[kind]
    vision = VISION | ({"num_patches": 16} if kind == "siglip2" else {"image_size": 32})
    more = {"projection_dim": 12} if kind == "clip" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(text_config=TEXT, vision_config=vision, **more)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
        model.logit_scale.fill_(1.5)
        if kind != "clip":
            model.logit_bias.fill_(-0.7)
    return model.eval()


def save_tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    import tokenizers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: build(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def saved(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        models[kind].save_pretrained(folder)
        save_tokenizer(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS[kind]))
    return folders


@pytest.fixture
def copied(saved: dict[str, Path], tmp_path: Path) -> Folder:
    """copied(kind, **settings): a copy of a checkpoint that may be changed, perhaps with other settings of frames."""

    def copy(kind: str, **settings: Any) -> Path:
        shutil.copytree(saved[kind], tmp_path / kind)
        if settings:
            (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(SETTINGS[kind] | settings))
        return tmp_path / kind

    return copy


def load(folder: Path, dtype: str = "float32", **options: Any) -> ImageTextEncoder:
    return ImageTextEncoder(str(folder), "cpu", dtype, options)


def unit(rows: torch.Tensor) -> np.ndarray:
    return (rows / rows.norm(dim=-1, keepdim=True)).detach().numpy()


def by_pil(frame: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """float64 grey levels of a frame that PIL resized to (height, width)."""
    return np.asarray(Image.fromarray(frame).resize(size[::-1], resample), np.float64)


def plain_pixels(kind: str, pictures: np.ndarray) -> torch.Tensor:
    """What the settings of a kind make of frames, written down anew on PIL."""
    made = []
    for one in pictures:
        if kind == "clip":  # 48x60: the shorter side becomes 36, the longer 45, of which the middle 32 are seen
            grey = by_pil(one, (36, 45), Image.Resampling.BICUBIC)[2:34, 6:38]
            made.append((grey / 255 - CLIP_MEAN) / CLIP_STD)
        else:
            made.append(by_pil(one, (32, 32), Image.Resampling.BICUBIC) / 127.5 - 1)
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_of_frames_are_those_of_the_model(saved: dict[str, Path], models: dict[str, Any], kind: str) -> None:
    encoder = load(saved[kind])
    found = encoder.embed_frames(frames())
    wanted = unit(models[kind].get_image_features(pixel_values=plain_pixels(kind, frames())).pooler_output)
    assert isinstance(encoder, FrameEncoder)
    assert (found.dtype, found.shape) == (np.float32, (3, 12 if kind == "clip" else 16))
    assert found.shape[1] == encoder.spec.dim
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, wanted, atol=3e-3)  # of grey levels that differ by one
    assert np.abs(wanted[0] - wanted[1]).max() > 0.03


def test_frames_that_need_no_resize_have_the_very_embeddings(saved: dict[str, Path], models: dict[str, Any]) -> None:
    pictures = frames(2, 32, 32)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    wanted = unit(models["siglip"].get_image_features(pixel_values=x).pooler_output)
    np.testing.assert_allclose(load(saved["siglip"]).embed_frames(pictures), wanted, atol=2e-6)


@pytest.mark.parametrize(("resample", "others"), [("bilinear", 0.15), ("bicubic", 0.005)])
@pytest.mark.parametrize("size", [(32, 32), (36, 45), (64, 96), (72, 90)])
def test_a_resize_is_nearly_that_of_pil(size: tuple[int, int], resample: str, others: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (1, 48, 60, 3), np.uint8)
    for picture in (noise, frames(1)):
        found = resized(torch.from_numpy(picture).permute(0, 3, 1, 2).float(), size, resample)[0].permute(1, 2, 0)
        apart = np.abs(found.numpy() - by_pil(picture[0], size, Image.Resampling[resample.upper()]))
        assert apart.max() <= 2
        assert (apart > 0).mean() < others


@pytest.mark.parametrize(
    ("kind", "settings", "same_as"),
    [
        ("siglip", {"size": 32}, {}),
        ("clip", {"size": 36, "crop_size": 32}, {}),
        ("clip", {"size": {"shortest_edge": 32}}, {"size": 32}),
        ("siglip", {"rescale_factor": 1 / 255, "do_rescale": True, "do_normalize": True, "do_resize": True}, {}),
        ("siglip", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}, {}),
        ("siglip", {"do_normalize": False}, {"image_mean": [0] * 3, "image_std": [1] * 3}),
        ("siglip", {"image_processor": SQUARE | {"resample": 2}}, {"resample": 2}),  # of processor_config.json
    ],
)
def test_settings_have_several_forms(
    copied: Folder, kind: str, settings: dict[str, Any], same_as: dict[str, Any]
) -> None:
    folder = copied(kind, **same_as)
    wanted = load(folder)
    if "image_processor" in settings:
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").write_text(json.dumps(settings | {"processor_class": "SiglipProcessor"}))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS[kind] | settings))
    found = load(folder)
    np.testing.assert_allclose(found.embed_frames(frames()), wanted.embed_frames(frames()), atol=1e-6)
    assert found.spec.weights_sha256 != wanted.spec.weights_sha256


@pytest.mark.parametrize("kind", KINDS)
def test_without_settings_frames_are_prepared_as_usual_for_the_kind(copied: Folder, kind: str) -> None:
    import transformers

    folder = copied(kind)
    (folder / "preprocessor_config.json").unlink()
    processor = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[kind]
    usual = getattr(transformers, f"{processor}ImageProcessorPil")()
    options = load(folder).spec.options
    assert options["mean"] == pytest.approx(usual.image_mean)
    assert options["std"] == pytest.approx(usual.image_std)
    assert options["resample"] == Image.Resampling(usual.resample).name.lower()
    sizes = {"clip": (32, [32, 32]), "siglip": ([32, 32], None), "siglip2": ({"side": 8, "most": 256}, None)}
    assert (options["size"], options["crop"]) == sizes[kind]


@pytest.mark.parametrize(
    ("height", "width", "apart"), [(24, 32, 2e-6), (48, 60, 0.01), (100, 30, 0.01), (16, 16, 0.01)]
)
def test_patches_are_those_of_the_librarys_naflex(
    saved: dict[str, Path], models: dict[str, Any], height: int, width: int, apart: float
) -> None:
    from transformers import Siglip2ImageProcessorPil

    pictures = frames(2, height, width)
    inputs = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=12)(list(pictures), return_tensors="pt")
    wanted = unit(models["siglip2"].get_image_features(**inputs).pooler_output)
    np.testing.assert_allclose(load(saved["siglip2"]).embed_frames(pictures), wanted, atol=apart)


def test_the_number_of_patches_can_be_chosen(saved: dict[str, Path]) -> None:
    encoder = load(saved["siglip2"], max_num_patches=40)
    assert encoder.spec.options["size"] == {"side": 8, "most": 40}
    assert np.abs(encoder.embed_frames(frames()) - load(saved["siglip2"]).embed_frames(frames())).max() > 1e-3


@pytest.mark.parametrize(
    ("height", "width", "most", "grid"),
    [(256, 256, 256, (16, 16)), (540, 960, 256, (12, 21)), (1080, 1920, 1024, (24, 42)), (10, 4000, 9, (1, 9)),
     (4000, 10, 9, (9, 1)), (7, 5, 1, (1, 1)), (5, 5, 7, (2, 2))],
)  # fmt: skip
def test_frames_have_as_many_patches_as_fit(height: int, width: int, most: int, grid: tuple[int, int]) -> None:
    assert patch_grid(height, width, most) == grid


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_texts_are_those_of_the_model(saved: dict[str, Path], models: dict[str, Any], kind: str) -> None:
    encoder = load(saved[kind])
    texts = ["a red square", "dog", "a big dog runs a big dog runs a big dog runs"]
    ids = [[3, 4, 6, 1, 0, 0, 0, 0], [7, 1, 0, 0, 0, 0, 0, 0], [3, 8, 7, 9, 3, 8, 7, 1]]
    wanted = unit(models[kind].get_text_features(input_ids=torch.tensor(ids)).pooler_output)
    np.testing.assert_allclose(encoder.embed_texts(texts), wanted, atol=1e-6)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.03
    assert encoder.embed_texts([]).shape == (0, encoder.spec.dim)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglip_reads_small_letters(saved: dict[str, Path], kind: str) -> None:
    encoder = load(saved[kind])
    assert np.array_equal(encoder.embed_texts(["A RED Square"]), encoder.embed_texts(["a red square"]))


def test_a_clip_without_padding_says_the_same(saved: dict[str, Path], models: dict[str, Any]) -> None:
    wanted = unit(models["clip"].get_text_features(input_ids=torch.tensor([[3, 4, 6, 1]])).pooler_output)
    np.testing.assert_allclose(load(saved["clip"]).embed_texts(["a red square"]), wanted, atol=1e-5)


def test_a_tokenizer_that_names_no_padding_has_that_of_the_model(copied: Folder) -> None:
    folder = copied("siglip")
    wanted = load(folder).embed_texts(["dog"])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    np.testing.assert_allclose(load(folder).embed_texts(["dog"]), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_calibrated_cosines_are_the_models_own_probabilities(
    saved: dict[str, Path], models: dict[str, Any], kind: str
) -> None:
    encoder, pictures = load(saved[kind]), frames(3, *((32, 32) if kind == "siglip" else (24, 32)))
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    inputs: dict[str, Any] = {"pixel_values": x}
    if kind == "siglip2":
        from transformers import Siglip2ImageProcessorPil

        inputs = dict(Siglip2ImageProcessorPil(patch_size=8, max_num_patches=12)(list(pictures), return_tensors="pt"))
    ids = torch.tensor([[7, 1, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        wanted = models[kind](input_ids=ids, **inputs).logits_per_image.sigmoid()[:, 0]
    cosines = encoder.embed_frames(pictures) @ encoder.embed_texts(["dog"])[0]
    found = calibrated(cosines, np.zeros(3), encoder.spec.calibration)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_specs_say_what_decides_embeddings(saved: dict[str, Path], copied: Folder) -> None:
    spec = load(saved["clip"]).spec
    assert (spec.name, spec.dim, spec.takes_texts) == ("transformers/clip", 12, True)
    assert spec.calibration == STANDARDIZED
    assert spec.options["logit_scale"] == pytest.approx(1.5)
    assert json.loads(json.dumps(spec.options)) == spec.options
    calibration = load(saved["siglip"]).spec.calibration
    assert (calibration.rule, calibration.scale) == ("sigmoid", pytest.approx(np.exp(1.5)))
    assert calibration.bias == pytest.approx(-0.7)
    folder = copied("clip")
    assert load(folder).spec == spec
    changed = build("clip")
    with torch.no_grad():
        changed.visual_projection.weight.mul_(1.5)
    changed.save_pretrained(folder)
    assert load(folder).spec.weights_sha256 != spec.weights_sha256


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_number_types_are_near(saved: dict[str, Path], dtype: str) -> None:
    encoder, exact = load(saved["siglip"], dtype), load(saved["siglip"])
    found = encoder.embed_frames(frames())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact.embed_frames(frames()), atol=0.05)
    assert not np.array_equal(found, exact.embed_frames(frames()))
    np.testing.assert_allclose(encoder.embed_texts(["dog"]), exact.embed_texts(["dog"]), atol=0.05)
    assert encoder.spec.options["dtype"] == dtype
    assert "dtype" not in exact.spec.options
    assert encoder.spec.calibration == exact.spec.calibration


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "model_type None: accepted are clip, siglip, siglip2: give a folder with config.json"),
        ("config.json", '{"model_type": "blip"}', "model_type 'blip': accepted are clip, siglip, siglip2"),
        ("config.json", "{", "config.json is no JSON"),
        ("config.json", json.dumps({"model_type": "siglip", "text_config": TEXT, "vision_config": MODEL}), "not load"),
        ("tokenizer.json", None, "there is no tokenizer.json in it"),
        ("tokenizer.json", "{}", "tokenizer.json is not readable"),
        ("model.safetensors", None, "it does not load"),
        ("model.safetensors", "garbage", "it does not load"),
        ("preprocessor_config.json", json.dumps(SQUARE | {"size": 48}), "of size 48, cut to None, are not the 32x32"),
        ("preprocessor_config.json", json.dumps(EDGE | {"crop_size": 24}), r"cut to \(24, 24\), are not the 32x32"),
        ("preprocessor_config.json", json.dumps(EDGE | {"size": {"shortest_edge": 30}}), "are not the 32x32"),
        ("preprocessor_config.json", json.dumps(SQUARE | {"size": {"longest_edge": 32}}), "are not the 32x32"),
        ("preprocessor_config.json", json.dumps(SQUARE | {"resample": 1}), "resized by 1: bilinear"),
        ("preprocessor_config.json", json.dumps(SQUARE | {"do_resize": False}), "resized by None"),
    ],
)  # fmt: skip
def test_folders_that_are_no_such_checkpoint_are_refused(
    copied: Folder, name: str, content: str | None, message: str
) -> None:
    folder = copied("siglip")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        load(folder)


def test_a_folder_without_all_tensors_is_refused(copied: Folder) -> None:
    from safetensors.torch import load_file, save_file

    path = copied("siglip") / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if "layers.0.mlp" not in name}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        TokenizerError, match=r"8 tensors are missing \(text_model.encoder.layers.0.mlp.fc1.bias, .*\.\.\.\)"
    ):
        load(path.parent)


def test_what_an_encoder_does_not_take_is_refused(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"options.max_patches: unknown key \(did you mean 'max_num_patches'\?\)"):
        load(saved["siglip2"], max_patches=3)
    with pytest.raises(TokenizerError, match=r"options.max_num_patches is of NaFlex checkpoints, .* is siglip: remove"):
        load(saved["siglip"], max_num_patches=3)
    with pytest.raises(TokenizerError, match=r"transformers/siglip encodes uint8 RGB frames .*found torch.float32"):
        load(saved["siglip"]).embed_frames(frames().astype(np.float32))
    with pytest.raises(TokenizerError, match=r"not a folder with .json and .safetensors"):
        load(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TokenizerError, match=r"transformers is not here .*pip install 'tokenmill\[transformers\]'"):
        load(saved["siglip"])


def test_values_that_are_not_finite_are_refused(copied: Folder) -> None:
    folder, model = copied("siglip"), build("siglip")
    with torch.no_grad():
        model.vision_model.post_layernorm.bias.fill_(float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(TokenizerError, match="transformers/siglip: the networks gave values that are not finite"):
        load(folder).embed_frames(frames())


@pytest.fixture
def on_gpu(saved: dict[str, Path]) -> Callable[[str], ImageTextEncoder]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return lambda kind: ImageTextEncoder(str(saved[kind]), "cuda", "float32", {})


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same_embeddings(
    saved: dict[str, Path], on_gpu: Callable[[str], ImageTextEncoder], kind: str
) -> None:
    here, there = load(saved[kind]), on_gpu(kind)
    np.testing.assert_allclose(there.embed_frames(frames()), here.embed_frames(frames()), atol=1e-3)
    np.testing.assert_allclose(there.embed_texts(["dog"]), here.embed_texts(["dog"]), atol=1e-3)
    assert there.spec == here.spec

"""Early layers are those of the whole model, a head on them learns where they see the frame, and others are refused."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenmill.pipeline.relevance import FrameScorer
from tokenmill.schemas.digest import digest_of
from tokenmill.schemas.errors import TokenizerError
from tokenmill.schemas.relevance import Calibration
from tokenmill.tokenizers.early_layers import BATCH, EarlyLayers, EarlyLayerScorer
from tokenmill.tokenizers.router import PolicyHead, RelevanceHead, RouterAbout, relevance_loss, save_router
from tokenmill.tokenizers.weights import fetch_weights

SIDE, DIM, DEPTH = 28, 64, 6
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "yellow": (220, 220, 30),
    "purple": (180, 30, 200),
    "cyan": (30, 200, 200),
}
WORDS = ["[UNK]", "[IMAGE]", "a", "square", *COLOURS]
QUERY = "a red square"
Retold = Callable[..., str]

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny() -> InternVLForConditionalGeneration:
    """A model of 4 visual tokens a frame, with weights at random as transformers draws them."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = InternVLConfig(
        vision_config={**vision, "image_size": [SIDE, SIDE], "patch_size": [7, 7]},
        text_config={**text, "model_type": "qwen2", "intermediate_size": 2 * DIM, "vocab_size": len(WORDS)},
        image_token_id=WORDS.index("[IMAGE]"),
        image_seq_length=4,
    )
    return InternVLForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def whole() -> InternVLForConditionalGeneration:
    return tiny()


@pytest.fixture(scope="module")
def folder(whole: InternVLForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model as transformers saves it, with a tokenizer of WORDS."""
    path = tmp_path_factory.mktemp("internvl")
    whole.save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(path)
    tiles = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (path / "preprocessor_config.json").write_text(json.dumps(tiles))
    return str(path)


@pytest.fixture(scope="module")
def early(folder: str) -> EarlyLayers:
    return EarlyLayers(folder)


@pytest.fixture
def retold(folder: str, tmp_path: Path) -> Retold:
    """retold("a.json", {..}): a copy of the folder in which this file holds something else, or None at all."""

    def copied(name: str, content: Any) -> str:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        path = Path(shutil.copytree(folder, tmp_path / "copy")) / name
        path.unlink()
        if content is None:
            return str(path.parent)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".safetensors"):
            save_file(content, path, metadata={"format": "pt"})
        else:
            path.write_text(json.dumps(content))
        return str(path.parent)

    return copied


def squares(number: int, seed: int, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Frames of noise with a square anywhere, and which of COLOURS it has."""
    rng = np.random.default_rng(seed)
    frames_NHWC = rng.integers(60, 200, (number, side, side, 3), np.uint8)
    colours_N = rng.integers(len(COLOURS), size=number)
    for frame_HWC, colour in zip(frames_NHWC, colours_N, strict=True):
        length = rng.integers(14, 22)
        y, x = rng.integers(0, side - length, 2)
        frame_HWC[y : y + length, x : x + length] = list(COLOURS.values())[colour]
    return frames_NHWC, colours_N


def auroc(scores_N: torch.Tensor, labels_N: torch.Tensor) -> float:
    """The share of pairs of a frame that matters and one that does not which scores order rightly; ties are half."""
    apart = scores_N[labels_N][:, None] - scores_N[~labels_N][None]
    return ((apart > 0).float() + (apart == 0).float() / 2).mean().item()


@pytest.mark.parametrize("layers", [1, 4, 5])
def test_hidden_states_are_those_of_the_whole_model(
    whole: InternVLForConditionalGeneration, folder: str, layers: int
) -> None:
    early = EarlyLayers(folder, layers)
    tokens_NKD = early.tokens(squares(3, 0)[0])
    ids = torch.tensor([[WORDS.index(word) for word in QUERY.split()]]).expand(3, -1)
    inputs_NSD = torch.cat((tokens_NKD, whole.get_input_embeddings()(ids)), dim=1)
    wanted = whole(inputs_embeds=inputs_NSD, output_hidden_states=True).hidden_states
    torch.testing.assert_close(early.hidden(tokens_NKD, QUERY), wanted[layers], rtol=0, atol=1e-5)
    assert (wanted[layers] - wanted[layers - 1]).abs().max() > 1e-3
    alone = whole(input_ids=ids[:1], output_hidden_states=True).hidden_states[layers]
    torch.testing.assert_close(early.text_features([QUERY]), alone.mean(1), rtol=0, atol=1e-5)


def test_visual_tokens_are_the_models_own_of_resized_frames(
    whole: InternVLForConditionalGeneration, early: EarlyLayers
) -> None:
    frames_NHWC = squares(2, 0, side=60)[0][:, :50]
    resized = [
        np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for frame in frames_NHWC
    ]
    pixels_NHWC = (torch.from_numpy(np.stack(resized)) / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor(
        [0.2, 0.3, 0.4]
    )
    wanted = whole.model.get_image_features(pixel_values=pixels_NHWC.movedim(-1, 1)).pooler_output
    torch.testing.assert_close(early.tokens(frames_NHWC), wanted, rtol=0, atol=5e-3 * wanted.abs().max().item())


def test_preprocessing_is_imagenets_at_the_towers_size_unless_the_folder_says_other(
    retold: Retold, folder: str
) -> None:
    frames_NHWC = squares(2, 0)[0]
    without = EarlyLayers(retold("preprocessor_config.json", None)).tokens(frames_NHWC)
    said = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    assert torch.equal(EarlyLayers(retold("preprocessor_config.json", said)).tokens(frames_NHWC), without)
    assert not torch.equal(EarlyLayers(folder).tokens(frames_NHWC), without)
    larger = {"size": {"height": 2 * SIDE, "width": 2 * SIDE}}
    assert EarlyLayers(retold("preprocessor_config.json", larger)).tokens(frames_NHWC).shape == (2, 16, DIM)


def test_features_are_of_each_frame_alone_and_mean_over_the_query(early: EarlyLayers) -> None:
    frames_NHWC, _ = squares(BATCH + 3, 0)
    found = early.features(frames_NHWC, QUERY)
    assert (found.dtype, found.shape) == (torch.float32, (BATCH + 3, DIM))
    single = torch.cat([early.features(frame[None], QUERY) for frame in frames_NHWC])
    torch.testing.assert_close(found, single, rtol=0, atol=1e-5)
    tokens_NKD = early.tokens(frames_NHWC)
    torch.testing.assert_close(early.hidden(tokens_NKD, QUERY)[:, 4:].mean(1), found, rtol=0, atol=1e-6)
    torch.testing.assert_close(early.features_of_tokens(tokens_NKD, QUERY), found, rtol=0, atol=1e-6)
    assert not torch.allclose(early.features(frames_NHWC, "a blue square"), found, atol=1e-3)


def test_features_of_texts_do_not_depend_on_each_other(early: EarlyLayers) -> None:
    texts = [QUERY, "blue", "a cyan square a cyan square"]
    single = torch.cat([early.text_features([text]) for text in texts])
    assert torch.equal(early.text_features(texts), single)
    assert early.text_features([]).shape == (0, DIM)


def test_pooled_tokens_score_frames_without_their_pixels(retold: Retold) -> None:
    early = EarlyLayers(retold("preprocessor_config.json", {"size": {"height": 2 * SIDE, "width": 2 * SIDE}}))
    frames_NHWC, _ = squares(3, 0)
    tokens_NKD = early.tokens(frames_NHWC)
    pooled = early.pooled_tokens(frames_NHWC, side=2)
    fields = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    torch.testing.assert_close(pooled, torch.stack([tokens_NKD[:, of].mean(1) for of in fields], dim=1))
    assert torch.equal(early.pooled_tokens(frames_NHWC), tokens_NKD)
    found = early.features_of_tokens(pooled.half(), QUERY)
    torch.testing.assert_close(found, early.features_of_tokens(pooled, QUERY), rtol=0, atol=1e-3)


def test_later_layers_are_neither_needed_nor_held(early: EarlyLayers, retold: Retold, folder: str) -> None:
    tensors = load_file(f"{folder}/model.safetensors")
    later = ("language_model.model.layers.4.", "language_model.model.layers.5.", "language_model.lm_head.")
    kept = {name: value for name, value in tensors.items() if not name.startswith(later)}
    held = sum(value.numel() for name, value in kept.items() if name != "language_model.model.norm.weight")
    assert sum(parameter.numel() for parameter in early._model.parameters()) == held
    frames_NHWC, _ = squares(2, 0)
    found = EarlyLayers(retold("model.safetensors", kept)).features(frames_NHWC, QUERY)
    assert torch.equal(found, early.features(frames_NHWC, QUERY))


def test_tensors_under_their_newer_names_are_the_same(early: EarlyLayers, retold: Retold, folder: str) -> None:
    tensors = load_file(f"{folder}/model.safetensors")
    assert all("language_model.model." in name for name in tensors if name.startswith("language_model."))
    renamed = {"model." + name.replace("language_model.model.", "language_model."): x for name, x in tensors.items()}
    frames_NHWC, _ = squares(2, 0)
    found = EarlyLayers(retold("model.safetensors", renamed)).features(frames_NHWC, QUERY)
    assert torch.equal(found, early.features(frames_NHWC, QUERY))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_about_the_same_features(early: EarlyLayers, folder: str, dtype: str) -> None:
    frames_NHWC, _ = squares(3, 0)
    found, wanted = (one.features(frames_NHWC, QUERY) for one in (EarlyLayers(folder, dtype=dtype), early))
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found, wanted).min() > 0.999
    assert not torch.equal(found, wanted)


def pairs(early: EarlyLayers, number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of frames, each with its colour's query and then with another's: of the query's positions, of the visual
    ones, and whether they match.
    """
    frames_NHWC, colours_N = squares(number, seed)
    tokens_NKD = early.tokens(frames_NHWC)
    texts = [f"a {colour} square" for colour in COLOURS]
    query_QND = torch.stack([early.features_of_tokens(tokens_NKD, text) for text in texts])
    visual_QND = torch.stack([early.hidden(tokens_NKD, text)[:, :4].mean(1) for text in texts])
    others_N = (colours_N + np.random.default_rng(seed).integers(1, len(COLOURS), number)) % len(COLOURS)
    asked, shown = np.concatenate((colours_N, others_N)), np.tile(np.arange(number), 2)
    return query_QND[asked, shown], visual_QND[asked, shown], torch.arange(2 * number) < number


def trained(features_NF: torch.Tensor, labels_N: torch.Tensor) -> RelevanceHead:
    torch.manual_seed(0)
    head = RelevanceHead(DIM, 64)
    optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
    for _ in range(40):
        for batch in torch.randperm(len(features_NF)).split(64):
            optimizer.zero_grad()
            relevance_loss(head(features_NF[batch]), labels_N[batch], 1.0).backward()
            optimizer.step()
    return head.requires_grad_(False)


def test_a_head_learns_what_matters_from_the_querys_positions_alone(
    early: EarlyLayers, folder: str, tmp_path: Path
) -> None:
    query_NF, visual_NF, labels_N = pairs(early, 600, 0)
    held_query_NF, held_visual_NF, held_labels_N = pairs(early, 150, 1)
    head = trained(query_NF, labels_N)
    assert auroc(head(held_query_NF), held_labels_N) >= 0.9
    # The mask is causal: positions of the frame come before the query and know nothing of it.
    assert 0.4 <= auroc(trained(visual_NF, labels_N)(held_visual_NF), held_labels_N) <= 0.6

    about = RouterAbout(features="early", of=early.sha256, layers=4, relevance_dim=DIM, hidden=64)
    router = str(tmp_path / "router.safetensors")
    save_router(router, about, head, None)
    scorer: FrameScorer = EarlyLayerScorer(router, folder)
    frames_NHWC, colours_N = squares(150, 1)
    scores_N = scorer.score(frames_NHWC, QUERY)
    assert (scores_N.dtype, scores_N.shape) == (np.float32, (150,))
    assert auroc(torch.from_numpy(scores_N), torch.from_numpy(colours_N == 0)) >= 0.9
    assert (scorer.spec.name, scorer.spec.dim) == ("early_layers", None)
    assert scorer.spec.options == {"layers": 4, "dtype": "float32"}
    assert scorer.spec.weights_sha256 == digest_of([early.sha256, fetch_weights(router).sha256])
    assert scorer.spec.calibration == Calibration(rule="sigmoid", scale=1.0, bias=0.0)


def test_routers_of_something_else_are_refused(early: EarlyLayers, folder: str, tmp_path: Path) -> None:
    path = str(tmp_path / "router.safetensors")
    about = RouterAbout(features="early", of=early.sha256, layers=4, relevance_dim=DIM, policy_dim=DIM, hidden=8)

    def refusal(about: RouterAbout) -> pytest.ExceptionInfo[TokenizerError]:
        relevance = None if about.relevance_dim is None else RelevanceHead(about.relevance_dim, 8)
        save_router(path, about, relevance, PolicyHead(DIM, 8))
        with pytest.raises(TokenizerError) as caught:
            EarlyLayerScorer(path, folder)
        return caught

    assert refusal(replace(about, of="0" * 64)).match("trained on the model with the digest 000000000000, .* has")
    assert refusal(replace(about, relevance_dim=None)).match("this router has no relevance head")
    assert refusal(replace(about, layers=7)).match("of 6 decoder layers, found layers 7: take 1 to 6")
    assert refusal(replace(about, features="pair", layers=None, of="siglip")).match("takes embeddings of siglip, not")
    with pytest.raises(TokenizerError, match="not those of a router"):
        EarlyLayerScorer(f"{folder}/model.safetensors", folder)


def test_folders_without_such_a_model_are_refused(retold: Retold, folder: str) -> None:
    def refused(name: str, content: Any, match: str) -> None:
        with pytest.raises(TokenizerError, match=f"{match}.*(give a folder with config.json|check the path)"):
            EarlyLayers(retold(name, content))

    config = json.loads(Path(folder, "config.json").read_text())
    refused("config.json", None, "there is no config.json in it")
    refused("config.json", b"{", "config.json is no JSON")
    refused("config.json", [], "config.json holds no object")
    refused("config.json", config | {"model_type": "qwen2"}, "has model_type 'qwen2', 'internvl' is wanted")
    refused(
        "config.json", config | {"text_config": {"model_type": "qwen2", "hidden_size": "x"}}, "describes no network"
    )
    tensors, whole = load_file(f"{folder}/model.safetensors"), Path(folder, "model.safetensors").read_bytes()
    name = "vision_tower.embeddings.cls_token"
    refused("model.safetensors", whole[: len(whole) // 2], "its weights are not readable")
    refused("model.safetensors", None, "its weights are not readable")
    without = {key: value for key, value in tensors.items() if key != name}
    refused("model.safetensors", without, rf"lack 1 tensors \({name}\)")
    refused("model.safetensors", tensors | {name: torch.zeros(1, 1, 3)}, "its weights are not readable")
    refused("tokenizer.json", None, "there is no tokenizer.json in it")
    refused("tokenizer.json", b"{}", "its tokenizer is not readable")
    refused("preprocessor_config.json", {"size": {"shortest_edge": 448}}, "describes no tiles .*height")
    refused("preprocessor_config.json", {"size": {"height": 28, "width": 56}}, "describes no tiles .*no square")
    refused("preprocessor_config.json", {"image_std": [1, 0, 1]}, "describes no tiles .*image_std")
    with pytest.raises(TokenizerError, match="it does not exist: check the path"):
        EarlyLayers(f"{folder}/none")


@pytest.mark.parametrize("layers", [-1, 0, DEPTH + 1])
def test_layers_that_the_decoder_lacks_are_refused(folder: str, layers: int) -> None:
    with pytest.raises(TokenizerError, match=f"of 6 decoder layers, found layers {layers}: take 1 to 6"):
        EarlyLayers(folder, layers)


def test_what_cannot_be_computed_is_refused(early: EarlyLayers, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames_NHWC, _ = squares(1, 0)
    with pytest.raises(TokenizerError, match="encodes uint8 RGB frames"):
        early.features(frames_NHWC.astype(np.float32), QUERY)
    for ask in (lambda: early.features(frames_NHWC, " "), lambda: early.text_features([QUERY, ""])):
        with pytest.raises(TokenizerError, match="queries of a word or more"):
            ask()
    with pytest.raises(TokenizerError, match="early_layers computes in float32, bfloat16, float16, found dtype 'int8'"):
        EarlyLayers(folder, dtype="int8")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        TokenizerError, match=r"needs transformers, which is not here .*pip install 'tokenmill.transformers.'"
    ):
        EarlyLayers(folder)

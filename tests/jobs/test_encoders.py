"""Encoders are chosen by name, and get the settings that they have."""

from typing import Any

import numpy as np
import pytest

from tokenmill.jobs import encoders
from tokenmill.jobs.encoders import ENCODERS, load_encoder
from tokenmill.pipeline.look import LookEncoder
from tokenmill.pipeline.relevance import FakeEncoder, FrameEncoder
from tokenmill.schemas.errors import RecipeError, TokenizerError
from tokenmill.schemas.recipe import EncoderSection
from tokenmill.tokenizers.base import Settings


def load(encoder: str, on: str | None = None, /, **settings: Any) -> FrameEncoder:
    return load_encoder(EncoderSection(encoder=encoder, **settings), on)


@pytest.mark.parametrize(("name", "kind"), [("look", LookEncoder), ("fake", FakeEncoder)])
def test_encoders_without_weights_load(name: str, kind: type) -> None:
    found = load(name)
    assert isinstance(found, kind)
    assert isinstance(found, FrameEncoder)
    assert found.embed_frames(np.full((2, 16, 16, 3), 200, np.uint8)).shape == (2, found.spec.dim)


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("transformers", {"weights": "w", "options": {"a": 9}}, ("w", "cpu", "float32", {"a": 9})),
        ("open_clip", {"weights": "w", "dtype": "float16", "options": {"a": 9}}, ("w", "cpu", "float16", {"a": 9})),
        ("trajtok", {"weights": "w", "options": {"grid": 28}}, (Settings(weights="w", options={"grid": 28}),)),
    ],
)  # fmt: skip
def test_encoders_get_their_settings(
    name: str, settings: dict[str, Any], wanted: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {
        "transformers": "image_text.ImageTextEncoder",
        "open_clip": "open_clip_encoder.OpenClipEncoder",
        "trajtok": "trajtok_frames.TrajTokFrames",
    }
    monkeypatch.setattr(f"tokenmill.tokenizers.{where[name]}", lambda *given: given)
    assert load(name, **settings) == wanted


def test_another_device_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.tokenizers.image_text.ImageTextEncoder", lambda *given: given)
    monkeypatch.setattr(encoders, "check_device", lambda device: None)
    assert load("transformers", "cuda:1", weights="w") == ("w", "cuda:1", "float32", {})
    assert load("transformers", "cpu", weights="w", device="cuda") == ("w", "cpu", "float32", {})
    assert isinstance(load("look", "cuda:1"), LookEncoder)  # it computes on the CPU wherever others do


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lok", {}, r"unknown encoder 'lok' \(did you mean 'look'\?\): accepted are look, transformers, open_clip,"),
        ("clip", {}, r"unknown encoder 'clip'.*: accepted are look, transformers, open_clip, trajtok$"),
        ("look", {"weights": "w"}, "look has no weights, found 'w': remove weights"),
        ("look", {"device": "cuda"}, "look computes on the CPU without networks, found device 'cuda'"),
        ("look", {"dtype": "float16"}, "found device 'cpu' and dtype 'float16': remove them"),
        ("look", {"options": {"places": 4}}, "look has no options, found places: remove options"),
        ("fake", {"options": {"a": 4}}, "fake has no options, found a"),
        ("fake", {"weights": "w"}, "fake has no weights"),
        ("transformers", {}, "transformers needs weights, found none: .* for instance hf://google/siglip-base-patch16-224"),
        ("open_clip", {}, "open_clip needs weights, .* for instance hf://apple/MobileCLIP-S1-OpenCLIP"),
        ("trajtok", {}, "needs its weights: set weights to the path or URL of model.pth"),
        ("transformers", {"weights": "w", "options": {"patches": 4}}, "options.patches: unknown key.*max_num_patches"),
        ("open_clip", {"weights": "w", "options": {"name": "a"}}, "options.name: unknown key.*; accepted are model"),
        ("trajtok", {"weights": "w", "options": {"vocabulary": "a"}}, r"options.vocabulary: unknown key"),
    ],
)  # fmt: skip
def test_what_an_encoder_is_not_or_does_not_take_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((RecipeError, TokenizerError), match=message):
        load(name, **settings)


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(TokenizerError, match="device 'cuda:5' was asked for, torch finds 1 GPUs here"):
        load("transformers", "cuda:5", weights="w")


def test_every_encoder_that_a_recipe_names_is_there() -> None:
    said = EncoderSection.model_fields["encoder"].description or ""
    assert {name for name in ENCODERS if name != "fake"} == set(said.replace(" or ", ", ").split(", "))

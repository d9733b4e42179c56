"""The recipe: what is refused, and how it is said."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenmill.schemas.errors import RecipeError
from tokenmill.schemas.recipe import Recipe, parse_recipe
from tokenmill.schemas.router_training import parse_router_training
from tokenmill.schemas.training import parse_training

GOOD: dict[str, Any] = {
    "cache": "out/cache",
    "sources": ["videos/"],
    "tokens": {"dct": {"tokenizer": "dct_fsq/488_262144"}},
}


def test_a_short_recipe_gets_documented_defaults() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.sources[0].kind == "files"
    assert recipe.clips.sampling.num_frames == 16
    assert recipe.clips.sampling.fps is None
    assert recipe.clips.sampling.resize == "center_crop/bilinear"


def test_a_recipe_survives_its_own_json() -> None:
    recipe = parse_recipe(GOOD | {"sources": [{"kind": "table", "path": "videos.csv"}], "clips": {"fps": 8}})
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": {}}, r"^clip: unknown key \(did you mean 'clips'\?\); accepted are cache, clips"),
        ({"clips": {"num_frame": 3}}, r"clips\.num_frame: unknown key \(did you mean 'num_frames'\?\)"),
        ({"clips": {"resize": "centercrop"}}, r"clips\.resize: found 'centercrop' \(did you mean 'center_crop'\?\)"),
        ({"clips": {"fps": -1}}, r"clips\.fps: found -1; accepted: .*greater than 0"),
        ({"clips": {"fps": "natve"}}, r"clips\.fps: found 'natve' \(did you mean 'native'\?\)"),
        ({"clips": {"num_frames": 0}}, r"clips\.num_frames: found 0; accepted: greater than or equal to 1"),
        ({"masks": {"A b": {"segmenter": "slic3d"}}}, r"masks.A b: 'A b' cannot name a product"),
        ({"masks": {"a": {"segmentor": "slic3d"}}}, r"masks.a.segmentor: unknown key \(did you mean 'segmenter'\?\)"),
        ({"sources": []}, r"sources: found \[\]; accepted: .*at least 1 item"),
        ({"sources": [3]}, r"sources\.0: found 3; accepted: "),
        ({"sources": [{"kind": "tble", "path": "x"}]}, r"sources\.0\.kind: found 'tble' \(did you mean 'table'\?\)"),
        (
            {"sources": [{"kind": "table", "path": "x", "uricolumn": 1}]},
            r"sources\.0\.uricolumn: unknown key \(did you mean 'uri_column'\?\); accepted are caption_column",
        ),
        ({"tokens": {}}, "tokens: missing; every recipe needs tokens, masks or frames"),
        ({"tokens": {"dct": {}}}, r"tokens\.dct\.tokenizer: missing"),
        ({"tokens": {"dct": {"tokenizr": "x"}}}, r"tokens\.dct\.tokenizr: unknown key \(did you mean 'tokenizer'\?\)"),
        ({"tokens": {"A b": {"tokenizer": "x"}}}, r"'A b' cannot name a product: accepted are small letters"),
        ({"executor": {"kind": "rai"}}, r"executor\.kind: found 'rai' \(did you mean 'ray'\?\); accepted: 'local' or"),
    ],
)
def test_a_wrong_key_is_refused_with_what_was_found_and_accepted(change: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(GOOD | change)


def test_every_wrong_key_is_named_once() -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(GOOD | {"clips": {"hight": 1, "width": 0}})
    assert str(error.value).count(";") == 3
    assert "clips.hight" in str(error.value)
    assert "clips.width" in str(error.value)


def test_what_is_not_a_mapping_is_refused() -> None:
    with pytest.raises(RecipeError, match="a recipe is a mapping of keys, found list"):
        parse_recipe(["cache"])


def test_the_json_schema_names_every_section() -> None:
    assert set(Recipe.model_json_schema()["properties"]) == set(Recipe.model_fields)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_is_a_valid_recipe(path: Path) -> None:
    parse = {"train_pyratok.yaml": parse_training, "train_router.yaml": parse_router_training}.get(
        path.name, parse_recipe
    )
    parse(yaml.safe_load(path.read_text()))


def test_the_full_example_shows_every_key_and_its_default() -> None:
    text = (Path(__file__).parents[2] / "examples" / "recipe.yaml").read_text()
    shown = parse_recipe(yaml.safe_load(text))
    assert shown.clips == type(shown.clips)(stride=16)
    assert shown.tokens["dct"] == type(shown.tokens["dct"])(tokenizer="dct_fsq/488_262144")
    assert (shown.decode, shown.shards, shown.executor) == (
        type(shown.decode)(),
        type(shown.shards)(),
        type(shown.executor)(),
    )
    assert shown.masks["objects"] == type(shown.masks["objects"])(segmenter="slic3d")
    tokens, masks = shown.tokens["dct"], shown.masks["objects"]
    for section in (shown, shown.clips, tokens, masks, shown.decode, shown.shards, shown.executor):
        assert set(type(section).model_fields) <= {line.strip(" -#").partition(":")[0] for line in text.splitlines()}

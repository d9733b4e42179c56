"""The recipe of a router's training: what is refused, and what of it decides weights."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenmill.schemas.errors import RecipeError
from tokenmill.schemas.router_training import EarlyLayersSection, RouterTrainingRecipe, parse_router_training
from tokenmill.schemas.training import changed_keys

GOOD: dict[str, Any] = {"output": "out/router", "cache": "out/cache", "features": "siglip"}
EARLY: dict[str, Any] = {"features": None, "early_layers": {"weights": "hf://some/model"}}
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_router.yaml"


def test_the_example_shows_every_key_and_its_default() -> None:
    shown = parse_router_training(yaml.safe_load(EXAMPLE.read_text()))
    assert shown == parse_router_training(GOOD)
    keys = {line.strip(" -#").partition(":")[0] for line in EXAMPLE.read_text().splitlines()}
    for section in (shown, shown.training):
        assert set(type(section).model_fields) <= keys
    assert all(f"{key}: " in EXAMPLE.read_text() for key in EarlyLayersSection.model_fields)


@pytest.mark.parametrize("change", [{}, EARLY, {"snapshot": 3, "labels": "flr", "training": {"hidden": 8}}])
def test_a_recipe_survives_its_own_json(change: dict[str, Any]) -> None:
    recipe = parse_router_training(GOOD | change)
    assert parse_router_training(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": None}, r"^features, early_layers: found neither; accepted: one of them: features: the name of"),
        ({"early_layers": {"weights": "x"}}, r"^features, early_layers: found both; accepted: one of them"),
        (EARLY | {"early_layers": {}}, r"^early_layers\.weights: missing; every recipe needs it"),
        (EARLY | {"early_layers": {"weights": "x", "layers": 0}}, r"early_layers\.layers: found 0; accepted: greater"),
        ({"feature": "x"}, r"^feature: unknown key \(did you mean 'features'\?\); accepted are cache, early_layers"),
        ({"snapshot": 0}, r"^snapshot: found 0; accepted: greater than or equal to 1"),
        ({"training": {"held_out": 1}}, r"^training\.held_out: found 1; accepted: less than 1"),
        ({"training": {"policy_epoch": 1}}, r"^training\.policy_epoch: unknown key \(did you mean 'policy_epochs'"),
    ],
)
def test_a_wrong_key_is_refused_with_what_was_found_and_accepted(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_router_training(GOOD | change)


def of(**training: Any) -> RouterTrainingRecipe:
    """A recipe with these keys of its training."""
    return parse_router_training(GOOD | {"training": training})


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        (of(), of(relevance_epochs=9, policy_epochs=9, checkpoint_every=1, log_every=1), []),
        (of(), parse_router_training(GOOD | {"output": "elsewhere"}), []),
        (of(), of(seed=1, hidden=8), ["training.hidden=256 (this recipe: 8)", "training.seed=0 (this recipe: 1)"]),
        (of(), parse_router_training(GOOD | {"labels": "flr"}), ["labels=None (this recipe: flr)"]),
        (
            parse_router_training(GOOD | EARLY),
            parse_router_training(GOOD | EARLY | {"early_layers": {"weights": "hf://some/model", "device": "cuda"}}),
            [],
        ),
    ],
)
def test_what_decides_the_weights_may_not_change(
    before: RouterTrainingRecipe, now: RouterTrainingRecipe, changed: list[str]
) -> None:
    assert changed_keys(before, now) == changed
    assert (before.deciding == now.deciding) == (not changed)

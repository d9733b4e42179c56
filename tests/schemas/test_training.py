"""The recipe of a training: what is refused, and what of it decides weights."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenmill.schemas.errors import RecipeError
from tokenmill.schemas.recipe import ClipsSection
from tokenmill.schemas.training import TrainingRecipe, VaeSizesSection, changed_keys, parse_training

TERMS = ("reconstruction", "codebook", "autoregression", "drift")
GOOD: dict[str, Any] = {
    "output": "out",
    "sources": ["videos/"],
    "clips": {"num_frames": 17},
    "training": {"steps": 30, "vae_steps": 10},
}
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_pyratok.yaml"


def test_a_recipe_survives_its_own_json() -> None:
    recipe = parse_training(
        GOOD | {"model": {"sizes": {"dim_mult": [1, 2]}}, "sources": ["a", {"kind": "table", "path": "b"}]}
    )
    assert parse_training(recipe.model_dump(mode="json")) == recipe


def test_the_example_shows_every_key_and_its_default() -> None:
    shown = parse_training(yaml.safe_load(EXAMPLE.read_text()))
    plain = parse_training(GOOD | {"training": {"steps": 500}})
    assert shown.model.sizes == VaeSizesSection()
    assert (shown.training, shown.decode, shown.storage) == (plain.training, plain.decode, plain.storage)
    assert shown.model.model_copy(update={"sizes": None}) == plain.model
    keys = {line.strip(" -#").partition(":")[0] for line in EXAMPLE.read_text().splitlines()}
    for section in (shown, shown.model, shown.model.sizes, shown.training):
        assert section is not None
        assert set(type(section).model_fields) <= keys


def test_clips_are_found_as_other_jobs_find_them() -> None:
    recipe = parse_training(GOOD | {"clips": {"num_frames": 5}, "decode": {"processes": 3}, "storage": {"s3": {}}})
    reading = recipe.reading
    assert (reading.cache, reading.sources, reading.storage) == ("out", recipe.sources, {"s3": {}})
    assert (reading.clips, reading.decode.processes) == (ClipsSection(num_frames=5), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": "x"}, r"^cache: unknown key; accepted are clips, decode, model, output, sources, storage, training"),
        ({"training": {}}, r"^training\.steps: missing; every recipe needs it"),
        ({"training": {"steps": 0}}, r"training\.steps: found 0; accepted: greater than or equal to 1"),
        ({"training": {"steps": 1, "step": 2}}, r"training\.step: unknown key \(did you mean 'steps'\?\)"),
        (
            {"training": {"steps": 1, "schedule": "cosin"}},
            r"training\.schedule: found 'cosin' \(did you mean 'cosine'\?\)",
        ),
        (
            {"training": {"steps": 200}},
            r"training\.steps: found 200; accepted: more than the 200 that train the VAE alone",
        ),
        (
            {"training": {"steps": 1, "vae_steps": 0, "losses": dict.fromkeys(TERMS, 0)}},
            r"training\.losses: all are 0; accepted: one above 0",
        ),
        ({"training": {"steps": 1, "device": "gpu"}}, r"training\.device: found 'gpu'; accepted: "),
        (
            {"training": {"steps": 1, "losses": {"drft": 0}}},
            r"training\.losses\.drft: unknown key \(did you mean 'drift'",
        ),
        ({"model": {"sizes": {"z_dim": 17}}}, r"model\.sizes\.z_dim: found 17; accepted: less than or equal to 16"),
        ({"model": {"sizes": {"dims": 1}}}, r"model\.sizes\.dims: unknown key.*accepted are base_dim, dim_mult"),
        ({"model": {"vae": "x.pt", "sizes": {}}}, r"model\.sizes: those of model\.vae are taken: remove one of both"),
        ({"sources": [{"kind": "table", "path": "x", "uricolumn": 1}]}, r"sources\.0\.uricolumn: .*'uri_column'"),
        (
            {"decode": {"run_in": "actor"}},
            r"decode\.run_in: found 'actor', which Ray's workers have; accepted: 'process'",
        ),
    ],
)
def test_a_wrong_key_is_refused_with_what_was_found_and_accepted(change: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_training(GOOD | change)


def of(**training: Any) -> TrainingRecipe:
    """A recipe with these keys of its training."""
    return parse_training(GOOD | {"training": {"steps": 30, "vae_steps": 10, **training}})


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        (of(), of(device="cpu", checkpoint_every=1, log_every=1, steps=40), []),
        (of(), of(seed=1), ["training.seed=0 (this recipe: 1)"]),
        (of(losses={"drift": 1}), of(), ["training.losses.drift=1.0 (this recipe: 0.6)"]),
        (of(), of(schedule="cosine"), ["training.schedule=constant (this recipe: cosine)"]),
        (of(schedule="cosine"), of(schedule="cosine", steps=40), ["training.steps=30 (this recipe: 40)"]),
        (of(), parse_training(GOOD | {"output": "b", "storage": {"s3": {}}, "decode": {"processes": 2}}), []),
        (of(), parse_training(GOOD | {"clips": {"num_frames": 5}}), ["clips.num_frames=17 (this recipe: 5)"]),
        (of(), parse_training(GOOD | {"decode": {"decoder": "pyav"}}), ["decode.decoder=auto (this recipe: pyav)"]),
    ],
)
def test_what_decides_the_weights_may_not_change(
    before: TrainingRecipe, now: TrainingRecipe, changed: list[str]
) -> None:
    assert changed_keys(before, now) == changed
    assert (before.deciding == now.deciding) == (not changed)

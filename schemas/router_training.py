"""The recipe of a router's training: which labels of a cache to learn from, on what features, and how."""

from typing import ClassVar

from pydantic import Field

from .errors import RecipeError
from .recipe import NumberType, Section, checked
from .training import FREE, AnyTraining


class EarlyLayersSection(Section):
    """The first layers of a vision-language model of InternVL's kind, which see a frame and a query together."""

    weights: str = Field(min_length=1, description="path or URL of the model's folder, for instance hf://...")
    layers: int = Field(default=4, ge=1, description="of its decoder; the paper's choice is 4")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    dtype: NumberType = Field(default="float32", description="number type of the arithmetic")


class RouterLearningSection(Section):
    """How the two heads are found: one for frames, on labels of frames, and one for queries, on their policies."""

    relevance_epochs: int = Field(default=5, ge=1, description="over the labels of frames; the paper has 5")
    policy_epochs: int = Field(default=2, ge=1, description="over the policies of queries; the paper has 2")
    batch_size: int = Field(default=64, ge=1, description="examples in a step")
    relevance_learning_rate: float = Field(default=1e-3, gt=0, le=1, description="the paper has 5e-5")
    policy_learning_rate: float = Field(default=1e-3, gt=0, le=1, description="the paper has 1e-5")
    weight_decay: float = Field(default=0.01, ge=0)
    hidden: int = Field(default=256, ge=1, description="width of the heads between their two layers")
    held_out: float = Field(
        default=0.1, ge=0, lt=1, description="share of videos (of queries, for the policy) that only measure"
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    threads: int = Field(default=1, ge=1, description="arithmetic threads")
    checkpoint_every: int = Field(default=200, ge=1, description="steps")
    log_every: int = Field(default=50, ge=1, description="steps")


class RouterTrainingRecipe(AnyTraining):
    """A router's training: whose labels and features to learn from, and where to keep what was learned."""

    free: ClassVar[frozenset[str]] = FREE | {
        "early_layers.device",
        "training.relevance_epochs",
        "training.policy_epochs",
    }
    cache: str = Field(min_length=1, description="whose labels, policies and features are learned from; any fsspec URL")
    snapshot: int | None = Field(default=None, ge=1, description="of the cache; null: as it is when features are made")
    features: str | None = Field(default=None, description="an encoder of the cache's frames, by name")
    early_layers: EarlyLayersSection | None = Field(default=None, description="in place of features")
    labels: str | None = Field(default=None, description="source of the labels of frames; null: all")
    policies: str | None = Field(default=None, description="source of the policies of queries; null: all")
    training: RouterLearningSection = RouterLearningSection()


def parse_router_training(data: object) -> RouterTrainingRecipe:
    """The recipe in `data` (as YAML gives it); RecipeError names every wrong key, what was found and accepted."""
    recipe = checked(RouterTrainingRecipe, data)
    if (recipe.features is None) == (recipe.early_layers is None):
        found = "neither" if recipe.features is None else "both"
        raise RecipeError(
            f"features, early_layers: found {found}; accepted: one of them: features: the name of an encoder of the"
            f" cache, or early_layers: {{weights: ...}}"
        )
    return recipe

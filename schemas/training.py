"""The recipe of a training: which clips to learn from, what to train, and how; checked before any work."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from .errors import RecipeError
from .recipe import ClipsSection, DecodeSection, Recipe, Section, Source, checked

# What may change between two runs in one output folder: it decides where and how fast, not what is learned.
FREE = frozenset({"output", "training.checkpoint_every", "training.log_every"})  # in every training


class AnyTraining(Section):
    """What the recipe of every training has: where its model goes, and which of its keys decide the weights."""

    free: ClassVar[frozenset[str]] = FREE
    output: str = Field(min_length=1, description="local folder of the model, and of what resuming takes")

    @property
    def deciding(self) -> dict[str, Any]:
        """What decides the weights, by dotted key."""
        values = dict(_flat(self.model_dump(mode="json", exclude={"storage"})))
        return {key: value for key, value in values.items() if key not in self.free}


RANDOM_VAE_STEPS = 200  # that a small VAE takes to show what there is, before levels are of use


class VaeSizesSection(Section):
    """The shapes of a VAE with random weights, by the names of Wan's published config; these fit small experiments."""

    base_dim: int = Field(default=16, ge=1)
    z_dim: int = Field(default=16, ge=1, le=16, description="channels of latents, and bits of an id")
    dim_mult: tuple[int, ...] = Field(default=(1, 2, 2, 2), min_length=1)
    num_res_blocks: int = Field(default=1, ge=1)
    temperal_downsample: tuple[bool, ...] = Field(
        default=(False, True, True), description="one for each level but the last: whether it halves time too"
    )


class PyramidSection(Section):
    """The model: a causal VAE and a quantizer at several depths of its encoder."""

    vae: str | None = Field(
        default=None, description="path or URL of a VAE of Wan 2.1's kind to begin with; null: random, of `sizes`"
    )
    sizes: VaeSizesSection | None = Field(default=None, description="of a random VAE")
    native_grid: bool = Field(default=False, description="each level on its own grid, or all on that of the latents")
    num_levels: int | None = Field(
        default=None, ge=1, description="the deepest levels alone; null: one for each depth of the encoder"
    )
    text_width: int | None = Field(default=None, ge=1, description="width of embedded captions; null: without text")
    normalized: bool = Field(
        default=True, description="quantize latents less their mean, in deviations, as the first clips have them"
    )


class LossesSection(Section):
    """The weights of the terms of the loss, by default those of the paper."""

    reconstruction: float = Field(default=2.5, ge=0)
    codebook: float = Field(default=2.5, ge=0)
    autoregression: float = Field(default=1.5, ge=0)
    drift: float = Field(default=0.6, ge=0)


class LearningSection(Section):
    """How the weights are found."""

    steps: int = Field(ge=1)
    vae_steps: int | None = Field(
        default=None,
        ge=0,
        description="first steps, which train the VAE alone; null: 200 for random weights, none for those of model.vae",
    )
    vae_learning_rate: float = Field(default=3e-3, gt=0, le=1, description="of the steps of the VAE alone")
    batch_size: int = Field(default=4, ge=1, description="clips in a step")
    learning_rate: float = Field(
        default=1e-3, gt=0, le=1, description="the paper has 1e-5, beginning with a trained VAE"
    )
    schedule: Literal["constant", "cosine"] = Field(
        default="constant",
        description="after the warm-up; cosine falls to 0 over all steps, whose number is then fixed",
    )
    warmup_steps: int = Field(default=10, ge=0, description="steps in which the learning rate rises from 0")
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=4.0, gt=0, description="longer gradients are shortened to it")
    caption_share: float = Field(
        default=0.5, ge=0, le=1, description="share of clips whose captions are used, where the model takes any"
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU where there is one"
    )
    threads: int = Field(default=1, ge=1, description="arithmetic threads on a CPU")
    checkpoint_every: int = Field(default=100, ge=1, description="steps")
    log_every: int = Field(default=10, ge=1, description="steps")
    losses: LossesSection = LossesSection()


class TrainingRecipe(AnyTraining):
    """A training: what to read, how to cut it, what to train on it, and where to keep what was learned."""

    free: ClassVar[frozenset[str]] = FREE | {
        "decode.processes",
        "decode.run_in",
        "decode.timeout_s",
        "decode.memory_mb",
        "training.steps",
        "training.device",
    }
    sources: tuple[Source, ...] = Field(min_length=1)
    clips: ClipsSection
    model: PyramidSection = PyramidSection()
    training: LearningSection
    decode: DecodeSection = DecodeSection()
    storage: dict[str, dict[str, Any]] = Field(
        default={}, description="fsspec options by protocol, such as s3: {endpoint_url: ...}; never stored"
    )

    @property
    def vae_steps(self) -> int:
        """How many of the first steps train the VAE alone."""
        if self.training.vae_steps is not None:
            return self.training.vae_steps
        return 0 if self.model.vae else RANDOM_VAE_STEPS

    @property
    def reading(self) -> Recipe:
        """How the clips are found and decoded, as other jobs have it."""
        return Recipe(
            cache=self.output, sources=self.sources, clips=self.clips, decode=self.decode, storage=self.storage
        )

    @property
    def deciding(self) -> dict[str, Any]:
        """What decides the weights, by dotted key; the number of steps too, where the schedule depends on it."""
        fixed = {"training.steps": self.training.steps} if self.training.schedule == "cosine" else {}
        return super().deciding | fixed


def parse_training(data: object) -> TrainingRecipe:
    """The recipe in `data` (as YAML gives it); RecipeError names every wrong key, what was found and accepted."""
    recipe = checked(TrainingRecipe, data)
    if recipe.model.vae and recipe.model.sizes:
        raise RecipeError("model.sizes: those of model.vae are taken: remove one of both")
    if recipe.training.steps <= recipe.vae_steps:
        raise RecipeError(
            f"training.steps: found {recipe.training.steps}; accepted: more than the {recipe.vae_steps} that train the"
            f" VAE alone (training.vae_steps)"
        )
    if not any(recipe.training.losses.model_dump().values()):
        raise RecipeError("training.losses: all are 0; accepted: one above 0, or more")
    if recipe.decode.run_in == "actor":
        raise RecipeError("decode.run_in: found 'actor', which Ray's workers have; accepted: 'process'")
    return recipe


def changed_keys(before: AnyTraining, now: AnyTraining) -> list[str]:
    """What `now` changes of what decides the weights, each as ``key=before (this recipe: now)``."""
    old, new = before.deciding, now.deciding
    keys = [key for key in {**old, **new} if key not in now.free or (key in old and key in new)]
    return [f"{key}={old.get(key)} (this recipe: {new.get(key)})" for key in keys if old.get(key) != new.get(key)]


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a section and of those below it, by dotted key; lists are values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value

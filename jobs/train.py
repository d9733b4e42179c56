"""tokenmill train: recipe -> plan -> clips in a seeded order -> steps, with checkpoints -> model.safetensors."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..pipeline.decoders import ClipDecoder
from ..pipeline.plan_file import Plan
from ..pipeline.retries import apply_storage_options
from ..pipeline.storage import Folder
from ..pipeline.video_texts import texts_of
from ..schemas.clip import ClipFrames
from ..schemas.digest import digest_of
from ..schemas.errors import CacheError, RecipeError, TokenizerError
from ..schemas.recipe import ClipsSection
from ..schemas.training import PyramidSection, TrainingRecipe, VaeSizesSection, parse_training
from ..tokenizers.load import check_device
from ..tokenizers.pyratok import load_release
from ..tokenizers.pyratok_losses import LossWeights, PyramidTraining
from ..tokenizers.pyratok_pyramid import Pyramid, PyramidFile, PyramidSizes, build_pyramid, save_pyramid
from ..tokenizers.pyratok_quantizer import LatentStatistics
from ..tokenizers.pyratok_vae import VaeSizes, draw_weights
from .build import build_decoder
from .display import Display
from .training_clips import ClipOrder, ClipStream, plan_once
from .training_output import (
    CHECKPOINT,
    MODEL,
    alone_in,
    claim,
    cut_metrics,
    output_folder,
    read_checkpoint,
    write_whole,
)
from .training_steps import Learner, frames_of, take_steps

FITTED_BYTES = 512 << 20
FITTED_CLIPS = 64  # statistics of latents, and what the levels begin with, are of so many


def train_pyratok(recipe: TrainingRecipe, display: Display) -> None:
    """Train the recipe's pyramid from where its output folder is to the last step, and write model.safetensors.

    KeyboardInterrupt: the job was asked to stop before; its steps are kept.
    """
    apply_storage_options(recipe.storage)
    torch.set_num_threads(recipe.training.threads)
    folder = output_folder(recipe)
    with alone_in(folder):
        claim(folder, recipe, parse_training)
        kept = read_checkpoint(folder)
        if kept and kept["step"] > recipe.training.steps:
            raise RecipeError(
                f"training.steps: found {recipe.training.steps}; accepted: {kept['step']}, done already, or more"
            )
        if kept and kept["step"] == recipe.training.steps and _is_written(folder, kept["step"]):
            display.event("finished", model=folder.uri(MODEL), steps=kept["step"])
            return
        decoders = [build_decoder(recipe.reading) for _ in range(recipe.decode.processes)]
        try:
            learner = _train(recipe, kept, folder, decoders, display)
        finally:
            for decoder in decoders:
                decoder.close()
        extra = {"step": str(learner.step), "recipe": digest_of(recipe.deciding)}
        write_whole(folder, MODEL, lambda path: save_pyramid(learner.training.model, path, extra))
        display.event("trained", model=folder.uri(MODEL), steps=learner.step)


def _is_written(folder: Folder, step: int) -> bool:
    """Whether the model of that step is there, and not only its checkpoint."""
    if not folder.exists(MODEL):
        return False
    try:
        return PyramidFile.read(folder.path(MODEL)).extra.get("step") == str(step)
    except TokenizerError:
        return False


def _train(
    recipe: TrainingRecipe,
    kept: dict[str, Any] | None,
    folder: Folder,
    decoders: Sequence[ClipDecoder],
    display: Display,
) -> Learner:
    """The learner after the last step."""
    torch.manual_seed(recipe.training.seed)
    device = _device(recipe.training.device)
    model = (_kept_model(kept, folder) if kept else _first_model(recipe.model, recipe.training.seed)).to(device)
    _check_clips(recipe, model.sizes)
    plan = plan_once(recipe.reading, folder, display)
    order = ClipOrder(plan, recipe.training.seed)
    weights = LossWeights(**recipe.training.losses.model_dump())
    training = PyramidTraining(model, weights).to(device)
    learner = Learner(training=training, section=recipe.training, vae_steps=recipe.vae_steps)
    if kept:
        with _of_this_version(folder):
            learner.resume(kept)
    if learner.step <= recipe.vae_steps:
        first = _first_clips(recipe.clips, order, decoders)
        learner.begin_levels = partial(_begin_levels, training, first, normalized=recipe.model.normalized)
    cut_metrics(folder, learner.step)
    num_parameters = sum(one.numel() for one in model.parameters())
    display.event("training", clips=len(order), parameters=num_parameters, device=str(device), step=learner.step)
    size = recipe.training.batch_size
    places = range(learner.step * size, recipe.training.steps * size)
    with contextlib.closing(ClipStream(order, decoders, places)) as stream:
        take_steps(learner, stream, partial(_captions, recipe, folder, plan), folder, display)
    return learner


def _captions(recipe: TrainingRecipe, folder: Folder, plan: Plan, clips: Sequence[ClipFrames]) -> list[str | None]:
    """What the sources say of each clip's video, where the model takes it."""
    if recipe.model.text_width is None:
        return [None] * len(clips)
    texts = texts_of(folder, plan, [one.clip for one in clips])
    return [texts[digest].caption if digest in texts else None for digest in (one.clip.video.digest for one in clips)]


def _device(name: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        check_device(name)
    except TokenizerError as error:
        raise RecipeError(f"training.device: {error}") from None
    return torch.device(name)


def _first_model(section: PyramidSection, seed: int) -> Pyramid:
    """The pyramid at step 0: its VAE as the recipe names it, all else random."""
    try:
        vae = load_release(section.vae) if section.vae else None
        sizes = vae.sizes if vae else VaeSizes(**(section.sizes or VaeSizesSection()).model_dump())
        pyramid = PyramidSizes(
            native_grid=section.native_grid, num_levels=section.num_levels, text_width=section.text_width
        )
        model = build_pyramid(sizes, pyramid)
    except (TokenizerError, ValueError) as error:
        raise RecipeError(f"model: {error}") from None
    if vae is None:
        draw_weights(model, seed)
    else:
        own = model.state_dict().keys()
        model.load_state_dict({key: value for key, value in vae.state_dict().items() if key in own}, strict=False)
    return model


def _kept_model(kept: dict[str, Any], folder: Folder) -> Pyramid:
    """The pyramid that a checkpoint is of, without its weights."""
    with _of_this_version(folder):
        statistics = LatentStatistics(**kept["statistics"]) if kept["statistics"] else None
        return build_pyramid(VaeSizes(**kept["vae"]), PyramidSizes(**kept["pyramid"]), statistics)


@contextlib.contextmanager
def _of_this_version(folder: Folder) -> Iterator[None]:
    """CacheError where a checkpoint has other parts than this version of tokenmill."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise CacheError(
            f"{folder.uri(CHECKPOINT)}: of another version of tokenmill ({said}): go on with that one, or give output:"
            f" another folder"
        ) from None


def _check_clips(recipe: TrainingRecipe, sizes: VaeSizes) -> None:
    """RecipeError where clips are of a size that the VAE does not take."""
    clips, (every, space, _) = recipe.clips, sizes.stride_thw
    if clips.num_frames % every != 1 % every:
        near = 1 + every * max(1, round((clips.num_frames - 1) / every))
        raise RecipeError(
            f"clips.num_frames: found {clips.num_frames}; accepted: 1 + {every}k for this VAE, such as {near}"
        )
    for name in ("height", "width"):
        if getattr(clips, name) % space:
            raise RecipeError(
                f"clips.{name}: found {getattr(clips, name)}; accepted: multiples of {space} for this VAE"
            )


def _first_clips(section: ClipsSection, order: ClipOrder, decoders: Sequence[ClipDecoder]) -> list[torch.Tensor]:
    """The clips of the first steps, uint8 (1,3,T,H,W), as many as memory has room for."""
    clip_bytes = 3 * section.num_frames * section.height * section.width
    number = min(FITTED_CLIPS, len(order), max(1, FITTED_BYTES // clip_bytes))
    with contextlib.closing(ClipStream(order, decoders, range(number))) as stream:  # to its end: they are used again
        return [frames_of([one]) for one in stream if isinstance(one, ClipFrames)]


def _begin_levels(training: PyramidTraining, clips: Sequence[torch.Tensor], *, normalized: bool) -> None:
    device = next(training.parameters()).device
    training.begin_levels([clip.to(device) for clip in clips], normalized=normalized)

"""Choosing the concrete parts that a recipe names."""

import json
import os
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from ..pipeline.cache_head import read_info
from ..pipeline.decode import VideoDecoder
from ..pipeline.decode_clips import decode_clips
from ..pipeline.decoders import ClipDecoder, DirectDecoder, IsolatedDecoder
from ..pipeline.encode import BatchEncoder, largest_batch
from ..pipeline.executors import Executor, LocalExecutor, check_address
from ..pipeline.frames import FrameEmbedder, FrameMaker
from ..pipeline.isolation import Serve
from ..pipeline.retries import apply_storage_options
from ..pipeline.segment import MaskMaker
from ..pipeline.storage import Folder
from ..pipeline.videos import Prober
from ..pipeline.worker import Worker, fingerprints_of
from ..schemas.cache_info import CACHE_INFO, CacheInfo, ProductInfo
from ..schemas.errors import RecipeError, TokenizerError
from ..schemas.recipe import Recipe, parse_recipe
from ..schemas.shard import EMBEDDINGS, FRAMES, TOKENS, WEBDATASET, frames_product, masks_product, tokens_product
from ..tokenizers.base import Settings
from ..tokenizers.load import load_tokenizer
from .encoders import load_encoder
from .segmenters import load_segmenter


def build_worker(recipe: Recipe, cache: str | None = None, *, commits: bool = True) -> Worker:
    """A worker as the recipe asks, writing to its cache or to another folder; `commits` as in Worker."""
    apply_storage_options(recipe.storage)
    torch.set_num_threads(recipe.executor.threads)
    encoders = {tokens_product(name): build_encoder(recipe, name) for name in recipe.tokens}
    mask_makers = {masks_product(name): build_mask_maker(recipe, name) for name in recipe.masks}
    frame_maker, decoder = build_frame_maker(recipe), build_frame_decoder(recipe)
    return Worker(
        folder=Folder(cache or recipe.cache),
        decoders=tuple(build_decoder(recipe) for _ in range(recipe.decode.processes)),
        encoders=encoders,
        mask_makers=mask_makers,
        frame_maker=frame_maker,
        fingerprints=fingerprints_of(decoder, encoders, mask_makers, frame_maker, recipe.shards.format),
        commits=commits,
    )


def build_driver_worker(recipe: Recipe) -> Worker:
    """The worker of the process that runs the job. Where Ray's workers make the shards it stands for the products and
    their fingerprints alone, and needs no GPU.
    """
    if recipe.executor.kind == "local":
        return build_worker(recipe)
    tokens = {name: section.model_copy(update={"device": "cpu"}) for name, section in recipe.tokens.items()}
    masks = {name: section.model_copy(update={"device": "cpu"}) for name, section in recipe.masks.items()}
    frames = recipe.frames
    if frames:
        encoders = {name: section.model_copy(update={"device": "cpu"}) for name, section in frames.encoders.items()}
        frames = frames.model_copy(update={"encoders": encoders})
    return build_worker(recipe.model_copy(update={"tokens": tokens, "masks": masks, "frames": frames}))


def build_frame_decoder(recipe: Recipe) -> VideoDecoder:
    """What turns the bytes of a video into frames."""
    return VideoDecoder(recipe.clips.sampling, recipe.decode.decoder)


def build_decoder(recipe: Recipe) -> ClipDecoder:
    """What fetches and decodes videos: in a process of its own, unless only this process can see them."""
    if any(source.path.startswith("memory://") for source in recipe.sources):
        return DirectDecoder(build_frame_decoder(recipe))
    limits = recipe.decode
    return IsolatedDecoder(
        partial(serve_clips, recipe), recipe.clips.sampling, limits.timeout_s, memory_mb=limits.memory_mb
    )


def serve_clips(recipe: Recipe) -> Serve:
    """In the decoder's process: a function from the clips of a video to their frames."""
    apply_storage_options(recipe.storage)
    torch.set_num_threads(recipe.executor.threads)
    return partial(decode_clips, decoder=build_frame_decoder(recipe))


def build_probers(recipe: Recipe) -> list[Prober]:
    """What reads the facts of videos for the plan: twice as many as cores, since stores answer slowly."""
    limits = recipe.decode
    return [Prober(recipe.storage, limits.timeout_s, limits.memory_mb) for _ in range(2 * (os.cpu_count() or 1))]


def build_encoder(recipe: Recipe, name: str) -> BatchEncoder:
    """The tokenizer of `tokens.<name>` with its weights, checked against the size of the clips."""
    section = recipe.tokens[name]
    try:
        tokenizer = load_tokenizer(
            section.tokenizer,
            section.weights,
            section.device,
            section.dtype,
            logvar=section.logvar,
            compiled=section.compiled,
            options=section.options,
        )
        if section.stored_dtype and tokenizer.spec.kind == "discrete":
            raise TokenizerError(f"{section.tokenizer} makes codes, whose number type is given: remove stored_dtype")
        sampling, size = recipe.clips.sampling, section.batch_size
        size = largest_batch(tokenizer, sampling) if size == "auto" else size
        encoder = BatchEncoder(
            tokenizer=tokenizer, batch_size=size, sampling=sampling, stored_dtype=section.stored_dtype
        )
        encoder.layout  # noqa: B018  refuses sizes that the tokenizer does not take
    except (TokenizerError, RecipeError) as error:
        raise RecipeError(f"tokens.{name}: {error}") from None
    return encoder


def build_mask_maker(recipe: Recipe, name: str) -> MaskMaker:
    """The segmenter of `masks.<name>` with its weights."""
    section, sampling = recipe.masks[name], recipe.clips.sampling
    settings = Settings(weights=section.weights, device=section.device, dtype=section.dtype, options=section.options)
    try:
        segmenter = load_segmenter(section.segmenter, settings, sampling)
    except (TokenizerError, RecipeError) as error:
        raise RecipeError(f"masks.{name}: {error}") from None
    return MaskMaker(
        segmenter=segmenter,
        sampling=sampling,
        max_trajectories=section.max_trajectories,
    )


def build_frame_maker(recipe: Recipe) -> FrameMaker | None:
    """What takes candidate frames and embeds them; None where the recipe has none."""
    section = recipe.frames
    if section is None:
        return None
    embedders = {}
    for name, of in section.encoders.items():
        try:
            encoder = load_encoder(of)
        except (TokenizerError, RecipeError) as error:
            raise RecipeError(f"frames.encoders.{name}: {error}") from None
        embedders[frames_product(name)] = FrameEmbedder(encoder=encoder, batch_size=of.batch_size)
    fps = None if section.fps == "all" else section.fps
    return FrameMaker(sampling=recipe.clips.sampling, fps=fps, embedders=embedders)


def settled(recipe: Recipe) -> Recipe:
    """The recipe with a number for every batch_size=auto: the one that its cache was begun with, or what fits here.

    It is chosen once, by the process that runs the job, since it decides bytes.
    """
    names = [name for name, section in recipe.tokens.items() if section.batch_size == "auto"]
    if not names:
        return recipe
    apply_storage_options(recipe.storage)
    folder = Folder(recipe.cache)
    known = read_info(folder).products if folder.exists(CACHE_INFO) else {}
    tokens = dict(recipe.tokens)
    for name in names:
        product = known.get(tokens_product(name))
        before = dict(product.section or {}) if product else {}
        size = before.pop("batch_size", None)
        if before != tokens[name].model_dump(mode="json", exclude={"batch_size"}):
            size = build_encoder(recipe, name).batch_size
        tokens[name] = tokens[name].model_copy(update={"batch_size": size})
    return recipe.model_copy(update={"tokens": tokens})


def cache_info(recipe: Recipe, worker: Worker) -> CacheInfo:
    """The head of the cache that this recipe and worker make."""
    values = recipe.model_dump(mode="json", exclude={"storage"})
    sections = {key: values[key] for key in ("tokens", "masks")}
    products = {}
    for product, version in worker.fingerprints.items():
        kind, _, name = product.partition("/")
        encoder = worker.encoders.get(product.replace(EMBEDDINGS, TOKENS))
        maker = worker.mask_makers.get(product)
        embedder = worker.frame_maker.embedders.get(product) if worker.frame_maker else None
        entry = ProductInfo(fingerprint=version, section=sections if product == WEBDATASET else None)
        if embedder:
            spec = _plain(embedder.encoder.spec)
            frames = values["frames"]
            section = {**frames["encoders"][name], "fps": frames["fps"]}
            entry = replace(entry, section=section, encoder=spec, shape=(spec["dim"],))
        elif product == FRAMES:
            entry = replace(entry, section={"fps": values["frames"]["fps"]})
        elif maker:
            segmenter = _plain(maker.segmenter.spec)
            entry = replace(entry, section=sections[kind][name], segmenter=segmenter)
        elif encoder and encoder.embedding and product.startswith(EMBEDDINGS):
            entry = replace(entry, section=sections[TOKENS[:-1]][name], shape=(encoder.embedding.dim,))
        elif encoder:
            tokenizer = _plain(encoder.tokenizer.spec)
            shape, levels = encoder.layout.shape, encoder.layout.levels
            entry = replace(entry, section=sections[kind][name], tokenizer=tokenizer, shape=shape, levels=levels)
        products[product] = entry
    return CacheInfo(recipe=values, products=products)


def _plain(spec: Any) -> dict[str, Any]:
    """A spec as JSON has it."""
    return json.loads(json.dumps(asdict(spec)))


def recipe_of(info: CacheInfo) -> Recipe:
    """The recipe that would make all that a cache holds: that of its last job, with the products of all jobs.

    Tars of other products than the files are left out: one recipe makes either of the same products.
    """
    tars = info.products[WEBDATASET].section if WEBDATASET in info.products else None
    files: dict[str, Any] = {"tokens": {}, "masks": {}}
    for product, entry in info.products.items():
        kind, _, name = product.partition("/")
        if entry.tokenizer or entry.segmenter:
            files[kind][name] = entry.section
    is_any = any(files.values())
    frames = None
    if FRAMES in info.products:
        frames = dict(info.products[FRAMES].section or {})
        made = {p.partition("/")[2]: dict(entry.section or {}) for p, entry in info.products.items() if entry.encoder}
        # Embeddings of candidates at another rate are not those of one recipe with these.
        frames["encoders"] = {name: of for name, of in made.items() if of.pop("fps") == frames["fps"]}
    format = "webdataset" if tars and not is_any else "both" if files == tars else "parquet"
    shards = {**info.recipe["shards"], "format": format}
    return parse_recipe({**info.recipe, **(files if is_any else tars or {}), "frames": frames, "shards": shards})


def check_executor(recipe: Recipe) -> None:
    """RecipeError or TokenmillError where the recipe's executor cannot work, before anything has been done."""
    executor = recipe.executor
    if executor.kind == "local":
        if recipe.decode.run_in == "actor":
            raise RecipeError("decode.run_in=actor: actors are Ray's: set executor.kind=ray, or decode.run_in=process")
        return
    if Folder(recipe.cache).url.startswith("memory://"):
        raise RecipeError(
            f"cache: {recipe.cache} lives in one process and executor.kind=ray has several: use a folder or s3://"
        )
    check_address(executor.address)


def build_executor(recipe: Recipe, worker: Worker) -> Executor:
    """The executor that the recipe names: `worker` itself for local; Ray is imported only for ray."""
    if recipe.executor.kind == "local":
        return LocalExecutor(worker)
    from ..pipeline.ray_executor import RayExecutor

    if recipe.decode.run_in == "process":
        return RayExecutor(recipe.executor)
    return RayExecutor(recipe.executor, partial(build_decoder, recipe), recipe.decode.processes)

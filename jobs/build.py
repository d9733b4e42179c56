"""Choosing the concrete parts that a recipe names."""

import json
from dataclasses import asdict
from typing import Any

import torch

from ..pipeline.decode import VideoDecoder
from ..pipeline.encode import BatchEncoder
from ..pipeline.executors import Executor, LocalExecutor
from ..pipeline.storage import Folder
from ..pipeline.worker import Worker, fingerprints_of
from ..schemas.cache_info import CacheInfo, ProductInfo
from ..schemas.errors import RecipeError, TokenizerError
from ..schemas.recipe import Recipe, parse_recipe
from ..schemas.shard import CLIPS, tokens_product
from ..tokenizers.load import load_tokenizer


def build_worker(recipe: Recipe, cache: str | None = None) -> Worker:
    """A worker as the recipe asks, writing to its cache or to another folder."""
    torch.set_num_threads(recipe.executor.threads)
    decoder = VideoDecoder(recipe.clips.sampling, recipe.decode.decoder)
    encoders = {tokens_product(name): build_encoder(recipe, name) for name in recipe.tokens}
    return Worker(
        folder=Folder(cache or recipe.cache),
        decoder=decoder,
        encoders=encoders,
        fingerprints=fingerprints_of(decoder, encoders),
    )


def build_encoder(recipe: Recipe, name: str) -> BatchEncoder:
    """The tokenizer of `tokens.<name>` with its weights, checked against the size of the clips."""
    section = recipe.tokens[name]
    try:
        tokenizer = load_tokenizer(section.tokenizer, section.weights, section.device, section.dtype)
        encoder = BatchEncoder(tokenizer=tokenizer, batch_size=section.batch_size, sampling=recipe.clips.sampling)
        encoder.layout  # noqa: B018  refuses sizes that the tokenizer does not take
    except TokenizerError as error:
        raise RecipeError(f"tokens.{name}: {error}") from None
    return encoder


def cache_info(recipe: Recipe, worker: Worker) -> CacheInfo:
    """The head of the cache that this recipe and worker make."""
    products = {CLIPS: ProductInfo(fingerprint=worker.fingerprints[CLIPS])}
    for name, section in recipe.tokens.items():
        encoder = worker.encoders[tokens_product(name)]
        products[tokens_product(name)] = ProductInfo(
            fingerprint=worker.fingerprints[tokens_product(name)],
            section=section.model_dump(mode="json"),
            tokenizer=json.loads(json.dumps(asdict(encoder.tokenizer.spec))),
            shape=encoder.layout.shape,
        )
    return CacheInfo(recipe=recipe.model_dump(mode="json"), products=products)


def recipe_of(info: CacheInfo) -> Recipe:
    """The recipe that would make all that a cache holds: that of its last job, with the products of all jobs."""
    tokens: dict[str, Any] = {
        product.removeprefix("tokens/"): entry.section for product, entry in info.products.items() if entry.section
    }
    return parse_recipe({**info.recipe, "tokens": tokens})


def build_executor(recipe: Recipe, worker: Worker) -> Executor:
    """The executor that the recipe names: `worker` itself for local; Ray is imported only for ray."""
    if recipe.executor.kind == "local":
        return LocalExecutor(worker)
    if Folder(recipe.cache).url.startswith("memory://"):
        raise RecipeError(
            f"cache: {recipe.cache} lives in one process and executor.kind=ray has several: use a folder or s3://"
        )
    from ..pipeline.ray_executor import RayExecutor

    return RayExecutor(recipe.executor)

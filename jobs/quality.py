"""How near the frames that tokens decode to are to their sources."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..pipeline.cache import TokenCache
from ..pipeline.decoders import decode_ahead
from ..pipeline.metrics import LPIPS_PREFIX, LPIPS_SIDE, SSIM_WINDOW, Lpips, mean_psnr, mean_ssim
from ..pipeline.shard import batches
from ..schemas.errors import CacheError, TokenizerError
from ..tokenizers.weights import fetch_weights, read_tensors
from .build import build_worker, recipe_of
from .printing import new_table, output_console
from .reconstruct import check_tokenizer, decode_tokens
from .retokenize import sample_clips


@dataclass(slots=True, kw_only=True)
class Quality:
    """The figures of one product, a value for every clip."""

    psnr_db: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)


def measure_quality(cache: TokenCache, fraction: float, lpips: str | None) -> list[str]:
    """Decode the tokens of `fraction` of all clips (one at least), print how they compare with their sources, and
    return the problems. `lpips` is the path or URL of a checkpoint that has the networks of LPIPS.
    """
    distance = read_lpips(lpips) if lpips else None
    sides, least = cache.info.recipe["clips"], LPIPS_SIDE if lpips else SSIM_WINDOW
    if min(sides["height"], sides["width"]) < least:
        raise CacheError(
            f"{cache.folder.url}: frames of {least}x{least} or more can be compared, its clips are smaller"
        )
    qualities = {product: Quality() for product in cache.grid_products}
    problems = list(_measured(cache, qualities, fraction, distance))
    figures = ("clips", "PSNR dB", "SSIM", *(["LPIPS"] if distance else []))
    table = new_table("product", *figures, numbers=figures)
    for product, quality in qualities.items():
        if quality.psnr_db:
            means = [f"{np.mean(quality.psnr_db):.2f}", f"{np.mean(quality.ssim):.4f}"]
            means += [f"{np.mean(quality.lpips):.4f}"] if distance else []
            table.add_row(product, f"{len(quality.psnr_db):,}", *means)
    output_console().print(table)
    return problems


def read_lpips(uri: str) -> Lpips:
    """LPIPS with the networks in a checkpoint of VidTok; TokenizerError where it has none."""
    try:
        return Lpips(read_tensors(fetch_weights(uri)))
    except KeyError as error:
        raise TokenizerError(
            f"weights {uri}: no tensor {error} for LPIPS: give a checkpoint of VidTok, which has {LPIPS_PREFIX}*"
        ) from None


def _measured(
    cache: TokenCache, qualities: dict[str, Quality], fraction: float, distance: Lpips | None
) -> Iterator[str]:
    """Fill in the figures of every product; yields a line for every problem."""
    worker = build_worker(recipe_of(cache.info), cache.folder.url)
    try:
        for product in qualities:
            check_tokenizer(cache, product, worker.encoders[product])
        clips = sample_clips(cache, list(qualities), fraction)
        if not clips:
            yield "no clip could be compared: there is none with all its tokens in Parquet"
            return
        with contextlib.closing(decode_ahead(clips, worker.decoders)) as decoded:
            for sources, failures in batches(decoded, 1):
                yield from (f"clip {f.clip_id}: the source cannot be read again: {f.reason}" for f in failures)
                for source in sources:
                    for product, quality in qualities.items():
                        made_THWC = decode_tokens(cache, product, source.clip.clip_id, worker.encoders[product])
                        source_THWC = source.frames_THWC[: len(made_THWC)]
                        quality.psnr_db.append(mean_psnr(source_THWC, made_THWC))
                        quality.ssim.append(mean_ssim(source_THWC, made_THWC))
                        if distance:
                            quality.lpips.append(distance.mean_distance(source_THWC, made_THWC))
    finally:
        for decoder in worker.decoders:
            decoder.close()

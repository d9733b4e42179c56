"""Making a sample of clips again from their sources, and comparing what comes out with what is stored."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ..pipeline.cache import TokenCache
from ..pipeline.decoders import decode_ahead
from ..pipeline.encode import EMBEDDING, VALUES
from ..pipeline.plan_file import clips_of
from ..pipeline.segment import SegmentedClip
from ..pipeline.shard import batches, embed, segment, tokenize
from ..pipeline.worker import Worker
from ..schemas.clip import Clip, ClipFrames, FrameBatch
from ..schemas.shard import EMBEDDINGS, MASKS, TOKENS, frames_product
from ..tokenizers.base import AnyTokenizer, TrajectoryTokenizer, joined_levels
from .build import build_worker, recipe_of
from .comparison import Comparison, TrackComparison, TrajectoryComparison

MADE_AGAIN = (TOKENS, EMBEDDINGS, MASKS, frames_product(""))

AnyComparison = Comparison | TrajectoryComparison | TrackComparison


def retokenize_sample(cache: TokenCache, fraction: float) -> list[str]:
    """Make `fraction` of all clips again (one at least), print how their tokens compare, and return the problems."""
    worker = build_worker(recipe_of(cache.info), cache.folder.url)
    try:
        outdated = [p for p in worker.fingerprints if worker.fingerprints[p] != cache.info.products[p].fingerprint]
        if outdated:
            return [f"{p}: made by another version of its tokenizer, weights or decoder than is here" for p in outdated]
        return list(_compared(cache, worker, fraction))
    finally:
        for decoder in worker.decoders:
            decoder.close()


def _compared(cache: TokenCache, worker: Worker, fraction: float) -> Iterator[str]:
    """Print the figures of every product; yields a line for every problem."""
    products = [product for product in worker.fingerprints if product.startswith(MADE_AGAIN)]
    clips = sample_clips(cache, products, fraction)
    if not clips:
        yield "no clip could be made again: there is none with all its tokens in Parquet"
        return
    comparisons = {product: _comparison(worker, product) for product in products}
    with contextlib.closing(decode_ahead(clips, worker.decoders)) as decoded:
        for made, failures in batches(decoded, worker.batch_size):
            yield from (f"clip {f.clip_id}: the source cannot be read again: {f.reason}" for f in failures)
            if not made:
                continue
            yield from _compare(cache, worker, made, comparisons)
    for comparison in comparisons.values():
        if not comparison.num_clips:
            continue
        print(f"made again: {comparison.figures()}")
        if not comparison.is_close:
            first = f", for instance {comparison.other_clip_ids[0]}"
            yield f"{comparison.figures()}{first}"


def _compare(
    cache: TokenCache, worker: Worker, made: Sequence[ClipFrames], comparisons: dict[str, AnyComparison]
) -> Iterator[str]:
    """Make all products of these clips again, and count how they differ from what is stored; yields a line for every
    one that cannot be made.
    """
    products, batch = list(comparisons), FrameBatch.stack(made)
    clip_ids = [one.clip.clip_id for one in made]
    encoded = tokenize(batch, products, worker)
    segmented = segment(made, products, worker)
    _, embedded = embed(made, products, worker)
    for product, comparison in comparisons.items():
        if isinstance(comparison, TrackComparison):
            stored = cache.read_masks(product, clip_ids)
            for clip_id, before, now in zip(clip_ids, stored, segmented[product], strict=True):
                if isinstance(now, SegmentedClip):
                    comparison.add(clip_id, before.tracks_THW, now.masks.tracks_THW)
                else:
                    yield f"clip {clip_id}: {product} cannot be made again: {now.reason}"
        elif isinstance(comparison, Comparison) and product in embedded:
            for clip_id, now in zip(clip_ids, embedded[product], strict=True):
                before_KD = torch.from_numpy(cache.read_frames(product, clip_id).embeddings_KD)
                comparison.add(
                    [clip_id], before_KD.flatten()[None], torch.from_numpy(now.embeddings_KD).flatten()[None]
                )
        elif isinstance(comparison, TrajectoryComparison):
            stored = cache.read_trajectories(product, clip_ids)
            for clip_id, before, now in zip(clip_ids, stored, encoded[product].trajectories(), strict=True):
                comparison.add(clip_id, before, now)
        else:
            tokens = product.replace(EMBEDDINGS, TOKENS)
            margins = partial(_margins_of, batch, worker.encoders[tokens].tokenizer)
            name = EMBEDDING if product.startswith(EMBEDDINGS) else VALUES
            comparison.add(clip_ids, cache.read(product, clip_ids), encoded[tokens].wait()[name], margins)


def sample_clips(cache: TokenCache, products: Sequence[str], fraction: float) -> list[Clip]:
    """`fraction` of the clips that have tokens of all `products`, one at least, by video.

    The order of clip ids is the order of digests, so the first ones are a fair sample.
    """
    rows = cache.sql(
        """select c.clip_id, c.video_id, v.uri, -1 as size_bytes, c.start_s, c.end_s, c.frame_pts_s
           from clips c join videos v using (video_id)
           where c.clip_id::uuid in (
               select clip_id from locations where list_contains(?::varchar[], product)
               group by 1 having count(distinct product) = ?)
           order by c.clip_id""",
        [list(products), len(products)],
    )
    rows = rows.slice(0, max(1, math.ceil(fraction * rows.num_rows)))
    return list(clips_of(rows.sort_by([("video_id", "ascending"), ("start_s", "ascending")])))


def _margins_of(batch: FrameBatch, tokenizer: AnyTokenizer) -> torch.Tensor | None:
    if isinstance(tokenizer, TrajectoryTokenizer):
        return None
    with torch.inference_mode():
        margins = tokenizer.margins(torch.from_numpy(batch.frames_BTHWC))
    return None if margins is None else joined_levels(margins)


def _comparison(worker: Worker, product: str) -> AnyComparison:
    if product.startswith(MASKS):
        return TrackComparison(product=product)
    if product.startswith(EMBEDDINGS):
        return Comparison(product=product, dtype="float32")
    if product.startswith(frames_product("")):
        return Comparison(product=product, dtype="float16")
    encoder = worker.encoders[product]
    is_discrete = encoder.tokenizer.spec.kind == "discrete"
    values = Comparison(product=product, dtype=None if is_discrete else encoder.layout.dtype)
    if not encoder.has_trajectories:
        return values
    return TrajectoryComparison(values=values, patches=TrackComparison(product=product))

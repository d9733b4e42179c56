"""Making a sample of clips again from their sources, and comparing the tokens with those that are stored."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ..pipeline.cache import TokenCache
from ..pipeline.decoders import decode_ahead
from ..pipeline.plan_file import clips_of
from ..pipeline.shard import batches, tokenize
from ..pipeline.worker import Worker
from ..schemas.clip import Clip, FrameBatch
from ..tokenizers.base import VideoTokenizer
from .build import build_worker, recipe_of

SMALL_MARGIN = 1e-4  # a code that was so near to another one may become it when sums are taken in another order
# Of the largest stored value. The machine that made them makes the same bits again; others sum in another order, about
# 3e-6 in float32, and what is stored in 16 bits may then round to its neighbour.
TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Stored against remade tokens of one product, over all clips so far."""

    product: str
    dtype: str | None  # of latents; codes have none and are compared exactly
    num_clips: int = 0
    num_values: int = 0
    num_other_values: int = 0
    num_near_values: int = 0  # of these, codes whose latents lie next to a rounding boundary
    largest_error: float = 0.0
    sum_errors: float = 0.0
    largest_value: float = 0.0
    other_clip_ids: list[str] = field(default_factory=list)

    def add(
        self,
        clip_ids: Sequence[str],
        stored_N: torch.Tensor,
        made_N: torch.Tensor,
        margins: Callable[[], torch.Tensor | None] = lambda: None,
    ) -> None:
        """Count the differences of a batch of clips, tokens (N,t,h,w) or (N,t,h,w,d); `margins` are those of codes."""
        errors_Nv = (stored_N.double() - made_N.double()).abs().flatten(1)
        differs_Nv = ~(errors_Nv == 0)  # what is not a number differs too
        others_N = differs_Nv.any(dim=1).tolist()
        self.num_clips += len(clip_ids)
        self.num_values += errors_Nv.numel()
        self.num_other_values += int(differs_Nv.sum())
        if self.dtype is None and any(others_N) and (margins_N := margins()) is not None:
            self.num_near_values += int(((margins_N.cpu().flatten(1) < SMALL_MARGIN) & differs_Nv).sum())
        self.other_clip_ids += [clip_id for clip_id, is_other in zip(clip_ids, others_N, strict=True) if is_other]
        self.largest_error = max(self.largest_error, errors_Nv.max().item())
        self.sum_errors += errors_Nv.sum().item()
        self.largest_value = max(self.largest_value, stored_N.double().abs().max().item())

    @property
    def is_close(self) -> bool:
        """Whether codes are the same where they are certain, and latents within the tolerance."""
        if self.dtype is None:
            return self.num_other_values == self.num_near_values
        return not math.isnan(self.sum_errors) and self.largest_error <= TOLERANCES[self.dtype] * self.largest_value

    def figures(self) -> str:
        """What was found, in one line."""
        if self.dtype is None:
            clips = f"in {len(self.other_clip_ids)} of {self.num_clips:,} clips"
            near = f" ({self.num_near_values:,} next to a rounding boundary)" if self.num_near_values else ""
            return f"{self.product}: {self.num_other_values:,} of {self.num_values:,} codes differ{near}, {clips}"
        mean = self.sum_errors / max(1, self.num_values)
        return (
            f"{self.product}: largest error {self.largest_error:.3g}, mean {mean:.3g}, in {self.num_clips:,} clips of"
            f" values up to {self.largest_value:.3g}; tolerance {TOLERANCES[self.dtype]:g} of that"
        )


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
    products = [product for product in worker.encoders if product in worker.fingerprints]
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
            clip_ids = [one.clip.clip_id for one in made]
            batch = FrameBatch.stack(made)
            for product, tokens in tokenize(batch, products, worker).items():
                margins = partial(_margins_of, batch, worker.encoders[product].tokenizer)
                comparisons[product].add(clip_ids, cache.read(product, clip_ids), tokens.wait(), margins)
    for comparison in comparisons.values():
        if not comparison.num_clips:
            continue
        print(f"made again: {comparison.figures()}")
        if not comparison.is_close:
            first = f", for instance {comparison.other_clip_ids[0]}"
            yield f"{comparison.figures()}{first}"


def sample_clips(cache: TokenCache, products: Sequence[str], fraction: float) -> list[Clip]:
    """`fraction` of the clips that have tokens of all `products`, one at least, by video.

    The order of clip ids is the order of digests, so the first ones are a fair sample.
    """
    rows = cache.sql(
        """select c.clip_id, c.video_id, v.uri, -1 as size_bytes, c.start_s, c.end_s, c.frame_pts_s
           from clips c join videos v using (video_id)
           where c.clip_id::uuid in (select clip_id from locations group by 1 having count(distinct product) = ?)
           order by c.clip_id""",
        [len(products)],
    )
    rows = rows.slice(0, max(1, math.ceil(fraction * rows.num_rows)))
    return list(clips_of(rows.sort_by([("video_id", "ascending"), ("start_s", "ascending")])))


def _margins_of(batch: FrameBatch, tokenizer: VideoTokenizer) -> torch.Tensor | None:
    with torch.inference_mode():
        return tokenizer.margins(torch.from_numpy(batch.frames_BTHWC))


def _comparison(worker: Worker, product: str) -> Comparison:
    encoder = worker.encoders[product]
    is_discrete = encoder.tokenizer.spec.kind == "discrete"
    return Comparison(product=product, dtype=None if is_discrete else encoder.layout.dtype)

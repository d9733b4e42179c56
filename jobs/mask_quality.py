"""How near masks, and the assignments of trajectory tokens, are to masks that are taken as true."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..pipeline.cache import TokenCache
from ..pipeline.mask_metrics import entity_quality, overlaps_of, segmentation_tracking_quality, tube_iou
from ..schemas.errors import CacheError
from ..schemas.shard import TOKENS
from .printing import new_table, output_console
from .retokenize import sample_clips


@dataclass(slots=True, kw_only=True)
class MaskQuality:
    """The scores of one product, a value for every clip."""

    tube_iou: list[float] = field(default_factory=list)
    veq: list[float] = field(default_factory=list)
    stq: list[float] = field(default_factory=list)
    num_trajectories: list[int] = field(default_factory=list)


def measure_masks(cache: TokenCache, fraction: float, truth: str) -> None:
    """Print the scores of every product of masks or trajectory tokens against the masks `truth`, over `fraction` of the
    clips that both have (one at least); CacheError where there is nothing to compare.
    """
    true_product = cache.masks_product(truth)
    products = [p for p in segmented_products(cache) if p != true_product]
    if not products:
        raise CacheError(f"{cache.folder.url}: nothing to compare with {true_product}: it has no other masks")
    figures = ("clips", "tube IoU", "VEQ", "STQ", "trajectories")
    table = new_table("product", *figures, numbers=figures, title=f"against {true_product}")
    for product in products:
        quality = MaskQuality()
        for predicted_Thw, true_THW in _pairs(cache, product, true_product, fraction):
            overlaps = overlaps_of(predicted_Thw, _shrunk(true_THW, predicted_Thw.shape))
            quality.tube_iou.append(tube_iou(overlaps))
            quality.veq.append(entity_quality(overlaps))
            quality.stq.append(segmentation_tracking_quality(overlaps))
            quality.num_trajectories.append(len(np.unique(predicted_Thw[predicted_Thw > 0])))
        scores = [quality.tube_iou, quality.veq, quality.stq]
        means = [f"{np.nanmean(values):.3f}" if np.isfinite(values).any() else "-" for values in scores]
        table.add_row(product, f"{len(quality.veq):,}", *means, f"{np.mean(quality.num_trajectories or [0]):.1f}")
    output_console().print(table)


def segmented_products(cache: TokenCache) -> list[str]:
    """The products that say of which trajectory a pixel or patch is."""
    return [
        product
        for product, entry in cache.info.products.items()
        if entry.segmenter or (product.startswith(TOKENS) and cache.has_trajectories(product))
    ]


def clip_tracks(cache: TokenCache, product: str, clip_id: str) -> np.ndarray:
    """The tracks (T,h,w) of a clip's real frames in a product of masks or trajectory tokens."""
    if cache.info.products[product].segmenter:
        (masks,) = cache.read_masks(product, [clip_id])
        return masks.tracks_THW[: masks.num_valid]
    (tokens,) = cache.read_trajectories(product, [clip_id])
    return tokens.tracks_Thw[: tokens.num_valid]


def _pairs(
    cache: TokenCache, product: str, true_product: str, fraction: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for clip in sample_clips(cache, [product, true_product], fraction):
        yield clip_tracks(cache, product, clip.clip_id), clip_tracks(cache, true_product, clip.clip_id)


def _shrunk(tracks_THW: np.ndarray, shape_thw: tuple[int, ...]) -> np.ndarray:
    """The tracks at another size, pixel floor(i * H / h) for row i, as labels for training are taken."""
    (_, height, width), (_, h, w) = tracks_THW.shape, shape_thw
    return tracks_THW[:, np.arange(h) * height // h][:, :, np.arange(w) * width // w]

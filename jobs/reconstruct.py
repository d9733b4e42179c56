"""tokenmill reconstruct: what a clip's tokens or masks look like, beside its source."""

import json
from dataclasses import asdict

import numpy as np
import torch

from ..pipeline.cache import TokenCache, open_cache
from ..pipeline.decoders import DirectDecoder
from ..pipeline.encode import BatchEncoder
from ..pipeline.metrics import psnr
from ..pipeline.render import overlay, side_by_side, write_sheet, write_video
from ..pipeline.storage import written_aside
from ..schemas.clip import Clip, ClipFailure, Video
from ..schemas.errors import CacheError, DecodeError
from ..schemas.shard import MASKS, TOKENS
from ..tokenizers.base import LevelTokenizer, TrajectoryTokenizer
from .build import build_encoder, build_frame_decoder, recipe_of
from .export import trajectory_ids_of
from .mask_quality import clip_tracks, segmented_products


def reconstruct_clip(
    cache: str,
    clip_id: str,
    output: str,
    product: str | None,
    *,
    levels: int | None = None,
    png: str | None,
    snapshot: int | None = None,
) -> None:
    """Write a clip's source and reconstruction (from the first `levels` alone) side by side to `output`, and a contact
    sheet to `png`.
    """
    opened = open_cache(cache, snapshot)
    full_id = opened.clip_id(clip_id)
    name = choose_product(opened, product)
    encoder = build_encoder(recipe_of(opened.info), name.removeprefix("tokens/"))
    check_tokenizer(opened, name, encoder)
    decoded_THWC = decode_tokens(opened, name, full_id, encoder, levels=levels)
    clip, source_THWC = source_of(opened, full_id)
    source_THWC = source_THWC[: len(decoded_THWC)]
    _show(clip, source_THWC, decoded_THWC, name, output, png)
    print(f"PSNR {psnr(source_THWC, decoded_THWC):.2f} dB")


def show_masks(
    cache: str, clip_id: str, output: str, masks: str, *, png: str | None, snapshot: int | None = None
) -> None:
    """Write a clip's source and the same with its trajectories in colours side by side to `output`, and a contact
    sheet to `png`. `masks` is a product of masks, or of tokens of trajectories, whose assignment is shown then.
    """
    opened = open_cache(cache, snapshot)
    full_id = opened.clip_id(clip_id)
    product, tracks_THW, names = tracks_of(opened, masks, full_id)
    clip, source_THWC = source_of(opened, full_id)
    source_THWC = source_THWC[: clip.num_valid]
    coloured_THWC = overlay(source_THWC, tracks_THW, names)
    _show(clip, source_THWC, coloured_THWC, product, output, png)
    print(f"{len(names)} trajectories")


def tracks_of(cache: TokenCache, name: str, clip_id: str) -> tuple[str, np.ndarray, list[str]]:
    """The product called `name`, the tracks (T,h,w) of the clip's real frames, and the name of each trajectory."""
    known = segmented_products(cache)
    named = [one for one in (name, f"{MASKS}{name}", f"{TOKENS}{name}") if one in known]
    product = named[0] if named else cache.masks_product(name)
    tracks_THW = clip_tracks(cache, product, clip_id)
    if product.startswith(MASKS):
        return product, tracks_THW, trajectory_ids_of(cache, product, [clip_id])[clip_id]
    return product, tracks_THW, [f"{clip_id}-{n}" for n in range(int(tracks_THW.max()))]


def _show(clip: Clip, source_THWC: np.ndarray, made_THWC: np.ndarray, name: str, output: str, png: str | None) -> None:
    """Write the two side by side to `output`, and to `png` if asked."""
    num_valid = len(source_THWC)
    with written_aside(output) as aside:
        write_video(aside, side_by_side(source_THWC, made_THWC), num_valid / (clip.end_s - clip.start_s))
    print(f"{output}: {num_valid} frames of {clip.video.uri} from {clip.start_s:.3f} s, source left, {name} right")
    if png:
        with written_aside(png) as aside:
            write_sheet(aside, source_THWC, made_THWC)
        print(f"{png}: source above, {name} below")


def choose_product(cache: TokenCache, wanted: str | None) -> str:
    """The product asked for, or the only one; CacheError where there are several."""
    if wanted:
        return cache.product(wanted)
    products = cache.grid_products if cache.token_products else []
    if not products:
        raise CacheError(f"{cache.folder.url}: no tokens that decode to frames: give --masks NAME")
    if len(products) != 1:
        raise CacheError(f"{cache.folder.url}: give --product, one of {', '.join(products)}")
    return products[0]


def check_tokenizer(cache: TokenCache, product: str, encoder: BatchEncoder) -> None:
    """CacheError unless this is the tokenizer, with the weights, that made the product's current version."""
    made, here = cache.info.products[product].tokenizer or {}, json.loads(json.dumps(asdict(encoder.tokenizer.spec)))
    others = [f"{key} {made.get(key)} there, {value} here" for key, value in here.items() if made.get(key) != value]
    if others:
        raise CacheError(
            f"{cache.folder.url}: {product} was made by another tokenizer than is here ({'; '.join(others)}):"
            f" put its weights back, or run the recipe again"
        )


def decode_tokens(
    cache: TokenCache, product: str, clip_id: str, encoder: BatchEncoder, *, levels: int | None = None
) -> np.ndarray:
    """The real frames (T,H,W,3) uint8 of a clip, from its tokens alone, by the tokenizer that made them.

    Codes that come in levels may be those of the first `levels` alone.
    """
    tokenizer = encoder.tokenizer
    if isinstance(tokenizer, TrajectoryTokenizer):
        raise CacheError(f"{product}: tokens of trajectories do not decode to frames: reconstruct --masks shows them")
    num_valid, num_frames = cache.num_valid(clip_id), encoder.sampling.num_frames
    with torch.inference_mode():
        if isinstance(tokenizer, LevelTokenizer):
            frames_BTHWC = tokenizer.decode(cache.read_levels(product, [clip_id], levels=levels), num_frames)
        else:
            frames_BTHWC = tokenizer.decode(cache.read(product, [clip_id], levels=levels), num_frames)
    return frames_BTHWC[0, :num_valid].cpu().numpy()


def source_of(cache: TokenCache, clip_id: str) -> tuple[Clip, np.ndarray]:
    """The clip and its frames (T,H,W,3) uint8, decoded from the source again."""
    (row,) = cache.clips(f"clip_id = '{clip_id}'").to_pylist()
    video = Video(uri=row["uri"], size_bytes=-1, digest=row["video_id"])
    clip = Clip(
        clip_id=clip_id,
        video=video,
        start_s=row["start_s"],
        end_s=row["end_s"],
        frame_pts_s=tuple(row["frame_pts_s"]),
    )
    recipe = recipe_of(cache.info)
    (result,) = DirectDecoder(build_frame_decoder(recipe)).decode([clip])
    if isinstance(result, ClipFailure):
        raise DecodeError(f"{video.uri}: the source cannot be read again: {result.reason}")
    return clip, result.frames_THWC

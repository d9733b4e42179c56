"""tokenmill export trajtok: clips and their masks as files that TrajTok's trainers read (TrajTok, arXiv:2602.22779)."""

import contextlib
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pyarrow as pa

from ..pipeline.cache import TokenCache
from ..pipeline.cut import SAME_TIME_S, nearest
from ..pipeline.decoders import ClipDecoder, decode_ahead
from ..pipeline.mask_formats import LEAST_SHARE, SAV_FPS, annotations_of, by_area, instances_of
from ..pipeline.plan_file import clips_of
from ..pipeline.render import write_video
from ..pipeline.shard import batches
from ..pipeline.storage import Folder, storage_errors
from ..pipeline.views import CLIPS_WITH_VIDEOS
from ..schemas.clip import Clip, ClipFailure
from ..schemas.errors import CacheError, DecodeError, StorageError
from ..schemas.masks import MOST_IDS, ClipMasks
from ..schemas.tables import FORMAT_VERSION
from .build import build_decoder, recipe_of
from .export import EXPORT_MANIFEST, READ_CLIPS, choose_clips, empty_folder

RECORD = "export.json"
CLIPS_AT_ONCE = 8
SLOWEST_FPS = 1 / 1000  # of a written video: its clock cannot tell slower ones
MOST_PICTURE_IDS = MOST_IDS - 1  # loaders that count in bytes from 1 to the largest id plus 1 would overflow
JPEG_QUALITY = 2 * 118  # the best that the encoder has, in its own units
FILE_KEYS = ("video", "mask", "graph", "image", "tar")  # what names a file in a manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledClip:
    """A clip on its way out: its frames (T,H,W,3) decoded again, their masks, and the caption of its video.

    `sampled_fps` is the rate that the recipe asks for, None where it asks for none.
    """

    clip: Clip
    frames_THWC: np.ndarray
    masks: ClipMasks
    caption: str
    sampled_fps: float | None

    @property
    def fps(self) -> float:
        """Frames in a second of the clip, on average."""
        return max(SLOWEST_FPS, self.clip.num_valid / (self.clip.end_s - self.clip.start_s))

    @property
    def middle(self) -> int:
        """The frame that stands for the clip in layouts of pictures."""
        return (self.clip.num_valid - 1) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The files of one clip, by name in the folder they were written to, and what the manifest says of it."""

    names: tuple[str, ...]
    entry: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How clips become files. `write` puts those of one clip into a folder; None where it has nothing to learn from.

    `extension` is what loaders replace in paths to find masks, so it may occur once; None where they do not. Files of
    `in_tars` go into tars.
    """

    write: Callable[[LabelledClip, str], Written | None]
    extension: str | None
    in_tars: bool = False


@dataclass(slots=True, kw_only=True)
class Tally:
    """What has become of the clips of an export that were not written."""

    num_empty: int = 0
    failures: list[ClipFailure] = field(default_factory=list)


def export_trajtok(
    cache: TokenCache, output: str, product: str | None, where: str, *, layout: str, root: str | None, per_tar: int
) -> None:
    """Write the clips that `where` holds for, with their masks of `product` (None: the only one), in `layout`.

    `root` is put before the names of files in the manifest, the folder's own path by default. The manifest is written
    last: with it the export is complete. A clip whose source cannot be read again is reported and left out.
    """
    folder, name = empty_folder(output), choose_masks(cache, product)
    place = folder.url if root is None else root
    check_root(place, LAYOUTS[layout].extension)
    clip_ids, num_lacking = choose_clips(cache, [name], where)
    recipe, tally = recipe_of(cache.info), Tally()
    decoders = [build_decoder(recipe) for _ in range(recipe.decode.processes)]
    try:
        sampled_fps = recipe.clips.sampling.fps if recipe.clips.cut == "windows" else None
        source = _Source(cache=cache, product=name, decoders=decoders, sampled_fps=sampled_fps)
        entries = list(_exported(source, folder, _rows(cache, clip_ids), LAYOUTS[layout], per_tar, tally))
    finally:
        for decoder in decoders:
            decoder.close()
    num_clips = len(clip_ids) - tally.num_empty - len(tally.failures)
    if not num_clips:
        reason = tally.failures[0].reason if tally.failures else "their masks show no segment"
        raise DecodeError(f"{cache.folder.url}: none of {len(clip_ids)} clips could be exported: {reason}")
    manifest = [{k: os.path.join(place, v) if k in FILE_KEYS else v for k, v in one.items()} for one in entries]
    record = {
        "format_version": FORMAT_VERSION, "layout": layout, "where": where,
        "product": name, "fingerprint": cache.info.products[name].fingerprint,
        "segmenter": cache.info.products[name].segmenter, "num_frames": recipe.clips.num_frames,
        "num_clips": num_clips, "num_without_masks": num_lacking, "num_without_segments": tally.num_empty,
        "failures": [asdict(failure) for failure in tally.failures],
    }  # fmt: skip
    folder.replace(RECORD, json.dumps(record, indent=1, sort_keys=True).encode() + b"\n")
    folder.replace(EXPORT_MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
    left_out = [f"{num_lacking} without masks", f"{tally.num_empty} without segments", f"{len(tally.failures)} failed"]
    left_out = ", ".join(text for text in left_out if not text.startswith("0 "))
    print(f"{folder.uri(EXPORT_MANIFEST)}: {num_clips} clips{f', left out: {left_out}' if left_out else ''}")
    if layout == "video":
        print(lengths_taken(recipe.clips.num_frames))


def lengths_taken(num_frames: int) -> str:
    """For which settings of the trainer its frames and masks of clips of this length stay together."""
    half = f", or {num_frames // 2}, which takes every second one" if num_frames % 2 == 0 else ""
    return f"train with num_frames={num_frames}, all frames of a clip{half}: other numbers draw masks at random"


def choose_masks(cache: TokenCache, wanted: str | None) -> str:
    """The product of masks asked for, or the only one; CacheError where there are several, or none."""
    if wanted:
        return cache.masks_product(wanted)
    products = [product for product, entry in cache.info.products.items() if entry.segmenter]
    if len(products) != 1:
        found = f"give --product, one of {', '.join(products)}" if products else "it has no masks to export"
        raise CacheError(f"{cache.folder.url}: {found}")
    return products[0]


def check_root(root: str, extension: str | None) -> None:
    """StorageError where a loader that replaces the extension in a path would also change the folder."""
    if extension and extension in root:
        raise StorageError(
            f"{root}: {extension} occurs in the path, and loaders find masks by replacing it: choose another folder,"
            f" or with --root another name for it"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where frames and masks of clips come from."""

    cache: TokenCache
    product: str
    decoders: Sequence[ClipDecoder]
    sampled_fps: float | None


def _rows(cache: TokenCache, clip_ids: Sequence[str]) -> pa.Table:
    """The clips with what decoding them takes and their captions, video by video."""
    return cache.sql(
        f"""select clip_id, video_id, uri, -1 as size_bytes, start_s, end_s, frame_pts_s, coalesce(caption, '') caption
            from {CLIPS_WITH_VIDEOS} where clip_id in (select unnest(?::varchar[]))
            order by video_id, start_s, clip_id""",
        [list(clip_ids)],
    )


def _exported(
    source: _Source, folder: Folder, rows: pa.Table, layout: Layout, per_tar: int, tally: Tally
) -> Iterator[dict[str, Any]]:
    """Write and put in place the files of a part of the clips after the other; yields the manifest's entries."""
    per_part = per_tar if layout.in_tars else READ_CLIPS
    for number, start in enumerate(range(0, rows.num_rows, per_part)):
        part = rows.slice(start, per_part)
        with folder.staging() as staging:
            with storage_errors(staging):
                written = dict(_written(source, part, layout, staging, tally))
            # Decoders side by side end in any order.
            ordered = [written[clip_id] for clip_id in part["clip_id"].to_pylist() if clip_id in written]
            if layout.in_tars and ordered:
                name = f"{number:05d}.tar"
                with storage_errors(staging):
                    _pack(f"{staging}/{name}", [f"{staging}/{file}" for one in ordered for file in one.names])
                folder.put(f"{staging}/{name}", name)
                yield {"tar": name, "num_images": len(ordered)}
            elif not layout.in_tars:
                for one in ordered:
                    for file in one.names:
                        folder.put(f"{staging}/{file}", file)
                    yield one.entry


def _written(
    source: _Source, part: pa.Table, layout: Layout, staging: str, tally: Tally
) -> Iterator[tuple[str, Written]]:
    """Write the files of these clips into `staging`, in the order in which they are decoded."""
    captions = dict(zip(part["clip_id"].to_pylist(), part["caption"].to_pylist(), strict=True))
    with contextlib.closing(decode_ahead(clips_of(part), source.decoders)) as decoded:
        for clips, failures in batches(decoded, CLIPS_AT_ONCE):
            masks = source.cache.read_masks(source.product, [one.clip.clip_id for one in clips]) if clips else []
            for one, mask in zip(clips, masks, strict=True):
                clip_id, sizes = one.clip.clip_id, (one.frames_THWC.shape[:3], mask.masks_THW.shape)
                if sizes[0] != sizes[1]:
                    reason = f"its frames are {sizes[0]} by the cache's last recipe, its masks {sizes[1]}"
                    failures.append(ClipFailure(clip_id=clip_id, step="export", reason=reason))
                    continue
                labelled = LabelledClip(
                    clip=one.clip, frames_THWC=one.frames_THWC, masks=mask, caption=captions[clip_id],
                    sampled_fps=source.sampled_fps,
                )  # fmt: skip
                files = layout.write(labelled, staging)
                if files is None:
                    tally.num_empty += 1
                else:
                    yield clip_id, files
            for failure in failures:
                print(f"clip {failure.clip_id}: left out ({failure.step}): {failure.reason}")
            tally.failures += failures


def _pack(path: str, files: Sequence[str]) -> None:
    """A tar of these files, by name alone: the same files give the same bytes."""
    with tarfile.open(path, "x", format=tarfile.USTAR_FORMAT) as tar:
        for file in files:
            info = tarfile.TarInfo(os.path.basename(file))  # of mode 644, user 0 and time 0
            info.size = os.path.getsize(file)
            with open(file, "rb") as stream:
                tar.addfile(info, stream)


def write_clip(one: LabelledClip, folder: str) -> Written | None:
    """Files of the layout video: all frames of the clip, those repeated at its end too, with masks and graph."""
    if not len(one.masks.graph_MT):
        return None
    clip_id = one.clip.clip_id
    video, mask, graph = f"{clip_id}.mp4", f"{clip_id}_mask.npz", f"{clip_id}_graph.npz"
    frames_THWC, masks_THW = even(one.frames_THWC, one.masks.masks_THW)
    write_video(f"{folder}/{video}", frames_THWC, one.fps)
    np.savez_compressed(f"{folder}/{mask}", masks_THW)
    np.savez_compressed(f"{folder}/{graph}", tensor=one.masks.graph_MT)
    entry = {"video": video, "caption": one.caption, "mask": mask, "graph": graph}
    return Written(names=(video, mask, graph), entry=entry)


def write_picture(one: LabelledClip, folder: str) -> Written | None:
    """Files of the layout image: the clip's middle frame, and its segments, numbered from the largest."""
    clip_id, ids_HW = one.clip.clip_id, picture_ids(one)
    if not ids_HW.any():
        return None
    image, mask = f"{clip_id}.jpg", f"{clip_id}_mask.npz"
    write_jpeg(f"{folder}/{image}", one.frames_THWC[one.middle])
    np.savez_compressed(f"{folder}/{mask}", ids_HW)
    return Written(names=(image, mask), entry={"image": image, "caption": one.caption})


def picture_ids(one: LabelledClip) -> np.ndarray:
    """The largest segments (H,W) of the clip's middle frame, numbered from 1, the largest first."""
    ids_HW = by_area(one.masks.masks_THW[one.middle])
    return np.where(ids_HW <= MOST_PICTURE_IDS, ids_HW, 0)


def write_annotated(one: LabelledClip, folder: str) -> Written | None:
    """Members of the layout sa1b: the clip's middle frame, and its segments as annotations, the largest first."""
    clip_id, frame_HWC = one.clip.clip_id, one.frames_THWC[one.middle]
    annotations = annotations_of(picture_ids(one))
    height, width, _ = frame_HWC.shape
    if not annotations or annotations[0]["area"] < LEAST_SHARE * height * width:
        return None
    image = {"file_name": f"{clip_id}.jpg", "height": height, "width": width}
    image |= {"caption": one.caption} if one.caption else {}
    write_jpeg(f"{folder}/{clip_id}.jpg", frame_HWC)
    write_json(f"{folder}/{clip_id}.json", {"image": image, "annotations": annotations})
    return Written(names=(f"{clip_id}.jpg", f"{clip_id}.json"), entry={})


def write_instances(one: LabelledClip, folder: str) -> Written | None:
    """Files of the layout sav: the clip at 6 frames a second, and its largest trajectories as instances."""
    chosen = six_a_second(one)
    frames_THWC, tracks_THW = even(one.frames_THWC[chosen], one.masks.tracks_THW[chosen])
    instances = instances_of(tracks_THW, MOST_IDS)
    if not instances:
        return None
    clip_id = one.clip.clip_id
    write_video(f"{folder}/{clip_id}.mp4", frames_THWC, SAV_FPS)
    write_json(f"{folder}/{clip_id}_instances.json", instances)
    names = f"{clip_id}.mp4", f"{clip_id}_instances.json"
    return Written(names=names, entry={"video": names[0], "caption": one.caption})


def six_a_second(one: LabelledClip) -> np.ndarray:
    """Which frames of a clip make a video of 6 frames a second: those nearest to every sixth of a second.

    All of them where the clip has 6 or fewer in a second: repeating frames would teach nothing.
    """
    num_frames = len(one.frames_THWC)
    if (one.sampled_fps or one.fps) <= SAV_FPS + SAME_TIME_S:
        return np.arange(num_frames)
    times_s = np.append(one.clip.frame_pts_s, one.clip.end_s + np.arange(num_frames - one.clip.num_valid) / one.fps)
    num_chosen = max(1, math.ceil(num_frames / one.fps * SAV_FPS - SAME_TIME_S))
    return nearest(times_s, times_s[0] + np.arange(num_chosen) / SAV_FPS)


def even(frames_THWC: np.ndarray, ids_THW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames and masks with even numbers of rows and columns, as H.264 wants: an edge is repeated, with masks of 0."""
    odd_rows, odd_columns = ids_THW.shape[1] % 2, ids_THW.shape[2] % 2
    margins = (0, 0), (0, odd_rows), (0, odd_columns)
    return np.pad(frames_THWC, (*margins, (0, 0)), mode="edge"), np.pad(ids_THW, margins)


def write_jpeg(path: str, picture_HWC: np.ndarray) -> None:
    """Write one picture (H,W,3) uint8 as JPEG."""
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.height, encoder.width = picture_HWC.shape[:2]
    encoder.pix_fmt, encoder.time_base = "yuvj444p", Fraction(1, 1)
    encoder.options = {"flags": "+qscale", "global_quality": str(JPEG_QUALITY)}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), format="rgb24")
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    with open(path, "wb") as stream:
        stream.writelines(bytes(packet) for packet in packets)


def write_json(path: str, value: object) -> None:
    """Write `value` as JSON."""
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(value, stream, ensure_ascii=False)


LAYOUTS = {
    "video": Layout(write=write_clip, extension=".mp4"),
    "image": Layout(write=write_picture, extension=".jpg"),
    "sa1b": Layout(write=write_annotated, extension=None, in_tars=True),
    "sav": Layout(write=write_instances, extension=".mp4"),
}

"""Masks that others made, taken from beside the videos and brought to the size of clips as the frames are."""

import base64
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from tokenmill.pipeline.decode import VideoDecoder
from tokenmill.pipeline.decoders import DirectDecoder
from tokenmill.pipeline.mask_formats import encode_rle, instances_of
from tokenmill.pipeline.places import TarMember
from tokenmill.pipeline.render import write_png, write_video
from tokenmill.pipeline.resize import place_of, resize_frame
from tokenmill.pipeline.sidecars import Sidecars, SidecarsOptions, VideoShape, scaled_ids
from tokenmill.schemas.clip import Clip, ClipFailure, ClipFrames, Sampling, Video
from tokenmill.schemas.errors import RecipeError, SourceError
from tokenmill.schemas.recipe import parse_options

HEIGHT, WIDTH, NUM_FRAMES = 48, 80, 12
FPS = 6


def sampling(height: int = HEIGHT, width: int = WIDTH, resize: str = "center_crop", num_frames: int = 4) -> Sampling:
    return Sampling(
        fps=None, num_frames=num_frames, height=height, width=width, resize=f"{resize}/bilinear", tail="pad"
    )


def tracks(num_frames: int = NUM_FRAMES) -> np.ndarray:
    """A block that goes right as track 1, and one that is there in the first half only as track 2."""
    tracks_THW = np.zeros((num_frames, HEIGHT, WIDTH), np.int32)
    for t in range(num_frames):
        tracks_THW[t, 10:30, 3 * t : 3 * t + 20] = 1
        if t < num_frames // 2:
            tracks_THW[t, 34:44, 50:70] = 2
    return tracks_THW


def labelled_video(folder: Path, name: str = "a", *, fps: float = FPS) -> str:
    """A video of those tracks: black, with track 1 in red and track 2 in blue."""
    frames_THWC = np.zeros((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for number, channel in ((1, 0), (2, 2)):
        frames_THWC[tracks() == number, channel] = 255
    write_video(f"{folder}/{name}.mp4", frames_THWC, fps)
    return f"{folder}/{name}.mp4"


def npz_of(folder: Path, base: str = "a", version: str = "") -> None:
    """The tracks as masks with numbers of their own in each frame, and a graph."""
    masks_THW, graph_MT = np.zeros(tracks().shape, np.uint8), np.zeros((2, NUM_FRAMES), np.int64)
    for t, frame in enumerate(tracks()):
        for m in (0, 1):
            if (frame == m + 1).any():
                graph_MT[m, t] = 1 + (m + t) % 2
                masks_THW[t][frame == m + 1] = graph_MT[m, t]
    np.savez_compressed(folder / f"{base}_mask{version}.npz", masks_THW)
    np.savez_compressed(folder / f"{base}_graph{version}.npz", tensor=graph_MT)


def clip_of(uri: str, numbers: tuple[int, ...] = (0, 3, 7, 11), wanted: Sampling | None = None) -> ClipFrames:
    """A clip of these frames of a video, black."""
    wanted = wanted or sampling()
    pts_s = tuple(number / FPS for number in numbers)
    video = Video(uri=uri, size_bytes=-1, digest="uri:d")
    clip = Clip(clip_id="c0", video=video, start_s=0, end_s=99, frame_pts_s=pts_s)
    frames_THWC = np.zeros((wanted.num_frames, wanted.height, wanted.width, 3), np.uint8)
    return ClipFrames(clip=clip, frames_THWC=frames_THWC, decoded_pts_s=pts_s, frame_numbers=numbers, decoder="none")


def segmented(clip: ClipFrames, wanted: Sampling | None = None, **options: Any) -> np.ndarray:
    found = Sidecars(SidecarsOptions(**options), wanted or sampling()).segment(clip)
    assert isinstance(found, np.ndarray), found.reason
    return found


def refused(uri: str, *, numbers: tuple[int, ...] = (0, 3, 7, 11), **options: Any) -> str:
    found = Sidecars(SidecarsOptions(**options), sampling()).segment(clip_of(uri, numbers))
    assert isinstance(found, ClipFailure)
    assert (found.clip_id, found.step, found.status) == ("c0", "segment", "failed")
    assert "\n" not in found.reason
    return found.reason


def test_masks_are_those_of_the_frames_of_the_clip(tmp_path: Path) -> None:
    uri = labelled_video(tmp_path)
    npz_of(tmp_path)
    for numbers in ((0, 3, 7, 11), (5, 5, 6, 6), (11, 10, 9, 8)):
        np.testing.assert_array_equal(segmented(clip_of(uri, numbers)), tracks()[list(numbers)])


def test_padding_repeats_the_last_masks(tmp_path: Path) -> None:
    uri = labelled_video(tmp_path)
    npz_of(tmp_path)
    np.testing.assert_array_equal(segmented(clip_of(uri, (4, 5))), tracks()[[4, 5, 5, 5]])


def test_clips_of_several_videos_may_come_in_turns(tmp_path: Path) -> None:
    clips = []
    for name in "abcdef":
        npz_of(tmp_path, name)
        clips.append(clip_of(labelled_video(tmp_path, name)))
    sidecars = Sidecars(SidecarsOptions(), sampling())
    for found in [sidecars.segment(clip) for clip in (*clips, *clips)]:
        np.testing.assert_array_equal(found, tracks()[[0, 3, 7, 11]])  # pyright: ignore


def test_masks_of_a_video_cut_short_keep_the_name_of_the_whole(tmp_path: Path) -> None:
    npz_of(tmp_path, "whole")
    np.testing.assert_array_equal(segmented(clip_of(labelled_video(tmp_path, "whole_short"))), tracks()[[0, 3, 7, 11]])


def test_versions_and_another_folder_are_found(tmp_path: Path) -> None:
    uri, masks = labelled_video(tmp_path), tmp_path / "masks"
    masks.mkdir()
    npz_of(masks, version="_v2")
    assert segmented(clip_of(uri), folder=str(masks), version="_v2").max() == 2
    assert "sought a_mask.npz" in refused(uri, folder=str(masks), version="_v0")
    npz_of(masks)
    assert segmented(clip_of(uri), folder=f"{masks}/", version="_v0").max() == 2


def test_sidecars_are_found_in_any_store(tmp_path: Path) -> None:
    npz_of(tmp_path)
    data = Path(labelled_video(tmp_path)).read_bytes()
    store = fsspec.filesystem("memory")
    for name in ("a.mp4", "a_mask.npz", "a_graph.npz"):
        store.pipe(f"/sidecars/{name}", data if name == "a.mp4" else (tmp_path / name).read_bytes())
    try:
        assert segmented(clip_of("memory://sidecars/a.mp4")).max() == 2
        assert segmented(clip_of(f"{tmp_path}/a.mp4"), folder="memory://sidecars").max() == 2
    finally:
        store.rm("/sidecars", recursive=True)


@pytest.mark.parametrize("resize", ["center_crop", "squash", "letterbox"])
@pytest.mark.parametrize("size", [(48, 80), (24, 40), (32, 32), (33, 71), (100, 64), (20, 90), (12, 9)])
@pytest.mark.parametrize("shrunk", [1, 2])
def test_masks_lie_where_the_frames_show_them(tmp_path: Path, resize: str, size: tuple[int, int], shrunk: int) -> None:
    """Against the decoder's own frames of a video that shows its masks; masks may be smaller than the video."""
    wanted, uri = sampling(*size, resize), labelled_video(tmp_path)
    npz_of(tmp_path)
    if shrunk == 2:
        with np.load(tmp_path / "a_mask.npz") as arrays:
            masks_THW = arrays["arr_0"]
        np.savez(tmp_path / "a_mask.npz", masks_THW[:, ::2, ::2])
    clip = clip_of(uri, wanted=wanted).clip
    (decoded,) = DirectDecoder(VideoDecoder(wanted, "auto")).decode([clip])
    assert isinstance(decoded, ClipFrames)
    found_THW = segmented(decoded, wanted)
    assert found_THW.shape == decoded.frames_THWC.shape[:3]
    for number, channel in ((1, 0), (2, 2)):
        shown_THW = decoded.frames_THWC[..., channel] > 127
        border_THW = np.abs(decoded.frames_THWC[..., channel].astype(int) - 127) < 120  # half covered pixels
        agree = (found_THW == number) == shown_THW
        assert agree[~border_THW].mean() >= (1 if shrunk == 1 else 0.97)


def test_pixels_are_taken_from_where_resizing_puts_them() -> None:
    """A frame of which every row and column is its own grey level, against resize_frame itself."""
    for height, width, source_h, source_w in ((8, 8, 16, 24), (5, 9, 15, 27), (16, 16, 8, 8), (7, 3, 21, 33)):
        ramp_HW = np.repeat(np.arange(source_h)[:, None], source_w, axis=1) * 5
        for resize in ("center_crop", "squash", "letterbox"):
            wanted = sampling(height, width, resize)
            frame_HWC = np.repeat(ramp_HW[..., None], 3, axis=2).astype(np.uint8)
            resized_HW = resize_frame(frame_HWC, wanted)[..., 0].astype(int)
            shape = VideoShape(num_frames=1, fps=1, height=source_h, width=source_w)
            ids_HW = scaled_ids(ramp_HW[None], shape, wanted)[0]
            place = place_of(source_h, source_w, wanted)
            step = 5 * max(1, source_h / place.height)
            assert np.abs(ids_HW - resized_HW).max() <= step


def test_a_clip_of_one_pixel_has_the_track_of_its_middle(tmp_path: Path) -> None:
    uri, wanted = labelled_video(tmp_path), sampling(1, 1, "squash")
    npz_of(tmp_path)
    assert segmented(clip_of(uri, wanted=wanted), wanted).ravel().tolist() == tracks()[[0, 3, 7, 11], 24, 40].tolist()


def test_bars_of_the_letterbox_are_of_no_segment(tmp_path: Path) -> None:
    uri = labelled_video(tmp_path)
    np.savez(tmp_path / "a_mask.npz", np.ones((NUM_FRAMES, HEIGHT, WIDTH), np.uint8))
    np.savez(tmp_path / "a_graph.npz", tensor=np.ones((1, NUM_FRAMES), np.int64))
    wanted = sampling(80, 80, "letterbox")
    found_THW = segmented(clip_of(uri, wanted=wanted), wanted)
    assert not found_THW[:, :16].any()
    assert found_THW[:, 16:64].all()
    assert not found_THW[:, 64:].any()


def test_ids_that_the_graph_lacks_are_no_track(tmp_path: Path) -> None:
    uri = labelled_video(tmp_path)
    masks_THW = np.full((NUM_FRAMES, HEIGHT, WIDTH), 9, np.uint8)
    masks_THW[:, 0] = 1
    np.savez(tmp_path / "a_mask.npz", masks_THW)
    graph_MT = np.array([[0] * NUM_FRAMES, [1] * 6 + [0] * 6, [200] * NUM_FRAMES])
    np.savez(tmp_path / "a_graph.npz", tensor=graph_MT)
    found_THW = segmented(clip_of(uri))
    assert np.unique(found_THW).tolist() == [0, 2]
    assert (found_THW == 2).any(axis=(1, 2)).tolist() == [True, True, False, False]


def picture(folder: Path, name: str = "p") -> tuple[str, np.ndarray]:
    """A still, and ids for it."""
    ids_HW = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids_HW[5:20, 5:40], ids_HW[25:40, 30:70] = 1, 2
    Image.fromarray(ids_HW * 90).save(folder / f"{name}.jpg")
    return f"{folder}/{name}.jpg", ids_HW


ONE = sampling(num_frames=1)


def test_the_mask_of_a_picture_needs_no_graph(tmp_path: Path) -> None:
    uri, ids_HW = picture(tmp_path)
    np.savez(tmp_path / "p_mask.npz", ids_HW.astype(np.int64) * 400)
    np.testing.assert_array_equal(segmented(clip_of(uri, (0,), ONE), ONE)[0], ids_HW.astype(int) * 400)


def annotations(ids_HW: np.ndarray) -> dict[str, Any]:
    found = [{"segmentation": encode_rle(ids_HW == i), "area": int((ids_HW == i).sum())} for i in (1, 2)]
    return {"image": {"caption": "two"}, "annotations": found}


def test_annotations_of_sa1b_are_read(tmp_path: Path) -> None:
    uri, ids_HW = picture(tmp_path)
    (tmp_path / "p.json").write_text(json.dumps(annotations(ids_HW)))
    np.testing.assert_array_equal(segmented(clip_of(uri, (0,), ONE), ONE)[0], ids_HW)


def png_of(mode: str, ids_HW: np.ndarray, folder: Path) -> bytes:
    if mode == "RGB":  # ids of three bytes
        write_png(f"{folder}/ids.png", np.stack([ids_HW, ids_HW * 2, ids_HW * 3], axis=2))
        return (folder / "ids.png").read_bytes()
    stream = io.BytesIO()
    if mode == "P":
        coloured = Image.frombytes("P", ids_HW.shape[::-1], ids_HW.tobytes())
        coloured.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        coloured.save(stream, "PNG")
    else:
        Image.fromarray(ids_HW.astype(np.uint16) * 300 if mode == "I;16" else ids_HW).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(("mode", "factor"), [("L", 1), ("I;16", 300), ("P", 1), ("RGB", 1 + 2 * 256 + 3 * 65536)])
def test_panoptic_masks_are_read(tmp_path: Path, mode: str, factor: int) -> None:
    uri, ids_HW = picture(tmp_path)
    encoded = base64.b64encode(png_of(mode, ids_HW, tmp_path)).decode()
    (tmp_path / "p.json").write_text(json.dumps({"panoptic_mask": {"mask_png": encoded}}))
    np.testing.assert_array_equal(segmented(clip_of(uri, (0,), ONE), ONE)[0], ids_HW.astype(int) * factor)


def test_sidecars_of_members_of_a_tar_are_members_of_it(tmp_path: Path) -> None:
    uri, ids_HW = picture(tmp_path)
    (tmp_path / "p.json").write_text(json.dumps(annotations(ids_HW)))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("p.jpg", "p.json"):
            tar.add(tmp_path / name, f"part/{name}")
    with tarfile.open(tmp_path / "0.tar") as tar:
        member = tar.getmember("part/p.jpg")
    uri = TarMember(
        file_uri=f"{tmp_path}/0.tar", name=member.name, offset=member.offset_data, size_bytes=member.size
    ).uri
    np.testing.assert_array_equal(segmented(clip_of(uri, (0,), ONE), ONE)[0], ids_HW)
    assert segmented(clip_of(uri, (0,), ONE), ONE, folder=str(tmp_path)).max() == 2
    assert "sought p_mask.npz, p_graph.npz" in refused(uri, numbers=(0,), layout="video")


def test_instances_of_sav_are_read(tmp_path: Path) -> None:
    uri = labelled_video(tmp_path)
    instances = instances_of(tracks(), 9)
    for one in instances["0"]["segmentations"]:
        if one["frame_number"] == 4 * 7:
            one["rle"] = None
    (tmp_path / "a_instances.json").write_text(json.dumps(instances))
    found_THW = segmented(clip_of(uri))
    np.testing.assert_array_equal(found_THW[[0, 1, 3]], tracks()[[0, 3, 11]])
    assert not found_THW[2].any()


def test_the_layout_asked_for_is_taken_alone(tmp_path: Path) -> None:
    uri = labelled_video(tmp_path)
    npz_of(tmp_path)
    instances = instances_of(np.where(tracks() == 1, 0, tracks()), 9)
    (tmp_path / "a_instances.json").write_text(json.dumps(instances))
    assert segmented(clip_of(uri)).max() == 2
    assert np.unique(segmented(clip_of(uri), layout="sav")).tolist() == [0, 1]
    assert "no masks beside it: sought a.json" in refused(uri, layout="sa1b")


def saved(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


MASKS = np.ones((NUM_FRAMES, HEIGHT, WIDTH), np.uint8)
GRAPH = np.ones((1, NUM_FRAMES), np.int64)
DAMAGED = b"""{"size": [2, 2], "counts": "1"}"""
GOOD_GRAPH = {"a_graph.npz": saved(tensor=GRAPH)}
NO_NPZ = "a_mask.npz with a_graph.npz: not an npz file, or damaged"
BROKEN: dict[str, tuple[dict[str, bytes], str]] = {
    "nothing": ({}, "a.mp4: no masks beside it: sought a_mask.npz, a_graph.npz, a_instances.json, a.json"),
    "no graph": ({"a_mask.npz": saved(arr_0=MASKS)}, "arr_0 has the shape (12, 48, 80), accepted is (H,W)"),
    "still": ({"a_mask.npz": saved(arr_0=MASKS[0])}, "masks of one picture, the video shows 12 frames"),
    "short": ({"a_mask.npz": saved(arr_0=MASKS[:8]), **GOOD_GRAPH}, "masks of 8 frames, the video shows 12: cut the"),
    "short graph": (
        {"a_mask.npz": saved(arr_0=MASKS), "a_graph.npz": saved(tensor=GRAPH[:, :8])},
        "masks of 12 frames, the graph has 8",
    ),
    "other key": ({"a_mask.npz": saved(masks=MASKS), **GOOD_GRAPH}, "no array 'arr_0', found masks"),
    "float": ({"a_mask.npz": saved(arr_0=MASKS / 2), **GOOD_GRAPH}, "arr_0 holds float64, accepted are whole numbers"),
    "negative": ({"a_mask.npz": saved(arr_0=-GRAPH[..., None]), **GOOD_GRAPH}, "arr_0 holds int64, accepted are"),
    "pickle": ({"a_mask.npz": saved(arr_0=np.array([{}])), **GOOD_GRAPH}, NO_NPZ),
    "garbage": ({"a_mask.npz": b"garbage", **GOOD_GRAPH}, NO_NPZ),
    "empty": ({"a_mask.npz": b"", **GOOD_GRAPH}, NO_NPZ),
    "cut": ({"a_mask.npz": saved(arr_0=MASKS)[:-99], **GOOD_GRAPH}, NO_NPZ),
    "no JSON": ({"a_instances.json": b"{"}, "a_instances.json: not JSON (Expecting"),
    "list": ({"a_instances.json": b"[]"}, "a_instances.json: not of this layout"),
    "no frames": ({"a_instances.json": b'{"0": {}}'}, "a_instances.json: not of this layout (KeyError"),
    "late": (
        {"a_instances.json": b'{"0": {"segmentations": [{"frame_number": 48, "rle": {"size": [1, 1]}}]}}'},
        "a mask of frame 48, the last of the video is 44",
    ),
    "damaged runs": (
        {"a_instances.json": b"""{"0": {"segmentations": [{"frame_number": 0, "rle": %b}]}}""" % DAMAGED},
        "a.mp4: its sidecar: the runs cover 1 pixels",
    ),
    "other JSON": ({"a.json": b'{"caption": "x"}'}, "a.json: neither annotations nor panoptic_mask, found caption"),
    "no annotation": ({"a.json": b'{"annotations": []}'}, "a.json: no annotations"),
    "no PNG": ({"a.json": b'{"panoptic_mask": {"mask_png": "bm8="}}'}, "a.json: "),
    "no base64": ({"a.json": b'{"panoptic_mask": {"mask_png": "%"}}'}, "a.json: "),
    "no object": ({"a.json": b"7"}, "a.json: not of this layout"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "message"), BROKEN.values(), ids=BROKEN)
def test_sidecars_that_cannot_be_read_fail_the_clip_alone(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    uri = labelled_video(tmp_path)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert message in refused(uri)


def test_instances_of_another_rate_are_refused(tmp_path: Path) -> None:
    uri = labelled_video(tmp_path, fps=24)
    (tmp_path / "a_instances.json").write_text(json.dumps(instances_of(tracks(), 9)))
    assert "the video has 24 frames a second, its masks belong to one of 6: re-encode it" in refused(uri)


def test_a_frame_that_the_masks_lack_fails_the_clip(tmp_path: Path) -> None:
    uri = labelled_video(tmp_path)
    npz_of(tmp_path)
    assert "its sidecar: not of this layout (IndexError" in refused(uri, numbers=(12,))


def test_videos_without_a_name_or_a_file_fail_the_clip(tmp_path: Path) -> None:
    assert "it does not exist" in refused(f"{tmp_path}/absent.mp4")
    (tmp_path / "text.mp4").write_text("text")
    assert "not a readable video" in refused(f"{tmp_path}/text.mp4")


def test_videos_in_a_parquet_column_have_no_name(tmp_path: Path, make_parquet: Callable[..., str]) -> None:
    uri = make_parquet(Path(labelled_video(tmp_path)).read_bytes())
    assert "a video in a Parquet column has no name that masks could share" in refused(uri)


@pytest.fixture
def make_parquet(tmp_path: Path) -> Callable[..., str]:
    """The URI of a video in a Parquet column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def make(data: bytes) -> str:
        pq.write_table(pa.table({"video": pa.array([data], pa.binary())}), tmp_path / "v.parquet")
        return f"{tmp_path}/v.parquet#column=video&row=0"

    return make


def test_a_store_out_of_reach_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures would be committed, and outlast the outage."""
    store = fsspec.filesystem("memory")

    def broken(*_: Any, **__: Any) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(store), "get_file", broken)
    with pytest.raises(SourceError, match="no answer"):
        Sidecars(SidecarsOptions(), sampling()).segment(clip_of("memory://nowhere/a.mp4"))
    elsewhere, clip = SidecarsOptions(folder="memory://nowhere"), clip_of(labelled_video(tmp_path))
    with pytest.raises(SourceError, match="no answer"):
        Sidecars(elsewhere, sampling()).segment(clip)


def test_options_are_told_apart_and_are_part_of_the_spec() -> None:
    options = parse_options(SidecarsOptions, {"layout": "sav"})
    assert Sidecars(options, sampling()).spec.options == {"folder": None, "layout": "sav", "version": ""}
    with pytest.raises(RecipeError, match=r"options.layout: found 'sam'.*accepted"):
        parse_options(SidecarsOptions, {"layout": "sam"})
    with pytest.raises(RecipeError, match=r"options.version: found '../x'"):
        parse_options(SidecarsOptions, {"version": "../x"})

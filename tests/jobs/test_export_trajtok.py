"""Exports for TrajTok's trainers, judged by a loader that was written from the description of theirs."""

import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from tokenmill.jobs.display import showing
from tokenmill.jobs.export_trajtok import LAYOUTS, LabelledClip, Written, lengths_taken, six_a_second
from tokenmill.jobs.run import run_recipe
from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.segment import masks_of
from tokenmill.schemas.clip import Clip, Video
from tokenmill.schemas.masks import ClipMasks
from tokenmill.schemas.recipe import parse_recipe

from .conftest import Command
from .trajtok_loader import (
    Rejected,
    check_batch,
    frame_rate,
    load_instances,
    load_manifest,
    load_tars,
    read_by_decord,
    read_video,
)

ODD = {"num_frames": 16, "height": 45, "width": 61}
SIZE = 60, 80


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, footage: Path) -> TokenCache:
    """A cache of 8 clips with captions, the last one padded, of an odd size, with two trajectories each."""
    folder = tmp_path_factory.mktemp("made")
    table = folder / "videos.csv"
    table.write_text(f'uri,caption\n{footage / "carphone_pristine.mp4"},"a man, in a ""car"" — filmed"\n')
    source = {"kind": "table", "path": str(table)}
    sections = {"clips": ODD, "masks": {"objects": {"segmenter": "fake"}}}
    with showing(log_json=False) as display:
        run_recipe(parse_recipe({"cache": str(folder / "cache"), "sources": [source], **sections}), display)
    return open_cache(str(folder / "cache"))


def exported(tokenmill: Command, cache: TokenCache, *arguments: str) -> str:
    done = tokenmill("export", "trajtok", cache.folder.url, "out", *arguments)
    assert done.code == 0, done.err
    return done.out


def labelled(
    tracks_THW: np.ndarray, num_valid: int | None = None, *, fps: float = 25, sampled: float | None = None
) -> LabelledClip:
    """A clip of these tracks; its frames show them as grey levels."""
    num_frames = len(tracks_THW)
    num_valid = num_valid or num_frames
    pts_s = tuple((np.arange(num_valid) / fps).tolist())
    clip = Clip(
        clip_id=f"{zlib.crc32(tracks_THW.tobytes()):032x}", video=Video(uri="a.mp4", size_bytes=-1, digest="d"),
        start_s=0, end_s=num_valid / fps, frame_pts_s=pts_s,
    )  # fmt: skip
    levels = (tracks_THW * 37 % 251).astype(np.uint8)
    return LabelledClip(
        clip=clip, frames_THWC=np.repeat(levels[..., None], 3, axis=3), masks=masks_of(tracks_THW, num_valid, 65535),
        caption="moving blocks", sampled_fps=sampled,
    )  # fmt: skip


def moving(num_frames: int = 16, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    """A block that goes right, one that is gone after half of the clip, and what is behind them."""
    tracks_THW = np.ones((num_frames, height, width), np.int32)
    for t in range(num_frames):
        tracks_THW[t, 5:25, t * 2 : t * 2 + 20] = 2
        if t < num_frames // 2:
            tracks_THW[t, 30:50, 40:70] = 3
    return tracks_THW


def blocks(num: int, height: int = 96, width: int = 96, side: int = 4) -> np.ndarray:
    """As many squares as asked, in rows, each a track of its own in all of 8 frames."""
    rows, columns = np.arange(height)[:, None] // side, np.arange(width) // side
    frame_HW = rows * (width // side) + columns + 1
    frame_HW = np.where(frame_HW <= num, frame_HW, 0)
    frame_HW[(np.arange(height)[:, None] % side == 0) | (np.arange(width) % side == 0)] = 0
    return np.repeat(frame_HW[None].astype(np.int32), 8, axis=0)


def written(folder: Path, layout: str, *clips: LabelledClip) -> str:
    """The manifest of these clips, written as an export writes them."""
    found = [LAYOUTS[layout].write(one, str(folder)) for one in clips]
    assert all(found)
    return manifest(folder, [one for one in found if one])


def manifest(folder: Path, found: Sequence[Written]) -> str:
    keys = ("video", "mask", "graph", "image")
    entries = [{k: str(folder / v) if k in keys else v for k, v in one.entry.items()} for one in found]
    (folder / "manifest.json").write_text(json.dumps(entries))
    return str(folder / "manifest.json")


def evened(ids_THW: np.ndarray) -> np.ndarray:
    return np.pad(ids_THW, [(0, 0), *((0, side % 2) for side in ids_THW.shape[1:])])


def same_tracks(loaded_THW: np.ndarray, graph_MT: np.ndarray, masks: ClipMasks, frames: Any = slice(None)) -> None:
    """The loaded labels are the trajectories of the clip, the same rows in the same order, but those after 128."""
    kept = masks.tracks_THW[frames]
    expected_THW = evened(np.where(kept <= 128, kept, 0))
    found_THW = ClipMasks(masks_THW=loaded_THW, graph_MT=graph_MT, num_valid=1).tracks_THW
    np.testing.assert_array_equal(found_THW, expected_THW)


def test_videos_of_a_cache_load_as_they_were_cached(tokenmill: Command, made: TokenCache, tmp_path: Path) -> None:
    out = exported(tokenmill, made)
    assert f"{tmp_path}/out/manifest.json: 8 clips\n" in out
    assert "train with num_frames=16, all frames of a clip, or 8, which takes every second one" in out
    samples = load_manifest(f"{tmp_path}/out/manifest.json", 16)
    check_batch(samples)
    clips = {row["clip_id"]: row for row in made.clips().to_pylist()}
    assert {one.match_id for one in samples} == {f"{clip_id}.mp4" for clip_id in clips}
    for one in samples:
        clip = clips[one.match_id.removesuffix(".mp4")]
        (masks,) = made.read_masks("objects", [clip["clip_id"]])
        assert one.frames_THWC.shape == (16, 46, 62, 3)
        assert one.caption == 'a man, in a "car" — filmed'
        np.testing.assert_array_equal(one.graph_MT, masks.graph_MT)
        same_tracks(one.masks_THW, one.graph_MT, masks)
        assert np.abs(read_by_decord(f"{tmp_path}/out/{one.match_id}").astype(int) - one.frames_THWC).max() <= 2
        seconds = 16 / frame_rate(f"{tmp_path}/out/{one.match_id}")
        assert seconds == pytest.approx((clip["end_s"] - clip["start_s"]) * 16 / clip["num_valid"], rel=0.002)
        assert int(one.valid_M.sum()) == 2


def test_exported_frames_look_as_the_masks_say(tokenmill: Command, made: TokenCache, tmp_path: Path) -> None:
    """The fake segmenter parts pixels by brightness, so frames of another clip or order would show here."""
    exported(tokenmill, made)
    for one in load_manifest(f"{tmp_path}/out/manifest.json", 16):
        grey = one.frames_THWC.sum(axis=3).astype(int)
        bright = grey[:, :45, :61] > grey[:, :45, :61].mean()
        ids = one.masks_THW[:, :45, :61]
        named = max((bright == (ids == i))[ids > 0].mean() for i in (1, 2))
        assert named > 0.97


def test_a_second_export_has_the_same_bytes(tokenmill: Command, made: TokenCache, tmp_path: Path) -> None:
    for layout, tars in (("video", ()), ("sa1b", ("--clips-per-tar", "2"))):
        for name in ("one", "two"):
            arguments = ("--layout", layout, "--root", "", *tars, "--where", "start_s < 1.5")
            done = tokenmill("export", "trajtok", made.folder.url, f"{layout}_{name}", *arguments)
            assert done.code == 0, done.err
        one, two = (
            {path.name: path.read_bytes() for path in (tmp_path / f"{layout}_{name}").iterdir()}
            for name in ("one", "two")
        )
        assert one == two
        assert {"manifest.json", "export.json"} < set(one)


def test_images_of_a_cache_are_middle_frames(tokenmill: Command, made: TokenCache, tmp_path: Path) -> None:
    exported(tokenmill, made, "--layout", "image")
    samples = load_manifest(f"{tmp_path}/out/manifest.json")
    check_batch(samples)
    assert len(samples) == 8
    for one in samples:
        clip_id = one.match_id.removesuffix(".jpg")
        (masks,) = made.read_masks("masks/objects", [clip_id])
        middle = masks.masks_THW[(masks.num_valid - 1) // 2]
        assert one.frames_THWC.shape == (1, 45, 61, 3)
        np.testing.assert_array_equal(one.masks_THW[0] > 0, middle > 0)
        assert (one.masks_THW == 1).sum() >= (one.masks_THW == 2).sum() > 0


def test_tars_in_the_way_of_sa1b_hold_every_segment(tokenmill: Command, made: TokenCache, tmp_path: Path) -> None:
    exported(tokenmill, made, "--layout", "sa1b", "--clips-per-tar", "3")
    entries = json.loads((tmp_path / "out/manifest.json").read_text())
    assert entries == [{"tar": f"{tmp_path}/out/{n:05d}.tar", "num_images": num} for n, num in enumerate((3, 3, 2))]
    samples = list(load_tars([one["tar"] for one in entries]))
    check_batch(samples)
    assert len({one.match_id for one in samples}) == 8
    for one in samples:
        (masks,) = made.read_masks("objects", [one.match_id.removesuffix(".jpg")])
        middle = masks.masks_THW[(masks.num_valid - 1) // 2]
        np.testing.assert_array_equal(one.masks_THW[0] > 0, middle > 0)
        assert one.caption.startswith("a man")


def test_instances_of_a_cache_are_those_of_six_frames_a_second(
    tokenmill: Command, made: TokenCache, tmp_path: Path
) -> None:
    exported(tokenmill, made, "--layout", "sav", "--product", "objects")
    for entry in json.loads((tmp_path / "out/manifest.json").read_text()):
        frames = len(read_video(entry["video"]))
        assert frame_rate(entry["video"]) == pytest.approx(6)
        assert frames == 4  # 16 frames, 30 to the second
        sample = load_instances(entry["video"], frames)
        check_batch([sample])
        (masks,) = made.read_masks("objects", [Path(entry["video"]).stem])
        same_tracks(sample.masks_THW, sample.graph_MT, masks, [0, 5, 10, 15])


@pytest.mark.parametrize("crop", [False, True])
def test_videos_train_with_half_of_their_frames(tmp_path: Path, *, crop: bool) -> None:
    """Masks of 16 frames for 8: the loader draws them at random, of intervals of two."""
    one = labelled(moving())
    for seed in range(4):
        (sample,) = load_manifest(written(tmp_path, "video", one), 8, seed=seed, crop=crop)
        same_tracks(sample.masks_THW, sample.graph_MT, one.masks, slice(0, 16, 2))
        check_batch([sample])


def test_other_lengths_part_frames_and_masks() -> None:
    """What the export's last line warns of."""
    assert lengths_taken(12).startswith("train with num_frames=12, all frames of a clip, or 6, which")
    assert lengths_taken(9).startswith("train with num_frames=9, all frames of a clip: other numbers")


def test_the_loader_of_these_tests_rejects_short_clips_and_draws_masks_at_random(tmp_path: Path) -> None:
    short, long = labelled(moving(4)), labelled(moving(12))
    with pytest.raises(Rejected, match="4 frames, 8 are wanted"):
        load_manifest(written(tmp_path, "video", short), 8)
    drawn = [load_manifest(written(tmp_path, "video", long), 5, seed=seed)[0].masks_THW for seed in range(6)]
    assert any((one != drawn[0]).any() for one in drawn)


def test_padded_clips_have_the_length_of_the_others(tmp_path: Path) -> None:
    tracks_THW = moving(16)
    tracks_THW[6:] = tracks_THW[5]
    one = labelled(tracks_THW, 6)
    (sample,) = load_manifest(written(tmp_path, "video", one), 16)
    same_tracks(sample.masks_THW, sample.graph_MT, one.masks)
    assert 16 / frame_rate(str(tmp_path / sample.match_id)) == pytest.approx(16 / 25, rel=0.01)


@pytest.mark.parametrize("layout", ["video", "image", "sa1b", "sav"])
def test_a_clip_that_one_segment_covers_has_a_pixel_of_none(tmp_path: Path, layout: str) -> None:
    one = labelled(np.ones((8, *SIZE), np.int32))
    (sample,) = loaded(tmp_path, layout, one)
    check_batch([sample])
    assert (sample.masks_THW == 0).sum() == len(sample.masks_THW)


@pytest.mark.parametrize("layout", ["video", "image", "sa1b", "sav"])
def test_more_than_255_segments_in_a_frame_do_not_wrap(tmp_path: Path, layout: str) -> None:
    one = labelled(blocks(480, 64, 128))
    assert one.masks.masks_THW.max() == 255
    assert len(one.masks.graph_MT) == 255
    (sample,) = loaded(tmp_path, layout, one)
    check_batch([sample])
    sizes = [int((sample.masks_THW[0] == i).sum()) for i in range(1, 256)]
    assert sizes[:254] == [9] * 254
    assert sizes[254] == (0 if layout in ("image", "sa1b") else 9)
    assert len(sample.graph_MT) == 128


def test_local_ids_of_more_than_255_trajectories_survive(tmp_path: Path) -> None:
    """600 trajectories, 100 at a time: numbers are those of each frame."""
    tracks_THW = blocks(100)
    for t in range(len(tracks_THW)):
        tracks_THW[t][tracks_THW[t] > 0] += 100 * (t % 6)
    one = labelled(tracks_THW)
    assert len(one.masks.graph_MT) == 600
    (sample,) = load_manifest(written(tmp_path, "video", one), 8)
    same_tracks(sample.masks_THW, sample.graph_MT, one.masks)
    (sample,) = loaded(tmp_path, "sav", labelled(tracks_THW, sampled=6))
    check_batch([sample])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (33, 2), (2, 2), (17, 47)])
@pytest.mark.parametrize("layout", ["video", "image", "sa1b", "sav"])
def test_odd_and_tiny_frames_come_out_at_the_size_of_their_masks(
    tmp_path: Path, layout: str, size: tuple[int, int]
) -> None:
    tracks_THW = np.ones((8, *size), np.int32)
    tracks_THW[:, :, size[1] // 2 :] = 2
    one = labelled(tracks_THW)
    found = LAYOUTS[layout].write(one, str(tmp_path))
    if size == (1, 1):  # its only pixel is the one of no segment
        assert found is None
        assert not list(tmp_path.iterdir())
        return
    (sample,) = loaded(tmp_path, layout, one)
    check_batch([sample])
    even_size = tuple(side + side % 2 for side in size) if layout in ("video", "sav") else size
    assert sample.masks_THW.shape[1:] == sample.frames_THWC.shape[1:3] == even_size


@pytest.mark.parametrize("layout", ["video", "image", "sa1b", "sav"])
def test_a_clip_of_one_frame_loads(tmp_path: Path, layout: str) -> None:
    (sample,) = loaded(tmp_path, layout, labelled(moving(1)), num_frames=1)
    check_batch([sample])
    assert len(sample.frames_THWC) == 1


@pytest.mark.parametrize("layout", ["video", "image", "sa1b", "sav"])
def test_clips_without_a_segment_are_left_out(tmp_path: Path, layout: str) -> None:
    assert LAYOUTS[layout].write(labelled(np.zeros((8, *SIZE), np.int32)), str(tmp_path)) is None
    assert not list(tmp_path.iterdir())


def test_a_picture_whose_segments_a_loader_would_skip_is_left_out(tmp_path: Path) -> None:
    tracks_THW = np.zeros((1, 64, 64), np.int32)
    tracks_THW[0, 3, 3:7] = 1
    assert LAYOUTS["sa1b"].write(labelled(tracks_THW), str(tmp_path)) is None
    assert LAYOUTS["image"].write(labelled(tracks_THW), str(tmp_path)) is not None


def test_six_frames_a_second_are_the_nearest_ones() -> None:
    tracks_THW = moving(16)
    assert six_a_second(labelled(tracks_THW, fps=24)).tolist() == [0, 4, 8, 12]
    assert six_a_second(labelled(tracks_THW, fps=30)).tolist() == [0, 5, 10, 15]
    assert six_a_second(labelled(tracks_THW, fps=6, sampled=6)).tolist() == list(range(16))
    assert six_a_second(labelled(tracks_THW, fps=6.3, sampled=6)).tolist() == list(range(16))  # the end is uneven
    assert six_a_second(labelled(tracks_THW, fps=1)).tolist() == list(range(16))
    assert six_a_second(labelled(tracks_THW, 4, fps=24)).tolist() == [0, 4, 8, 12]


def test_a_clip_of_hours_has_a_rate_that_files_can_hold(tmp_path: Path) -> None:
    one = labelled(moving(8), fps=1 / 7200)
    (sample,) = load_manifest(written(tmp_path, "video", one), 8)
    assert len(sample.frames_THWC) == 8


def test_pictures_are_near_to_the_frames(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:45, :61]
    one = labelled(moving(1, 45, 61))
    picture = np.stack([rows * 5, columns * 4, 255 - rows * 5], axis=2).astype(np.uint8)
    one = LabelledClip(clip=one.clip, frames_THWC=picture[None], masks=one.masks, caption="", sampled_fps=None)
    found = LAYOUTS["image"].write(one, str(tmp_path))
    assert found is not None
    shown = np.asarray(Image.open(tmp_path / found.names[0])).astype(int)
    assert np.abs(shown - picture).mean() < 2


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, footage: Path) -> TokenCache:
    """A cache of tokens and two products of masks, of two videos, one of which has changed since."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("carphone_pristine.mp4", "carphone_distorted.mp4"):
        shutil.copy(footage / name, folder)
    sections = {
        "clips": {"num_frames": 8, "height": 32, "width": 48, "stride": 60},
        "tokens": {"fake": {"tokenizer": "fake"}},
        "masks": {"objects": {"segmenter": "fake"}, "largest": {"segmenter": "fake", "max_trajectories": 1}},
    }
    with showing(log_json=False) as display:
        run_recipe(parse_recipe({"cache": str(folder / "cache"), "sources": [str(folder)], **sections}), display)
    with open(folder / "carphone_distorted.mp4", "ab") as stream:
        stream.write(b"more")
    return open_cache(str(folder / "cache"))


def test_clips_that_cannot_be_decoded_again_are_reported_and_left_out(
    tokenmill: Command, broken: TokenCache, tmp_path: Path
) -> None:
    out = exported(tokenmill, broken, "--product", "masks/largest")
    lines = [line for line in out.splitlines() if "left out (" in line]
    assert len(lines) == 2
    assert all("the file has changed since it was planned" in line for line in lines)
    assert "manifest.json: 2 clips, left out: 2 failed\n" in out
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert [failure["step"] for failure in record["failures"]] == ["decode", "decode"]
    assert (record["num_clips"], record["product"], record["num_frames"]) == (2, "masks/largest", 8)
    samples = load_manifest(f"{tmp_path}/out/manifest.json", 8)
    assert [len(one.graph_MT) for one in samples] == [1, 1]


@pytest.mark.parametrize(
    ("layout", "clips"), [("video", {"num_frames": 8}), ("sav", {"num_frames": 2}), ("image", {"num_frames": 1})]
)
def test_what_was_exported_comes_back_as_sidecars(
    tokenmill: Command, broken: TokenCache, write_recipe: Callable[..., str], tmp_path: Path, layout: str, clips: Any
) -> None:
    exported(tokenmill, broken, "--product", "objects", "--layout", layout)
    source = {"kind": "files", "path": f"{tmp_path}/out", "extensions": ["mp4", "jpg"]}
    masks = {"again": {"segmenter": "sidecars"}, "absent": {"segmenter": "sidecars", "options": {"layout": "sa1b"}}}
    recipe = write_recipe([source], clips={"height": 32, "width": 48, **clips}, tokens={}, masks=masks)
    assert tokenmill("run", recipe).code == 3  # no clip has masks in the way of sa1b
    again = open_cache(str(tmp_path / "cache"))
    rows = again.clips().to_pylist()
    assert len(rows) == 2
    for row in rows:
        (found,) = again.read_masks("again", [row["clip_id"]])
        (before,) = broken.read_masks("objects", [Path(row["uri"]).stem])
        frames = {"video": slice(None), "sav": [0, 5], "image": [3]}[layout]
        areas = [[(one == i).sum() for i in (1, 2)] for one in (found.tracks_THW, before.tracks_THW[frames])]
        if areas[0] == areas[1]:
            np.testing.assert_array_equal(found.tracks_THW, before.tracks_THW[frames])
        else:  # of the chosen frames another one may be the largest
            assert areas[0] == areas[1][::-1]
            np.testing.assert_array_equal(found.tracks_THW > 0, before.tracks_THW[frames] > 0)
    failures = again.sql("select step, reason from failures").to_pylist()
    assert {one["step"] for one in failures} == {"segment"}
    assert all("no masks beside it: sought" in one["reason"] for one in failures)
    assert len(failures) == 2


def test_paths_begin_as_asked(tokenmill: Command, broken: TokenCache, tmp_path: Path) -> None:
    exported(tokenmill, broken, "--product", "objects", "--root", "/data/clips")
    assert load_root(tmp_path) == {"/data/clips"}
    shutil.rmtree(tmp_path / "out")
    exported(tokenmill, broken, "--product", "objects", "--root", "")
    assert load_root(tmp_path) == {"."}


def load_root(folder: Path) -> set[str]:
    entries = json.loads((folder / "out/manifest.json").read_text())
    return {str(Path(entry[key]).parent) for entry in entries for key in ("video", "mask", "graph")}


def test_masks_of_another_size_than_the_frames_are_left_out(
    tokenmill: Command, broken: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = masks_of(moving(8, 30, 48), 8, 128)
    monkeypatch.setattr(TokenCache, "read_masks", lambda _self, _product, clip_ids: [small for _ in clip_ids])
    refused = tokenmill("export", "trajtok", broken.folder.url, "out", "--product", "objects")
    assert refused.code == 1
    assert (
        "left out (export): its frames are (8, 32, 48) by the cache's last recipe, its masks (8, 30, 48)" in refused.out
    )


def test_an_export_goes_to_any_store(tokenmill: Command, broken: TokenCache) -> None:
    store = fsspec.filesystem("memory")
    done = tokenmill("export", "trajtok", broken.folder.url, "memory://out", "--product", "objects", "--root", "x/")
    try:
        assert done.code == 0, done.err
        assert len(store.find("/out")) == 2 * 3 + 2
        assert json.loads(store.cat("/out/manifest.json"))[0]["video"].startswith("x/")
    finally:
        store.rm("/out", recursive=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("full", "--product", "objects"), "full: not empty (notes.txt is there): give an empty or new folder"),
        (("out",), "give --product, one of masks/largest, masks/objects"),
        (("out", "--product", "fake"), "no product masks/fake"),
        (
            ("out.mp4", "--product", "objects"),
            "out.mp4: .mp4 occurs in the path, and loaders find masks by replacing it",
        ),
        (("out", "--product", "objects", "--root", "/a.jpg/b", "--layout", "image"), "/a.jpg/b: .jpg occurs"),
        (("out", "--product", "objects", "--where", "num_valid > 99"), "no clip has"),
        (
            ("out", "--product", "objects", "--where", "uri like '%distorted%'"),
            "none of 2 clips could be exported: the",
        ),
    ],
)
def test_an_export_that_cannot_be_is_refused_in_one_line(
    tokenmill: Command, broken: TokenCache, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    refused = tokenmill("export", "trajtok", broken.folder.url, *arguments)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert message in refused.err
    assert not list((tmp_path / "out").glob("*"))
    assert not (tmp_path / "out.mp4").exists()


def test_a_cache_without_masks_is_refused(
    tokenmill: Command, write_recipe: Callable[..., str], footage: Path, tmp_path: Path
) -> None:
    assert tokenmill("run", write_recipe([footage / "carphone_pristine.mp4"])).code == 0
    refused = tokenmill("export", "trajtok", str(tmp_path / "cache"), "out")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "it has no masks to export" in refused.err


def test_several_products_at_once_are_refused(tokenmill: Command, broken: TokenCache) -> None:
    refused = tokenmill("export", "trajtok", broken.folder.url, "out", "--product", "objects", "--product", "largest")
    assert refused.code == 2
    assert "one product" in refused.err


def loaded(folder: Path, layout: str, one: LabelledClip, num_frames: int | None = None) -> list[Any]:
    """What the loader of a layout makes of a clip that was exported in it."""
    num_frames = num_frames or len(one.frames_THWC)
    if layout in ("video", "image"):
        return load_manifest(written(folder, layout, one), num_frames)
    found = LAYOUTS[layout].write(one, str(folder))
    assert found is not None
    if layout == "sav":
        path = str(folder / found.entry["video"])
        return [load_instances(path, len(read_video(path)))]
    from tokenmill.jobs.export_trajtok import _pack

    _pack(str(folder / "0.tar"), [str(folder / name) for name in found.names])
    return list(load_tars([str(folder / "0.tar")]))

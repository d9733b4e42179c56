"""Masks and trajectories flow through a job beside tokens, from one decode."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tokenmill as library
from tokenmill.pipeline.segment import FakeSegmenter
from tokenmill.schemas.clip import ClipFailure, ClipFrames
from tokenmill.schemas.errors import CacheError

from ..pipeline.sam2_kit import save
from ..pipeline.test_webdataset_output import read_back
from .conftest import Command

MASKS = {"objects": {"segmenter": "fake"}}


def data_files(cache: Path) -> dict[str, bytes]:
    folders = ("clips", "masks", "tokens", "webdataset")
    return {str(p.relative_to(cache)): p.read_bytes() for f in folders for p in cache.glob(f"{f}/**/*.*")}


@pytest.fixture
def made(tokenmill: Command, write_recipe: Callable[..., str], footage: Path, tmp_path: Path) -> Path:
    """A cache of one real video with the fake tokenizer and the fake segmenter."""
    run = tokenmill("run", write_recipe([footage / "carphone_pristine.mp4"], masks=MASKS))
    assert run.code == 0, run.err
    return tmp_path / "cache"


def test_masks_and_tokens_of_the_same_clips_come_from_one_job(made: Path) -> None:
    cache = library.open_cache(str(made))
    counts = cache.sql("""
        select product, sum(num_clips)::bigint as num_clips, sum(segment_s) as segment_s from shards
        group by product order by product""").to_pylist()
    assert [row["product"] for row in counts] == ["clips", "masks/objects", "tokens/fake"]
    assert len({row["num_clips"] for row in counts}) == 1
    assert all(row["segment_s"] > 0 for row in counts)
    clip_ids = cache.clips()["clip_id"].to_pylist()
    masks = cache.read_masks("objects", clip_ids)
    assert len(masks) == len(clip_ids) == counts[0]["num_clips"]
    assert all(one.masks_THW.shape == (8, 32, 48) for one in masks)


def test_sql_answers_what_trajectories_there_are(made: Path) -> None:
    cache = library.open_cache(str(made))
    many = cache.sql("select count(*) as n from masks where num_trajectories > 1")["n"][0].as_py()
    clips = cache.sql("select count(distinct clip_id) as n from trajectories where row = 1")["n"][0].as_py()
    assert many == clips > 0
    (row,) = cache.sql("from trajectories order by clip_id, row limit 1").to_pylist()
    (masks,) = cache.read_masks("masks/objects", [row["clip_id"]])
    areas_T = masks.areas_MT[0, : masks.num_valid]
    assert (row["area"], row["num_frames"]) == (areas_T.sum(), np.count_nonzero(areas_T))
    assert row["area_share"] == pytest.approx(areas_T.sum() / (masks.num_valid * 32 * 48))
    assert row["duration_s"] == pytest.approx(row["end_s"] - row["start_s"])
    # Clips last a third of a second: what goes on for two seconds goes on over clips.
    lasting = cache.sql("from video_trajectories where duration_s > 2 order by duration_s desc").to_pylist()
    assert lasting
    assert lasting[0]["num_clips"] > 4


def test_a_product_of_masks_is_added_to_a_cache_later_and_to_nothing_else(
    tokenmill: Command, write_recipe: Callable[..., str], footage: Path, tmp_path: Path
) -> None:
    sources = [footage / "carphone_pristine.mp4"]
    assert tokenmill("run", write_recipe(sources)).code == 0
    before = data_files(tmp_path / "cache")
    assert tokenmill("run", write_recipe(sources, masks=MASKS)).code == 0
    after = data_files(tmp_path / "cache")
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("masks/objects/") for name in set(after) - set(before))
    assert len(after) > len(before)


def test_a_job_may_make_masks_alone(
    tokenmill: Command, write_recipe: Callable[..., str], footage: Path, tmp_path: Path
) -> None:
    run = tokenmill("run", write_recipe([footage / "carphone_pristine.mp4"], masks=MASKS, tokens={}))
    assert run.code == 0, run.err
    cache = library.open_cache(str(tmp_path / "cache"))
    assert set(cache.info.products) == {"clips", "masks/objects"}
    assert tokenmill("verify", str(tmp_path / "cache"), "--deep", "--retokenize", "0.1").code == 0


def test_what_is_made_again_is_the_same(made: Path, tokenmill: Command) -> None:
    run = tokenmill("verify", str(made), "--deep", "--retokenize", "0.2")
    assert run.code == 0, run.out
    assert "masks/objects: 0 of" in run.out
    assert "0 of" in run.out.partition("tokens/fake: ")[2]


def test_masks_made_by_another_segmenter_are_another_version(
    made: Path, tokenmill: Command, write_recipe: Callable[..., str], footage: Path
) -> None:
    other = {"objects": {"segmenter": "fake", "max_trajectories": 1}}
    assert tokenmill("run", write_recipe([footage / "carphone_pristine.mp4"], masks=other)).code == 0
    cache = library.open_cache(str(made))
    assert cache.sql("select max(num_trajectories) as n from masks")["n"][0].as_py() == 1
    assert len(list((made / "products" / "masks" / "objects").glob("*.json"))) == 2
    num_files = len(list(made.glob("masks/objects/*")))
    (made / "masks" / "objects" / "orphan.parquet").write_bytes(b"left by a killed worker")
    assert tokenmill("gc", str(made), "--delete", "--old-versions", "--older-than", "0s").code == 0
    assert len(list(made.glob("masks/objects/*"))) == num_files / 2
    assert tokenmill("verify", str(made), "--deep").code == 0


class Picky(FakeSegmenter):
    """Cannot segment the clips that begin in the second second."""

    def segment(self, one: ClipFrames) -> np.ndarray | ClipFailure:
        if 1 <= one.clip.start_s < 2:
            return ClipFailure(clip_id=one.clip.clip_id, step="segment", reason="too picky")
        return super().segment(one)


def test_a_clip_that_cannot_be_segmented_fails_for_its_masks_alone(
    tokenmill: Command,
    write_recipe: Callable[..., str],
    footage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tokenmill.jobs.segmenters.FakeSegmenter", Picky)
    run = tokenmill("run", write_recipe([footage / "carphone_pristine.mp4"], masks=MASKS))
    assert run.code == 3
    assert "too picky" in run.out
    cache = library.open_cache(str(tmp_path / "cache"))
    failed = cache.sql("select product, step, clip_id from failures").to_pylist()
    assert {(row["product"], row["step"]) for row in failed} == {("masks/objects", "segment")}
    rows = cache.sql("select product, count(*) as n from locations group by all").to_pylist()
    counts = {row["product"]: row["n"] for row in rows}
    assert counts["masks/objects"] == counts["tokens/fake"] - len(failed)
    with pytest.raises(CacheError, match="has no clip"):
        cache.read_masks("objects", [failed[0]["clip_id"]])
    assert tokenmill("verify", str(tmp_path / "cache"), "--deep").code == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    retried = tokenmill("retry", str(tmp_path / "cache"))
    assert retried.code == 0, retried.err
    assert library.open_cache(str(tmp_path / "cache")).sql("from failures").num_rows == 0


def test_tars_hold_clips_whole_and_name_those_that_cannot_be_segmented(
    tokenmill: Command,
    write_recipe: Callable[..., str],
    footage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tokenmill.jobs.segmenters.FakeSegmenter", Picky)
    sources = [footage / "carphone_pristine.mp4"]
    run = tokenmill("run", write_recipe(sources, masks=MASKS, shards={"frames": 64, "format": "webdataset"}))
    assert run.code == 3
    cache = library.open_cache(str(tmp_path / "cache"))
    failed = set(cache.sql("select clip_id from failures where product = 'webdataset'")["clip_id"].to_pylist())
    samples = read_back(*sorted((tmp_path / "cache").glob("webdataset/*.tar")))
    assert failed
    assert {one["__key__"] for one in samples} == set(cache.clips()["clip_id"].to_pylist()) - failed
    assert all("objects.masks.npz" in one for one in samples)
    assert tokenmill("verify", str(tmp_path / "cache"), "--deep").code == 0


def test_masks_that_cannot_be_made_again_are_a_problem(
    made: Path, tokenmill: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent(FakeSegmenter):
        def segment(self, one: ClipFrames) -> np.ndarray | ClipFailure:
            return ClipFailure(clip_id=one.clip.clip_id, step="segment", reason="gone")

    monkeypatch.setattr("tokenmill.jobs.segmenters.FakeSegmenter", Absent)
    run = tokenmill("verify", str(made), "--retokenize", "0.1")
    assert run.code == 1
    assert "masks/objects cannot be made again: gone" in run.out


def test_what_masks_do_not_have_is_refused_in_one_line(
    tokenmill: Command, write_recipe: Callable[..., str], footage: Path, tmp_path: Path
) -> None:
    run = tokenmill("run", write_recipe([footage / "carphone_pristine.mp4"], masks=MASKS, tokens={}))
    assert run.code == 0, run.err
    cache = library.open_cache("cache")
    clip_id = cache.clips()["clip_id"][0].as_py()
    for arguments, message in (
        (("verify", "cache", "--quality", "1"), "no tokens that decode to frames: compare masks by --truth NAME"),
        (("verify", "cache", "--quality", "1", "--truth", "objects"), "nothing to compare with masks/objects"),
        (("verify", "cache", "--truth", "objects"), "it is measured with --quality P"),
        (("reconstruct", "cache", clip_id, "x.mp4"), "it has no tokens: its products are"),
        (("reconstruct", "cache", clip_id, "x.mp4", "--masks", "a", "--product", "b"), "give one of both"),
        (("export", "webdataset", "cache", "out"), "it has no tokens as Parquet to export"),
        (("export", "webdataset", "cache", "out", "--layout", "sav"), "it is of exports for trajtok"),
        (("export", "trajtok", "cache", "out", "--clips-per-tar", "3"), "sa1b alone has tars"),
    ):
        refused = tokenmill(*arguments)
        assert refused.code in (1, 2)
        assert message in re.sub(r"[\s│╭╮╰╯─]+", " ", refused.err), refused.err
    with pytest.raises(CacheError, match="it has no tokens"):
        cache.loader("dct", 4)
    for batch in cache.loader("objects", 4):
        wanted = [one.masks_THW for one in cache.read_masks("objects", batch["clip_id"])]
        assert np.array_equal(batch["objects"].numpy(), np.stack(wanted))


def test_tars_hold_masks_and_tokens_of_a_clip_side_by_side(
    tokenmill: Command, write_recipe: Callable[..., str], footage: Path, tmp_path: Path
) -> None:
    sources = [footage / "carphone_pristine.mp4"]
    assert tokenmill("run", write_recipe(sources, masks=MASKS, shards={"format": "both"})).code == 0
    cache = library.open_cache(str(tmp_path / "cache"))
    (tar,) = (tmp_path / "cache").glob("webdataset/*.tar")
    samples = read_back(tar)
    assert len(samples) == cache.clips().num_rows
    for sample in samples[:3]:
        (masks,) = cache.read_masks("objects", [sample["__key__"]])
        np.testing.assert_array_equal(sample["objects.masks.npz"]["masks"], masks.masks_THW)
        np.testing.assert_array_equal(sample["objects.masks.npz"]["graph"], masks.graph_MT)
        assert sample["json"]["products"]["objects.masks"]["segmenter"]["name"] == "fake"
    again = tmp_path / "again"
    assert tokenmill("run", write_recipe(sources, cache=str(again), masks=MASKS, shards={"format": "both"})).code == 0
    assert next(again.glob("webdataset/*.tar")).read_bytes() == tar.read_bytes()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"segmenter": "slic"}, r"masks.objects: unknown segmenter 'slic' \(did you mean 'slic3d'\?\); |accepted are"),
        (
            {"segmenter": "fake", "weights": "a.pth"},
            "masks.objects: fake has no weights, found 'a.pth': remove weights",
        ),
        ({"segmenter": "fake", "dtype": "float16"}, "masks.objects: fake computes on the CPU without networks"),
        ({"segmenter": "fake", "options": {"a": 1}}, "masks.objects: fake has no options, found a: remove options"),
        (
            {"segmenter": "slic3d", "options": {"sied": 1}},
            r"masks.objects: options.sied: unknown key \(did you mean 'side'\?\)",
        ),
    ],
)
def test_a_segmenter_that_cannot_be_is_refused_before_any_work(
    section: dict, message: str, tokenmill: Command, write_recipe: Callable[..., str], footage: Path, tmp_path: Path
) -> None:
    run = tokenmill("run", write_recipe([footage], masks={"objects": section}))
    assert run.code == 2
    assert re.search(message, run.err), run.err
    assert not (tmp_path / "cache").exists()


def test_a_job_makes_masks_by_sam2_and_by_slic3d_beside_tokens(
    tokenmill: Command, write_recipe: Callable[..., str], footage: Path, tmp_path: Path
) -> None:
    weights = save(tmp_path / "sam2")
    options = {"points_per_side": 4, "predicted_iou": 0.0, "stability": 0.0, "max_objects": 3}
    masks = {
        "tracked": {"segmenter": "sam2", "weights": weights, "options": options},
        "regions": {"segmenter": "slic3d"},
    }
    sources, clips = [footage / "carphone_pristine.mp4"], {"num_frames": 4, "height": 32, "width": 48, "fps": 2}
    run = tokenmill("run", write_recipe(sources, clips=clips, masks=masks))
    assert run.code == 0, run.err
    cache = library.open_cache(str(tmp_path / "cache"))
    counts = cache.sql("select product, count(*) as n from masks group by all order by product").to_pylist()
    assert [row["product"] for row in counts] == ["regions", "tracked"]
    assert len({row["n"] for row in counts}) == 1
    assert cache.info.products["masks/tracked"].segmenter["options"]["max_objects"] == 3
    run = tokenmill("verify", str(tmp_path / "cache"), "--retokenize", "0.5", "--quality", "1", "--truth", "regions")
    assert run.code == 0, run.out
    assert "masks/tracked: 0 of" in run.out
    assert "against masks/regions" in run.out

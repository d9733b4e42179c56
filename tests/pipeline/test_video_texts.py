"""Captions and metadata of a shard's videos, out of the plan."""

from pathlib import Path

import pyarrow as pa
import pytest

from tokenmill.pipeline.plan import PlanTables
from tokenmill.pipeline.plan_file import Plan, write_plan
from tokenmill.pipeline.storage import Folder
from tokenmill.pipeline.video_texts import texts_of
from tokenmill.schemas.clip import Clip, Video
from tokenmill.schemas.shard import VideoText
from tokenmill.schemas.tables import PLAN_SCHEMA, STAMP_SCHEMA, VIDEO_SCHEMA


def row_of(video_id: str, caption: str | None, metadata: str | None, status: str = "planned") -> dict[str, object]:
    facts = {"video_id": video_id, "uri": f"/{video_id}.mp4", "num_clips": 1, "num_dropped_frames": 0}
    return {**facts, "caption": caption, "metadata": metadata, "status": status}


def clip_of(video_id: str) -> Clip:
    video = Video(uri=f"/{video_id}.mp4", size_bytes=-1, digest=video_id)
    return Clip(clip_id=video_id * 4, video=video, start_s=0, end_s=1, frame_pts_s=(0.0,))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


@pytest.fixture
def plan(folder: Folder) -> Plan:
    rows = [
        row_of("a", "a cat", None),
        row_of("b", None, '{"n": 1}'),
        row_of("c", None, None),
        row_of("d", "a dog", '{"n": 2}'),
        row_of("d", "of a copy", None, "duplicate"),
    ]
    tables = PlanTables(
        videos=pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA),
        clips=PLAN_SCHEMA.empty_table(),
        stamps=STAMP_SCHEMA.empty_table(),
    )
    plan = write_plan(folder, tables)
    assert plan is not None
    return plan


def test_texts_are_those_of_the_videos_asked(folder: Folder, plan: Plan) -> None:
    clips = [clip_of(video_id) for video_id in "aacb"]
    assert texts_of(folder, plan, clips) == {"a": VideoText(caption="a cat"), "b": VideoText(metadata='{"n": 1}')}


def test_a_planned_video_does_not_take_the_text_of_its_copy(folder: Folder, plan: Plan) -> None:
    assert texts_of(folder, plan, [clip_of("d")]) == {"d": VideoText(caption="a dog", metadata='{"n": 2}')}


def test_the_videos_of_a_plan_are_read_once(folder: Folder, plan: Plan) -> None:
    assert texts_of(folder, plan, [clip_of("c")]) == {}
    folder.remove(plan.videos_name)
    assert texts_of(folder, plan, [clip_of("a")]) == {"a": VideoText(caption="a cat")}

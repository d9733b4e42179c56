"""Labels of a real cache: from files, to files, and by a judge that sees frames of the sources."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenmill.jobs import labels as labels_job
from tokenmill.jobs.labels import candidates_of, export_labels, import_labels, label_videos, make_labels
from tokenmill.jobs.opening import open_cache
from tokenmill.pipeline.appended import read_table
from tokenmill.pipeline.judge import VERDICTS, FakeJudge, QuestionAnswer
from tokenmill.pipeline.labels import LABELS, POLICIES
from tokenmill.pipeline.render import write_video
from tokenmill.schemas.errors import CacheError, RecipeError, UnclearError
from tokenmill.schemas.tables import LABEL_SCHEMA, POLICY_SCHEMA, VERDICT_SCHEMA

from ..conftest import run_ffmpeg
from .conftest import Command


def planted(path: Path, *spans: tuple[str, int]) -> None:
    """A video of one colour after the other, each for so many frames, at 8 frames a second."""
    inputs = " ".join(f"-f lavfi -i color={colour}:size=48x32:rate=8:duration={n / 8}" for colour, n in spans)
    joined = "".join(f"[{i}]" for i in range(len(spans)))
    run_ffmpeg(f"{inputs} -filter_complex {joined}concat=n={len(spans)} -c:v libx264 -qp 0 -g 8 {path}")


@pytest.fixture
def cache(tokenmill: Callable[..., Any], write_recipe: Callable[..., str], tmp_path: Path) -> str:
    """A cache of two videos, of 3 s and 2 s, with 2 candidate frames a second; a red one is in the first alone."""
    (tmp_path / "in").mkdir()
    planted(tmp_path / "in/red.mp4", ("gray", 8), ("red", 4), ("gray", 12))
    planted(tmp_path / "in/blue.mp4", ("blue", 16))
    recipe = write_recipe([tmp_path / "in"], frames={"fps": 2})
    assert tokenmill("run", recipe).code == 0
    return str(tmp_path / "cache")


def test_a_file_of_labels_and_policies_survives_import_and_export(
    cache: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = [
        {"video": "red.mp4", "query": "who\u2028sings?", "times_s": [0.1, 2]},
        {"query": "what is it about?", "policy": "global"},
        {"video": "green.mp4", "query": "who?", "times_s": [0.1]},
        {"query": "what?", "policy": "none"},
    ]
    lines = [json.dumps(one, ensure_ascii=False) for one in found]
    (tmp_path / "l.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    assert import_labels(cache, "l.jsonl", "people") is False
    printed = capfd.readouterr().out
    assert "l.jsonl, line 3: no video of the cache is called 'green.mp4'" in printed
    assert "l.jsonl, line 4: policy: found 'none'" in printed
    folder = open_cache(cache).folder
    rows = read_table(folder, LABELS, LABEL_SCHEMA)
    assert (rows.num_rows, sum(rows["label"].to_pylist())) == (6, 2)
    assert read_table(folder, POLICIES, POLICY_SCHEMA).num_rows == 1
    export_labels(cache, "e.jsonl")
    assert "1 lines of labels of frames, 1 policies" in capfd.readouterr().out
    labels = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text(encoding="utf-8").split("\n")[:2]]
    assert (labels[0]["query"], labels[0]["times_s"]) == ("who\u2028sings?", [0.0, 2.0])
    assert import_labels(cache, "e.jsonl", "nobody") is True
    assert read_table(folder, LABELS, LABEL_SCHEMA) == rows
    export_labels(cache, "p.jsonl", "people", "policies")
    assert [json.loads(line)["policy"] for line in (tmp_path / "p.jsonl").read_text().splitlines()] == ["global"]


def test_a_file_that_is_no_text_is_refused(cache: str, tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_bytes(b'"\xff"')
    with pytest.raises(RecipeError, match=r"l\.jsonl: not UTF-8"):
        import_labels(cache, "l.jsonl", "people")


@pytest.mark.parametrize("where", ["uri like '%red.mp4'", "end_s > 2.5 and uri like '%.mp4'"])
def test_a_judge_labels_frames_of_the_sources(
    cache: str, tokenmill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(labels_job, "OpenAiJudge", lambda url, model: FakeJudge())
    asked = ("--judge", "http://localhost", "--model", "model", "--where", where, "--policies")
    ran = tokenmill("labels", "make", cache, *asked)
    assert ran.code == 0
    assert "1 videos: 1 questions kept, 1 rejected" in ran.out
    opened = open_cache(cache)
    assert read_table(opened.folder, POLICIES, POLICY_SCHEMA)["policy"].to_pylist() == ["global"]  # red without detail
    rows = read_table(opened.folder, LABELS, LABEL_SCHEMA).to_pylist()
    frames = opened.sql("select clip_id, frame, pts_s from frames").to_pylist()
    times_s = {(one["clip_id"], one["frame"]): one["pts_s"] for one in frames}
    assert {times_s[row["clip_id"], row["frame"]]: row["label"] for row in rows} == {
        0.0: 0,
        0.5: 0,
        1.0: 1,
        1.5: 0,
        2.0: 0,
        2.5: 0,
    }


def test_a_video_that_cannot_be_judged_costs_no_other(cache: str) -> None:
    class Unclear(FakeJudge):
        def ask(self, description: str) -> list:
            if "blue" in description:
                raise UnclearError("it said boo")
            return super().ask(description)

    made = {Path(one.uri).name: one for one in label_videos(open_cache(cache), Unclear(), "true", None)}
    assert made["blue.mp4"].problem == "it said boo"
    assert made["red.mp4"].fates == {"kept": 1, "not needed": 1}
    Path(made["blue.mp4"].uri).unlink()
    Path(made["red.mp4"].uri).unlink()
    again = {Path(one.uri).name: one for one in label_videos(open_cache(cache), FakeJudge(), "true", None)}
    assert "blue.mp4: the source cannot be read again" in again["blue.mp4"].problem
    assert again["red.mp4"] == made["red.mp4"]  # all of it is known
    assert len(list(label_videos(open_cache(cache), FakeJudge(), "true", 1))) == 1


def test_an_interrupt_keeps_what_was_said(cache: str, capfd: pytest.CaptureFixture[str]) -> None:
    class Interrupted(FakeJudge):
        def ask(self, description: str) -> list:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        make_labels(cache, Interrupted())
    assert "the same command resumes" in capfd.readouterr().err
    said = read_table(open_cache(cache).folder, VERDICTS, VERDICT_SCHEMA)
    assert said["step"].to_pylist() == ["describe"]


class DetailJudge(FakeJudge):
    """Asks one question, which the answer to is yes where fine stripes are seen."""

    name = "detail"

    def __init__(self, question: str) -> None:
        self.question = question

    def ask(self, description: str) -> list[QuestionAnswer]:
        return [QuestionAnswer(question=self.question, answer="yes")]

    def answer(self, frames_NHWC: np.ndarray, question: str) -> str:
        apart_N = np.abs(np.diff(frames_NHWC.astype(float), axis=1)).mean((1, 2, 3))
        return "yes" if (apart_N > 10).any() else "no"


@pytest.mark.parametrize(
    ("encoders", "question", "step", "policy"),
    [
        ({}, "any blue stripes ?", "fragment/1", "fragment"),  # by the frame that was labelled
        ({"colours": {"encoder": "fake"}}, "any red stripes ?", "fragment/1", "fragment"),  # and by what the text names
        ({"colours": {"encoder": "fake"}}, "any blue stripes ?", "fragment/0", "global"),
    ],
)
def test_policies_are_made_by_frames_that_the_encoder_of_texts_finds_relevant(
    tokenmill: Callable[..., Any], write_recipe: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    encoders: dict[str, Any], question: str, step: str, policy: str,
) -> None:  # fmt: skip
    frames_THWC = np.full((24, 32, 48, 3), 128, np.uint8)
    frames_THWC[8:12, ::2], frames_THWC[8:12, 1::2] = (255, 0, 0), (90, 0, 0)
    write_video(str(tmp_path / "stripes.mp4"), frames_THWC, 8)
    recipe = write_recipe([tmp_path / "stripes.mp4"], frames={"fps": 2, "encoders": encoders})
    assert tokenmill("run", recipe).code == 0
    make_labels(str(tmp_path / "cache"), DetailJudge(question), policies=True)
    assert "1 questions kept" in capfd.readouterr().out
    cache = open_cache(str(tmp_path / "cache"))
    rows = cache.sql("from policies").to_pylist()
    assert [(row["source"], row["policy"]) for row in rows] == [("judge:detail", policy)]
    (clip_ids, frames), *_ = [
        (row["clip_ids"], row["frames"]) for row in cache.sql("from verdicts").to_pylist() if row["step"] == step
    ]
    (first_s,) = cache.sql("select pts_s from frames where clip_id = ? and frame = ?", [clip_ids[0], frames[0]])[
        "pts_s"
    ]
    assert first_s.as_py() == (1.0 if step == "fragment/1" else 0.0)


def test_videos_that_cannot_be_chosen_are_told(
    cache: str, tokenmill: Callable[..., Any], write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(CacheError, match="no clip where uri = 'green'"):
        list(label_videos(open_cache(cache), FakeJudge(), "uri = 'green'", None))
    bare = tmp_path / "bare"
    assert tokenmill("run", write_recipe([tmp_path / "in"], cache=str(bare))).code == 0
    said = "bare: it has no candidate frames: add `frames: {}` to its recipe and run it again"
    with pytest.raises(CacheError, match=said):
        list(label_videos(open_cache(str(bare)), FakeJudge(), "true", None))
    assert tokenmill("run", write_recipe([tmp_path / "in"], cache=str(bare), frames={})).code == 0
    assert len(list(label_videos(open_cache(str(bare)), FakeJudge(), "true", 1))) == 1


def test_candidates_are_different_frames_at_even_distances(
    tokenmill: Callable[..., Any], write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    planted(tmp_path / "video.mp4", ("gray", 12), ("red", 12))
    clips = {"num_frames": 8, "stride": 4, "height": 32, "width": 48}
    assert tokenmill("run", write_recipe([tmp_path / "video.mp4"], clips=clips, frames={"fps": "all"})).code == 0
    cache = open_cache(str(tmp_path / "cache"))
    (video_id,) = cache.sql("select video_id from videos")["video_id"].to_pylist()
    frames = cache.sql("select clip_id, frame, frame_number from frames").to_pylist()
    assert len(frames) > 24
    numbers = {(one["clip_id"], one["frame"]): one["frame_number"] for one in frames}
    candidates = candidates_of(cache, video_id)
    assert [numbers[place] for place in candidates.places] == list(range(24))
    is_red = candidates.frames_NHWC[:, 16, 24, 1] < 64
    assert is_red.tolist() == [False] * 12 + [True] * 12
    assert [numbers[place] for place in candidates_of(cache, video_id, 4).places] == [3, 9, 15, 21]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("make", "cache", "--judge", "http://x"), "found --model lacking: give --judge URL and --model NAME"),
        (("make", "cache", "f", "--judge", "http://x", "--model", "m"), "found a file, --source or --kind"),
        (
            ("import", "cache", "f", "--judge", "http://x", "--limit", "3"),
            "--judge, --limit found, which are of labels",
        ),
        (("export", "cache", "f", "--where", "false"), "--where found, which are of labels make: leave them out"),
        (("import", "cache"), "no FILE of JSON lines was given"),
    ],
)
def test_options_of_another_action_are_refused(tokenmill: Command, arguments: tuple[str, ...], message: str) -> None:
    run = tokenmill("labels", *arguments)
    assert run.code == 2
    assert message in run.err

"""A judge's labels are the frames that its answers need, and nothing that it said is asked for again."""

import itertools
import json
from collections.abc import Sequence

import numpy as np
import pytest

from tokenmill.pipeline.appended import read_table
from tokenmill.pipeline.judge import FakeJudge, Judge, QuestionAnswer
from tokenmill.pipeline.label_making import (
    VERDICTS,
    Candidates,
    Verdicts,
    fewest,
    label_question,
    label_video,
    probe_policies,
)
from tokenmill.pipeline.labels import LABELS
from tokenmill.pipeline.queries import QUERIES
from tokenmill.pipeline.relevance import COLOURS
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.errors import RecipeError
from tokenmill.schemas.queries import query_id_of
from tokenmill.schemas.tables import LABEL_SCHEMA, QUERY_SCHEMA, VERDICT_SCHEMA

_numbers = itertools.count()
NUM_FRAMES = 12


class CountingJudge(FakeJudge):
    """Remembers what it was asked, and ends with `fault` where it is asked for the `ends_at`th time."""

    def __init__(self, ends_at: int | None = None, fault: type[BaseException] = ConnectionError) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.ends_at, self.fault = ends_at, fault

    def _note(self, *what: object) -> None:
        if len(self.asked) + 1 == self.ends_at:
            raise self.fault("gone")
        self.asked.append(what)

    def describe(self, frames_NHWC: np.ndarray) -> str:
        self._note("describe", frames_NHWC.tobytes())
        return super().describe(frames_NHWC)

    def ask(self, description: str) -> list[QuestionAnswer]:
        self._note("ask", description)
        return super().ask(description)

    def answer(self, frames_NHWC: np.ndarray, question: str) -> str:
        self._note("answer", question, frames_NHWC.tobytes())
        return super().answer(frames_NHWC, question)


def video(**colours: Sequence[int]) -> Candidates:
    """Frames in the colours given, the others grey, each with a mark of its own."""
    frames_NHWC = np.full((NUM_FRAMES, 4, 4, 3), 128, np.uint8)
    for colour, places in colours.items():
        frames_NHWC[list(places)] = COLOURS[colour]
    frames_NHWC[:, 0, 0, 0] = np.arange(NUM_FRAMES)
    places = tuple((f"clip{i // 4}", 3 * (i % 4)) for i in range(NUM_FRAMES))
    return Candidates(video_id="v" * 64, places=places, read=lambda: frames_NHWC)


def unread(candidates: Candidates) -> Candidates:
    def read() -> np.ndarray:
        raise AssertionError("read once more")

    return Candidates(video_id=candidates.video_id, places=candidates.places, read=read)


@pytest.fixture
def folder() -> Folder:
    return Folder(f"memory:///judged-{next(_numbers)}")


def labelled(folder: Folder, question: str) -> list[int]:
    """The frames with label 1, of a question that has labels of all frames."""
    rows = read_table(folder, LABELS, LABEL_SCHEMA).to_pylist()
    rows = [row for row in rows if row["query_id"] == query_id_of(question)]
    assert {row["source"] for row in rows} == {"judge:fake"}
    assert [(row["clip_id"], row["frame"]) for row in rows] == list(video().places)
    return [i for i, row in enumerate(rows) if row["label"] == 1]


def verdicts_in(folder: Folder) -> list[dict]:
    return read_table(folder, VERDICTS, VERDICT_SCHEMA).to_pylist()


@pytest.mark.parametrize("judge", [FakeJudge(), CountingJudge()])
def test_judges_keep_the_protocol(judge: Judge) -> None:
    assert isinstance(judge, Judge)


@pytest.mark.parametrize("planted", [[0], [11], [7]])
@pytest.mark.parametrize("relevance_N", [None, np.linspace(1, 0, NUM_FRAMES), np.linspace(0, 1, NUM_FRAMES)])
def test_exactly_the_planted_frames_are_labelled(
    folder: Folder, planted: list[int], relevance_N: np.ndarray | None
) -> None:
    verdicts = Verdicts(folder, CountingJudge())
    question = QuestionAnswer(question="Is anything red, and blue?", answer="yes")
    outcome = label_question(verdicts, video(red=planted, blue=[4]), question, relevance_N)
    assert (outcome.fate, outcome.needed) == ("kept", tuple(sorted([*planted, 4])))
    assert labelled(folder, question.question) == sorted([*planted, 4])
    assert outcome.query_id == query_id_of(question.question)


@pytest.mark.parametrize(("planted", "most"), [(0, 6), (63, 12), (21, 12)])
def test_few_questions_find_one_frame_of_many(planted: int, most: int) -> None:
    shown: list[Sequence[int]] = []

    def suffices(frames: Sequence[int]) -> bool:
        shown.append(frames)
        return planted in frames

    assert fewest(range(64), suffices) == [planted]
    assert len(shown) <= most


def test_no_frame_can_be_left_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        num_frames = int(rng.integers(1, 30))
        ways = [set(rng.integers(0, num_frames, rng.integers(1, 5)).tolist()) for _ in range(2)]

        def suffices(frames: Sequence[int], ways: list[set[int]] = ways) -> bool:
            return any(way.issubset(frames) for way in ways)

        found = fewest(rng.permutation(num_frames).tolist(), suffices)
        assert suffices(found)
        assert not any(suffices([i for i in found if i != left_out]) for left_out in found)
        assert found == sorted(found)


def test_the_judge_asks_about_what_it_sees(folder: Folder) -> None:
    outcomes = label_video(Verdicts(folder, CountingJudge()), video(red=[2], blue=[9]))
    assert {one.question: (one.fate, one.needed) for one in outcomes} == {
        "Is anything grey?": ("not needed", ()),
        "Is anything red?": ("kept", (2,)),
        "Is anything blue?": ("kept", (9,)),
    }
    assert labelled(folder, "Is anything blue?") == [9]
    ids = set(read_table(folder, LABELS, LABEL_SCHEMA)["query_id"].to_pylist())
    assert ids == {query_id_of("Is anything red?"), query_id_of("Is anything blue?")}


def test_relevance_decides_which_frames_are_left_out_first(folder: Folder) -> None:
    asked: list[str] = []

    def relevance_of(question: str) -> np.ndarray:
        asked.append(question)
        return np.eye(NUM_FRAMES)[2]

    judge = CountingJudge()
    label_video(Verdicts(folder, judge), video(red=[2]), relevance_of)
    assert asked == ["Is anything grey?", "Is anything red?"]
    about_red = [one for one in judge.asked if one[0] == "answer" and "red" in str(one[1])]
    assert len(about_red) <= 6  # all, three halves, and all others


@pytest.mark.parametrize(
    ("question", "answer", "colours", "fate"),
    [
        ("Is anything red?", "yes", {"red": [2, 8]}, "not needed"),  # either is enough
        ("Is anything red?", "yes", {"blue": [2]}, "inconsistent"),
        ("Is anything red?", "no", {"red": [2]}, "inconsistent"),
        ("Is anything blue?", "no", {"red": [2]}, "not needed"),
    ],
)
def test_questions_that_need_no_frames_are_rejected_and_never_labelled(
    folder: Folder, question: str, answer: str, colours: dict[str, list[int]], fate: str
) -> None:
    verdicts = Verdicts(folder, FakeJudge())
    outcome = label_question(verdicts, video(**colours), QuestionAnswer(question=question, answer=answer))
    assert (outcome.fate, outcome.needed) == (fate, ())
    assert read_table(folder, LABELS, LABEL_SCHEMA).num_rows == 0
    assert verdicts_in(folder)
    assert read_table(folder, QUERIES, QUERY_SCHEMA)["text"].to_pylist() == [question]


def test_a_video_of_one_frame_is_judged_against_none(folder: Folder) -> None:
    judge = CountingJudge()
    red = np.full((1, 4, 4, 3), COLOURS["red"], np.uint8)
    candidates = Candidates(video_id="v", places=(("clip", 0),), read=lambda: red)
    outcome = label_question(Verdicts(folder, judge), candidates, QuestionAnswer(question="red?", answer="Yes"))
    assert (outcome.fate, outcome.needed) == ("kept", (0,))
    assert [len(row["frames"]) for row in verdicts_in(folder)] == [1, 0]


def test_every_verdict_is_stored(folder: Folder) -> None:
    judge = CountingJudge()
    candidates = video(red=[2])
    label_video(Verdicts(folder, judge), candidates)
    rows = verdicts_in(folder)
    assert len(rows) == len(judge.asked) == len(set(judge.asked))
    assert [row["step"] for row in rows[:3]] == ["describe", "ask", "consistent"]
    assert {row["step"] for row in rows[3:]} == {"consistent", "sufficient", "necessary"}
    assert {row["judge"] for row in rows} == {"fake"}
    assert rows[0]["said"] == "grey red"
    assert [one["question"] for one in json.loads(rows[1]["said"])] == ["Is anything grey?", "Is anything red?"]
    for row in rows[2:]:
        shown = list(zip(row["clip_ids"], row["frames"], strict=True))
        assert shown == sorted(shown, key=candidates.places.index)
        is_there = query_id_of("Is anything grey?") == row["query_id"] or candidates.places[2] in shown
        assert json.loads(row["said"]) == {"wanted": "yes", "answer": "yes" if is_there else "no"}
        assert row["verdict"] is is_there


@pytest.mark.parametrize("fault", [ConnectionError, KeyboardInterrupt])
def test_what_was_said_before_a_fault_is_not_asked_again(folder: Folder, fault: type[BaseException]) -> None:
    whole = CountingJudge()
    label_video(Verdicts(Folder(f"memory:///judged-{next(_numbers)}"), whole), video(red=[2], blue=[9]))
    asked: list[tuple[object, ...]] = []
    for ends_at in (1, 2, 4, 5, 3, 7):
        judge = CountingJudge(ends_at, fault)
        with pytest.raises(fault):
            label_video(Verdicts(folder, judge), video(red=[2], blue=[9]))
        assert len(verdicts_in(folder)) == len(asked) + len(judge.asked)
        asked += judge.asked
    last = CountingJudge()
    outcomes = label_video(Verdicts(folder, last), video(red=[2], blue=[9]))
    assert asked + last.asked == whole.asked
    again = CountingJudge(ends_at=1)
    assert label_video(Verdicts(folder, again), unread(video())) == outcomes
    assert read_table(folder, LABELS, LABEL_SCHEMA).num_rows == 2 * NUM_FRAMES


def test_two_at_once_store_every_verdict_once(folder: Folder) -> None:
    class Meanwhile(CountingJudge):
        def describe(self, frames_NHWC: np.ndarray) -> str:
            label_video(Verdicts(folder, CountingJudge()), video(red=[2]))
            return "something else"

    judge = Meanwhile()
    outcomes = label_video(Verdicts(folder, judge), video(red=[2]))
    assert [one.fate for one in outcomes] == ["not needed", "kept"]
    assert judge.asked == []  # all is known, once its own description has come too late
    said = [row["said"] for row in verdicts_in(folder) if row["step"] == "describe"]
    assert said == ["grey red"]


def test_other_judges_answers_and_frames_are_asked_for_anew(folder: Folder) -> None:
    class Another(CountingJudge):
        name = "another"

    red = QuestionAnswer(question="Is anything red?", answer="yes")
    label_question(Verdicts(folder, FakeJudge()), video(red=[2]), red)
    judge = Another()
    label_question(Verdicts(folder, judge), video(red=[2]), red)
    assert len(judge.asked) == len([row for row in verdicts_in(folder) if row["judge"] == "fake"])
    sources = read_table(folder, LABELS, LABEL_SCHEMA, ["source"])["source"].to_pylist()
    assert set(sources) == {"judge:fake", "judge:another"}
    judge = CountingJudge()
    outcome = label_question(
        Verdicts(folder, judge), video(red=[2]), QuestionAnswer(question=red.question, answer="no")
    )
    assert (outcome.fate, len(judge.asked)) == ("inconsistent", 1)


POLICIES = [("yes", "no", "global"), ("no", "yes", "fragment"), ("yes", "yes", "global"), ("no", "no", "global")]


@pytest.mark.parametrize(("under_global", "under_fragment", "policy"), POLICIES)
def test_the_policy_that_alone_is_right_is_the_label(
    folder: Folder, under_global: str, under_fragment: str, policy: str
) -> None:
    asked: list[str] = []

    def answer_under(forced: str) -> str:
        asked.append(forced)
        return {"global": under_global, "fragment": under_fragment}[forced]

    question = QuestionAnswer(question="Is anything red?", answer="yes")
    for _ in range(2):
        rows = probe_policies(Verdicts(folder, FakeJudge()), "v", question, "model", answer_under)
    assert rows.to_pylist() == [
        {
            "query_id": query_id_of(question.question),
            "source": "judge:fake",
            "video_id": "v",
            "policy": policy,
            "p_fragment": float(policy == "fragment"),
        }
    ]
    assert asked == ["global", "fragment"]
    assert [row["step"] for row in verdicts_in(folder)] == ["global/model", "fragment/model"]
    probe_policies(Verdicts(folder, FakeJudge()), "v", question, "another model", answer_under)
    assert len(asked) == 4


def test_values_that_cannot_be_are_refused(folder: Folder) -> None:
    with pytest.raises(RecipeError, match="a question and its answer are wanted: found 'red\\?' and ' '"):
        QuestionAnswer(question="red?", answer=" ")
    with pytest.raises(ValueError, match="different candidate frames are wanted"):
        Candidates(video_id="v", places=(("clip", 0), ("clip", 0)), read=lambda: np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="different candidate frames are wanted"):
        Candidates(video_id="v", places=(), read=lambda: np.zeros((0, 4, 4, 3), np.uint8))
    two = Candidates(video_id="v", places=(("clip", 0),), read=lambda: np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"1 frames \(N,H,W,3\) uint8 are wanted"):
        label_video(Verdicts(folder, FakeJudge()), two)
    question = QuestionAnswer(question="red?", answer="yes")
    with pytest.raises(ValueError, match="one relevance for each of 12 frames is wanted, found 3"):
        label_question(Verdicts(folder, FakeJudge()), video(), question, np.zeros(3))

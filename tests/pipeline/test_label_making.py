"""A judge's labels are the frames that its answers need, and nothing that it said is asked for again."""

import itertools
import json
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import pytest

from tokenmill.pipeline.appended import read_table
from tokenmill.pipeline.judge import VERDICTS, Candidates, FakeJudge, Judge, QuestionAnswer, Verdicts
from tokenmill.pipeline.label_making import Labeller, Outcome, RelevanceOf, fewest, with_less_detail
from tokenmill.pipeline.labels import LABELS, POLICIES
from tokenmill.pipeline.queries import QUERIES
from tokenmill.pipeline.relevance import COLOURS
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.errors import RecipeError
from tokenmill.schemas.queries import query_id_of
from tokenmill.schemas.tables import LABEL_SCHEMA, POLICY_SCHEMA, QUERY_SCHEMA, VERDICT_SCHEMA

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


def label_video(verdicts: Verdicts, candidates: Candidates, relevance_of: RelevanceOf | None = None) -> list[Outcome]:
    return Labeller(verdicts, relevance_of).label_video(candidates)


def label_question(verdicts: Verdicts, candidates: Candidates, question: QuestionAnswer) -> Outcome:
    (outcome,) = Labeller(verdicts).label_questions(candidates, [question])
    return outcome


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
    relevance_of = None if relevance_N is None else lambda candidates, questions: relevance_N[None]
    labeller = Labeller(Verdicts(folder, CountingJudge()), relevance_of)
    question = QuestionAnswer(question="Is anything red, and blue?", answer="yes")
    (outcome,) = labeller.label_questions(video(red=planted, blue=[4]), [question])
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
    asked: list[Sequence[str]] = []

    def relevance_of(candidates: Candidates, questions: Sequence[str]) -> np.ndarray:
        asked.append(questions)
        return np.eye(NUM_FRAMES)[[2, 2]]

    judge = CountingJudge()
    label_video(Verdicts(folder, judge), video(red=[2]), relevance_of)
    assert asked == [["Is anything grey?", "Is anything red?"]]
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
    assert judge.asked == [("ask", "something else")]  # all else is known, once its own description came too late
    said = [row["said"] for row in verdicts_in(folder) if row["step"] == "describe"]
    assert said == ["grey red"]


def test_labels_follow_from_verdicts_that_are_stored_where_two_differ(folder: Folder) -> None:
    red = QuestionAnswer(question="Is anything red?", answer="yes")

    class Differs(CountingJudge):
        """Sees red everywhere, after another has seen it in a frame alone."""

        def answer(self, frames_NHWC: np.ndarray, question: str) -> str:
            if not self.asked:
                label_question(Verdicts(folder, CountingJudge()), video(red=[2]), red)
            super().answer(frames_NHWC, question)
            return "yes"

    outcome = label_question(Verdicts(folder, Differs()), video(red=[2]), red)
    assert (outcome.fate, outcome.needed) == ("kept", (2,))
    keys = [(row["step"], tuple(row["frames"]), tuple(row["clip_ids"])) for row in verdicts_in(folder)]
    assert len(keys) == len(set(keys))
    assert labelled(folder, red.question) == [2]


def test_a_video_takes_few_files_each_of_one_listing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: Counter[str] = Counter()
    list_files = Folder.list

    def noted(self: Folder, prefix: str) -> list[str]:
        listed[prefix] += 1
        return list_files(self, prefix)

    monkeypatch.setattr(Folder, "list", noted)
    judge = CountingJudge()
    labeller = Labeller(Verdicts(folder, judge), with_policies=True)
    for number in range(2):
        found = video(red=[2], blue=[9])
        candidates = Candidates(video_id=f"{number:064}", places=found.places, read=found.read)
        assert [one.fate for one in labeller.label_video(candidates)] == ["not needed", "kept", "kept"]
    assert len(judge.asked) > 2 * 20
    # What is asked about a video, and each of three questions: one file of verdicts.
    assert Counter(name.split("/")[1] for name in list_files(folder, "relevance")) == {
        "verdicts": 2 * (1 + 3),
        "queries": 1,  # the same questions about both
        "labels": 2,
        "policies": 2,
    }
    assert listed == {VERDICTS: 1 + 2 * (1 + 3), QUERIES: 2, LABELS: 2, POLICIES: 2}


def test_labels_of_what_was_decided_before_a_fault_are_kept(folder: Folder) -> None:
    whole = CountingJudge()
    label_video(Verdicts(Folder(f"memory:///judged-{next(_numbers)}"), whole), video(red=[2], blue=[9]))
    with pytest.raises(ConnectionError):
        label_video(Verdicts(folder, CountingJudge(len(whole.asked))), video(red=[2], blue=[9]))
    assert labelled(folder, "Is anything red?") == [2]
    assert len(verdicts_in(folder)) == len(whole.asked) - 1


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


class DetailJudge(FakeJudge):
    """Sees stripes, which are `period` pixels high where they can just be told apart."""

    name = "detail"

    def __init__(self, period: int = 2) -> None:
        self.period, self.num_asked = period, 0

    def answer(self, frames_NHWC: np.ndarray, question: str) -> str:
        self.num_asked += 1
        rows_NH = frames_NHWC.astype(float).mean((2, 3))
        apart_NH = np.abs(rows_NH[:, self.period // 2 :] - rows_NH[:, : -(self.period // 2)])
        return "yes" if (apart_NH.mean(1) > 60).any() else "no"


STRIPES = QuestionAnswer(question="Are there stripes?", answer="yes")


def striped(period: int, places: Collection[int]) -> Candidates:
    """Grey frames, some with stripes of black and white."""
    frames_NHWC = np.full((NUM_FRAMES, 32, 48, 3), 128, np.uint8)
    rows_H = np.arange(32) % period >= period // 2
    frames_NHWC[list(places)] = (rows_H * np.uint8(255))[:, None, None]
    return Candidates(video_id="v", places=video().places, read=lambda: frames_NHWC)


@pytest.mark.parametrize(
    ("period", "relevant", "policy"),
    [
        (2, None, "fragment"),  # detail that is in few frames
        (2, [3, 7], "fragment"),
        (2, [4], "global"),  # the frame that matters is not among those that are whole
        (2, [], "global"),
        (8, None, "global"),  # as much of it is seen under either
    ],
)
def test_the_policy_under_which_alone_detail_is_seen_is_stored(
    folder: Folder, period: int, relevant: list[int] | None, policy: str
) -> None:
    p_N = np.array([0.5 if i in (relevant or []) else 0.49 for i in range(NUM_FRAMES)])
    relevance_of = None if relevant is None else lambda candidates, questions: p_N[None]
    judge, candidates = DetailJudge(period), striped(period, [3])
    labeller = Labeller(Verdicts(folder, judge), relevance_of, with_policies=True)
    (outcome,) = labeller.label_questions(candidates, [STRIPES])
    assert (outcome.fate, outcome.needed, outcome.policy) == ("kept", (3,), policy)
    assert read_table(folder, POLICIES, POLICY_SCHEMA).to_pylist() == [
        {
            "query_id": query_id_of(STRIPES.question),
            "source": "judge:detail",
            "video_id": "v",
            "policy": policy,
            "p_fragment": float(policy == "fragment"),
        }
    ]
    in_part = [one for one in verdicts_in(folder) if one["step"].startswith(("global", "fragment"))]
    whole = [3] if relevant is None else relevant
    places = {
        "global": list(candidates.places),
        f"fragment/{len(whole)}": [candidates.places[i] for i in (*whole, *sorted({*range(NUM_FRAMES)} - {*whole}))],
    }
    assert {one["step"]: list(zip(one["clip_ids"], one["frames"], strict=True)) for one in in_part} == places
    again = Labeller(Verdicts(folder, DetailJudge(period)), relevance_of, with_policies=True)
    assert again.label_questions(unread(candidates), [STRIPES]) == [outcome]


def test_a_question_that_is_not_kept_has_no_policy(folder: Folder) -> None:
    labeller = Labeller(Verdicts(folder, DetailJudge()), with_policies=True)
    (outcome,) = labeller.label_questions(striped(2, [3, 8]), [STRIPES])
    assert (outcome.fate, outcome.policy) == ("not needed", None)
    assert read_table(folder, POLICIES, POLICY_SCHEMA).num_rows == 0


def test_policies_are_made_later_for_what_is_labelled_already(folder: Folder) -> None:
    Labeller(Verdicts(folder, DetailJudge())).label_questions(striped(2, [3]), [STRIPES])
    judge = DetailJudge()
    Labeller(Verdicts(folder, judge), with_policies=True).label_questions(striped(2, [3]), [STRIPES])
    assert judge.num_asked == 2
    assert read_table(folder, POLICIES, POLICY_SCHEMA)["policy"].to_pylist() == ["fragment"]
    assert read_table(folder, LABELS, LABEL_SCHEMA).num_rows == NUM_FRAMES


def test_frames_with_less_detail_keep_their_size_and_lose_what_is_fine() -> None:
    frames_NHWC = striped(2, [0]).frames_NHWC[:2]
    for area, most in ((1 / 2, 40), (1 / 4, 10)):
        blurred_NHWC = with_less_detail(frames_NHWC, area)
        assert (blurred_NHWC.shape, blurred_NHWC.dtype) == (frames_NHWC.shape, np.uint8)
        assert blurred_NHWC[0, 4:-4].std() < most < frames_NHWC[0].std()
        assert np.abs(blurred_NHWC[1].astype(int) - 128).max() <= 1
    assert with_less_detail(frames_NHWC[:0], 1 / 4).shape == (0, 32, 48, 3)


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
    with pytest.raises(ValueError, match=r"p of 12 frames for each question is wanted: \(1, 3\)"):
        label_video(Verdicts(folder, FakeJudge()), video(), lambda candidates, questions: np.zeros((1, 3)))

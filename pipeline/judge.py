"""What judges frames: a model that describes them, thinks of questions about them, and answers these; and what it said.

All that a judge says is stored, with the frames that it was shown and whether the answer was right, and looked up
before it is asked: a run that was killed asks again about the one question that it was at.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import pyarrow as pa

from ..schemas.errors import RecipeError
from ..schemas.queries import query_id_of
from ..schemas.tables import VERDICT_SCHEMA
from .appended import append_to, names_in, read_rows
from .relevance import COLOURS
from .storage import Folder

VERDICTS = "relevance/verdicts"
DESCRIBE, ASK = "describe", "ask"

Place = tuple[str, int]  # clip_id, and frame of the clip
Key = tuple[str, str, str, tuple[Place, ...], str]
Decision = TypeVar("Decision")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAnswer:
    """A question about a video, and what is to be answered; RecipeError where one is empty."""

    question: str
    answer: str

    def __post_init__(self) -> None:
        if not self.question.strip() or not self.answer.strip():
            raise RecipeError(f"a question and its answer are wanted: found {self.question!r} and {self.answer!r}")


@runtime_checkable
class Judge(Protocol):
    """Looks at frames and answers in words. Frames are uint8 RGB of one size, in the order of time.

    What it says is stored and never asked for twice, so it should say the same of the same frames. UnclearError where
    what it says cannot be understood.
    """

    @property
    def name(self) -> str:
        """Who it is: another name for everything that changes what it says."""
        ...

    def describe(self, frames_NHWC: np.ndarray) -> str:
        """What is to be seen, in detail."""
        ...

    def ask(self, description: str) -> list[QuestionAnswer]:
        """Questions that a description answers, each with its answer."""
        ...

    def answer(self, frames_NHWC: np.ndarray, question: str) -> str:
        """The answer to a question, by these frames alone; there may be none."""
        ...

    def agrees(self, question: str, wanted: str, given: str) -> bool:
        """Whether an answer that was given means the same as the one that is wanted."""
        ...


class FakeJudge:
    """Knows colours: of which one a frame is by its mean. It says yes where it sees all that a question names."""

    name = "fake"

    def describe(self, frames_NHWC: np.ndarray) -> str:
        return " ".join(dict.fromkeys(_colour_of(frame_HWC) for frame_HWC in frames_NHWC))

    def ask(self, description: str) -> list[QuestionAnswer]:
        return [QuestionAnswer(question=f"Is anything {colour}?", answer="yes") for colour in _named(description)]

    def answer(self, frames_NHWC: np.ndarray, question: str) -> str:
        named, seen = _named(question), {_colour_of(frame_HWC) for frame_HWC in frames_NHWC}
        return "yes" if named and seen.issuperset(named) else "no"

    def agrees(self, question: str, wanted: str, given: str) -> bool:
        return wanted.casefold() == given.casefold()


def _named(text: str) -> Sequence[str]:
    return [word for word in re.findall("[a-z]+", text.lower()) if word in COLOURS]


def _colour_of(frame_HWC: np.ndarray) -> str:
    mean = frame_HWC.mean((0, 1))
    return min(COLOURS, key=lambda colour: float(np.abs(mean - COLOURS[colour]).sum()))


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The candidate frames of a video in the order of time: (clip_id, frame) of each, and how they are read.

    `read` gives them as uint8 RGB (N,H,W,3); it is called once, when a judge must see frames for the first time.
    """

    video_id: str
    places: tuple[Place, ...]
    read: Callable[[], np.ndarray]

    def __post_init__(self) -> None:
        if not self.places or len(set(self.places)) != len(self.places):
            raise ValueError(f"video {self.video_id}: different candidate frames are wanted, found {self.places}")

    @cached_property
    def frames_NHWC(self) -> np.ndarray:
        """The frames themselves."""
        frames_NHWC = self.read()
        if frames_NHWC.dtype != np.uint8 or frames_NHWC.ndim != 4 or len(frames_NHWC) != len(self.places):
            raise ValueError(f"{len(self.places)} frames (N,H,W,3) uint8 are wanted: {frames_NHWC.shape}")
        return frames_NHWC


class Verdicts:
    """A judge, and all that it has said for the cache in `folder`.

    What it says is held until it is stored: by `decided`, with all that one decision took.
    """

    def __init__(self, folder: Folder, judge: Judge) -> None:
        self.folder, self.judge = folder, judge
        self._stored: dict[Key, Mapping[str, Any]] = {}
        self._held: dict[Key, Mapping[str, Any]] = {}
        self._files_read: set[str] | None = None

    def decided(self, decide: Callable[[], Decision]) -> Decision:
        """What `decide` gives, once all that it asked the judge is stored, which it is also where `decide` fails.

        It is called again where another process has stored other answers meanwhile: these count.
        """
        while True:
            try:
                decision = decide()
            finally:
                is_ours = self.store()
            if is_ours:
                return decision

    def store(self) -> bool:
        """Store what is held, in one file; False where another process was first with a part of it."""
        if not self._held:
            return True

        def lacking(names: Sequence[str]) -> pa.Table | None:
            self._read(names)
            new = [dict(row) for key, row in self._held.items() if key not in self._stored]
            return pa.Table.from_pylist(new, VERDICT_SCHEMA) if new else None

        is_ours = append_to(self.folder, VERDICTS, lacking) == len(self._held)
        for key, row in self._held.items():
            self._stored.setdefault(key, row)
        self._held.clear()
        return is_ours

    def questions(self, candidates: Candidates) -> list[QuestionAnswer]:
        """What the judge asks about a video by its own description, each question once."""
        row = row_of("", candidates.video_id, ASK, candidates.places)

        def decide() -> str:
            description = self._said(
                {**row, "step": DESCRIBE}, lambda: (self.judge.describe(candidates.frames_NHWC), None)
            )["said"]
            return self._said(row, lambda: (_as_json(self.judge.ask(description)), None))["said"]

        return [QuestionAnswer(**one) for one in json.loads(self.decided(decide))]

    def is_right(self, question: QuestionAnswer, row: Mapping[str, Any], frames: Callable[[], np.ndarray]) -> bool:
        """Whether the judge gives the wanted answer by `frames`, which a row of `row_of` says, alone."""

        def say() -> tuple[str, bool]:
            given = self.judge.answer(frames(), question.question)
            said = json.dumps({"wanted": question.answer, "answer": given})
            return said, self.judge.agrees(question.question, question.answer, given)

        return self._said(row, say, question.answer)["verdict"]

    def _said(
        self, row: Mapping[str, Any], say: Callable[[], tuple[str, bool | None]], wanted: str = ""
    ) -> Mapping[str, Any]:
        """The row with what the judge has said, or says now."""
        key = _key(row, wanted)
        if self._files_read is None:
            self._read(names_in(self.folder, VERDICTS))
        if found := self._stored.get(key) or self._held.get(key):
            return found
        said, verdict = say()
        self._held[key] = {**row, "judge": self.judge.name, "said": said, "verdict": verdict}
        return self._held[key]

    def _read(self, names: Sequence[str]) -> None:
        """Know all that this judge has said in those of the files that were not read before."""
        self._files_read = self._files_read or set()
        for name in names:
            if name not in self._files_read:
                for row in read_rows(self.folder, name, VERDICT_SCHEMA).to_pylist():
                    if row["judge"] == self.judge.name:
                        wanted = "" if row["verdict"] is None else json.loads(row["said"])["wanted"]
                        self._stored.setdefault(_key(row, wanted), row)
                self._files_read.add(name)


def row_of(query_id: str, video_id: str, step: str, places: Sequence[Place]) -> dict[str, Any]:
    """A verdict that is to be: VERDICT_SCHEMA without who says what."""
    return {
        "query_id": query_id,
        "video_id": video_id,
        "step": step,
        "clip_ids": [clip_id for clip_id, _ in places],
        "frames": [frame for _, frame in places],
    }


def _key(row: Mapping[str, Any], wanted: str) -> Key:
    """What a judge is never asked twice about."""
    places = tuple(zip(row["clip_ids"], row["frames"], strict=True))
    return row["query_id"], row["video_id"], row["step"], places, wanted


def _as_json(asked: Sequence[QuestionAnswer]) -> str:
    different = {query_id_of(one.question): one for one in asked}
    return json.dumps([{"question": one.question, "answer": one.answer} for one in different.values()])

"""Labels of frames and policies by a judge (after VideoRouter, arXiv:2605.05848): which frames an answer needs.

A judge describes a video and asks about it; a question is kept where the answer from all frames is right
(``consistent``), and as few frames as still give it are needed (``sufficient``), unless the others give it without them
(``necessary``). All that the judge says is stored at once, with the frames that it was shown and whether the answer was
right, and looked up before it is asked: a run that was killed goes on where it was.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..schemas.queries import query_id_of
from ..schemas.tables import LABEL_SCHEMA, POLICY_SCHEMA, VERDICT_SCHEMA
from .appended import append, names_in, read_rows
from .judge import Judge, QuestionAnswer
from .labels import add_lacking, known_labels
from .queries import add_lacking_queries, known_queries
from .storage import Folder

VERDICTS = "relevance/verdicts"
DESCRIBE, ASK, CONSISTENT, SUFFICIENT, NECESSARY = "describe", "ask", "consistent", "sufficient", "necessary"

Place = tuple[str, int]  # clip_id, and frame of the clip
Key = tuple[str, str, str, tuple[Place, ...], str]
Fate = Literal["kept", "inconsistent", "not needed"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a question: which of the candidates the answer needs, or why it has no labels.

    It is ``inconsistent`` where all frames do not give the answer, and its frames are ``not needed`` where the others
    give it too.
    """

    query_id: str
    question: str
    fate: Fate
    needed: tuple[int, ...] = ()


class Verdicts:
    """A judge, and all that it has said for the cache in `folder`."""

    def __init__(self, folder: Folder, judge: Judge) -> None:
        self.folder, self.judge = folder, judge
        self.queries, self.labels = known_queries(folder), known_labels(folder)
        self._known: dict[Key, dict[str, Any]] = {}
        self._files_read: set[str] = set()

    def description(self, candidates: Candidates) -> str:
        """What the judge sees in all frames of a video."""
        row = _row("", candidates.video_id, DESCRIBE, candidates.places)
        return self._stored(row, lambda: (self.judge.describe(candidates.frames_NHWC), None))["said"]

    def questions(self, candidates: Candidates) -> list[QuestionAnswer]:
        """What the judge asks about a video by its own description, each question once."""
        description = self.description(candidates)

        def ask() -> tuple[str, None]:
            asked = {query_id_of(one.question): one for one in self.judge.ask(description)}
            return json.dumps([{"question": one.question, "answer": one.answer} for one in asked.values()]), None

        row = _row("", candidates.video_id, ASK, candidates.places)
        return [QuestionAnswer(**one) for one in json.loads(self._stored(row, ask)["said"])]

    def is_right(self, question: QuestionAnswer, candidates: Candidates, step: str, shown: Sequence[int]) -> bool:
        """Whether the judge gives the wanted answer to a question where it sees only the frames `shown`."""
        shown = sorted(shown)
        places = [candidates.places[i] for i in shown]
        return self.agrees(
            question,
            _row(query_id_of(question.question), candidates.video_id, step, places),
            lambda: self.judge.answer(candidates.frames_NHWC[shown], question.question),
        )

    def agrees(self, question: QuestionAnswer, row: Mapping[str, Any], answer: Callable[[], str]) -> bool:
        """Whether what `answer` says, for a row as VERDICT_SCHEMA has it, is the wanted answer."""

        def say() -> tuple[str, bool]:
            given = answer()
            said = json.dumps({"wanted": question.answer, "answer": given})
            return said, self.judge.agrees(question.question, question.answer, given)

        return self._stored(row, say, question.answer)["verdict"]

    def _stored(
        self, row: Mapping[str, Any], say: Callable[[], tuple[str, bool | None]], wanted: str = ""
    ) -> dict[str, Any]:
        """The row as it is stored, after `say` where it was not."""
        key = _key(row, wanted)
        if key not in self._known:
            self._read()
        if key not in self._known:
            said, verdict = say()
            new = pa.Table.from_pylist(
                [{**row, "judge": self.judge.name, "said": said, "verdict": verdict}], VERDICT_SCHEMA
            )
            append(self.folder, VERDICTS, lambda: None if key in self._read() else new)
            self._read()
        return self._known[key]

    def _read(self) -> Mapping[Key, dict[str, Any]]:
        """All that this judge has said, with what was added since the last look."""
        for name in names_in(self.folder, VERDICTS):
            if name not in self._files_read:
                for row in read_rows(self.folder, name, VERDICT_SCHEMA).to_pylist():
                    if row["judge"] == self.judge.name:
                        wanted = "" if row["verdict"] is None else json.loads(row["said"])["wanted"]
                        self._known.setdefault(_key(row, wanted), row)
                self._files_read.add(name)
        return self._known


def label_video(
    verdicts: Verdicts, candidates: Candidates, relevance_of: Callable[[str], np.ndarray] | None = None
) -> list[Outcome]:
    """What became of every question that the judge asks about a video; as `label_question`, with what `relevance_of`
    says of a question in place of `relevance_N`.
    """
    questions = verdicts.questions(candidates)
    return [label_question(verdicts, candidates, one, relevance_of and relevance_of(one.question)) for one in questions]


def label_question(
    verdicts: Verdicts, candidates: Candidates, question: QuestionAnswer, relevance_N: np.ndarray | None = None
) -> Outcome:
    """What became of a question about a video. Its labels, where it has any, are stored as ``judge:<name>``.

    Frames are left out from the last one on, or from the one of least relevance.
    """
    (query_id,) = add_lacking_queries(verdicts.queries, [question.question])
    every = range(len(candidates.places))
    order = list(every) if relevance_N is None else np.argsort(-relevance_N, kind="stable").tolist()
    if len(order) != len(every):
        raise ValueError(f"one relevance for each of {len(every)} frames is wanted, found {len(order)}")

    def rejected(fate: Fate) -> Outcome:
        return Outcome(query_id=query_id, question=question.question, fate=fate)

    if not verdicts.is_right(question, candidates, CONSISTENT, every):
        return rejected("inconsistent")
    needed = fewest(order, lambda shown: verdicts.is_right(question, candidates, SUFFICIENT, shown))
    if verdicts.is_right(question, candidates, NECESSARY, [i for i in every if i not in needed]):
        return rejected("not needed")
    add_lacking(verdicts.labels, [_labels(query_id, f"judge:{verdicts.judge.name}", candidates, needed)])
    return Outcome(query_id=query_id, question=question.question, fate="kept", needed=tuple(needed))


def fewest(frames: Sequence[int], suffices: Callable[[Sequence[int]], bool]) -> list[int]:
    """Frames that suffice, sorted, of which none can be left out, where all `frames` suffice and more of them never
    do worse.

    Halves are left out first, from the end on, then halves of these, down to frames alone: k of N frames are found
    in about 2 k log2(N / k) questions.
    """
    kept, size = list(frames), len(frames) // 2
    while size:
        end = len(kept)
        while end > 0:
            rest = kept[: max(0, end - size)] + kept[end:]
            if rest and suffices(rest):
                kept = rest
            end -= size
        size //= 2
    return sorted(kept)


def probe_policies(
    verdicts: Verdicts, video_id: str, question: QuestionAnswer, answerer: str, answer_under: Callable[[str], str]
) -> pa.Table:
    """The policy that a question needs (one row of POLICY_SCHEMA): the only one under which the answer is right, and
    ``global`` where that is both or neither. `answer_under` gives the answer under a policy, by the model `answerer`.
    """
    (query_id,) = add_lacking_queries(verdicts.queries, [question.question])
    is_right = {
        policy: verdicts.agrees(
            question, _row(query_id, video_id, f"{policy}/{answerer}", ()), partial(answer_under, policy)
        )
        for policy in ("global", "fragment")
    }
    is_fragment = is_right["fragment"] and not is_right["global"]
    row = {
        "query_id": query_id,
        "source": f"judge:{verdicts.judge.name}",
        "video_id": video_id,
        "policy": "fragment" if is_fragment else "global",
        "p_fragment": float(is_fragment),
    }
    return pa.Table.from_pylist([row], schema=POLICY_SCHEMA)


def _row(query_id: str, video_id: str, step: str, places: Sequence[Place]) -> dict[str, Any]:
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


def _labels(query_id: str, source: str, candidates: Candidates, needed: Sequence[int]) -> pa.Table:
    rows = [
        {
            "query_id": query_id,
            "source": source,
            "video_id": candidates.video_id,
            "clip_id": clip_id,
            "frame": frame,
            "label": int(i in needed),
        }
        for i, (clip_id, frame) in enumerate(candidates.places)
    ]
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)

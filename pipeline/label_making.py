"""Labels of frames and policies by a judge (after VideoRouter, arXiv:2605.05848): which frames an answer needs.

A judge describes a video and asks about it; a question is kept where the answer from all frames is right
(``consistent``), and as few frames as still give it are needed (``sufficient``), unless the others give it without them
(``necessary``). Which policy a kept question needs is tried out: the judge answers from frames as each of the two would
show them (``global``, ``fragment``).
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from ..schemas.queries import query_id_of
from ..schemas.tables import LABEL_SCHEMA
from .judge import Candidates, QuestionAnswer, Verdicts, row_of
from .labels import add_lacking, add_lacking_policies, known_labels, known_policies
from .queries import add_lacking_queries, known_queries

CONSISTENT, SUFFICIENT, NECESSARY = "consistent", "sufficient", "necessary"
GLOBAL, FRAGMENT = "global", "fragment"
GLOBAL_AREA, OTHERS_AREA = 1 / 2, 1 / 4  # of frames under global, and of those that do not matter under fragment
RELEVANT = 0.5  # the least p of a frame that matters

Fate = Literal["kept", "inconsistent", "not needed"]
Policy = Literal["global", "fragment"]
RelevanceOf = Callable[[Candidates, Sequence[str]], np.ndarray]  # p (Q,N) of candidate frames for questions


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a question: which of the candidates the answer needs, or why it has no labels.

    It is ``inconsistent`` where all frames do not give the answer, and its frames are ``not needed`` where the others
    give it too. One that is kept may have a policy.
    """

    query_id: str
    question: str
    fate: Fate
    needed: tuple[int, ...] = ()
    policy: Policy | None = None


class Labeller:
    """Labels videos by a judge, whose labels and policies are stored as ``judge:<name>``.

    What `relevance_of` says of the frames decides which are left out first, and which matter under ``fragment``;
    without it frames are left out from the last one on, and those matter that the answer needs. Policies are made where
    `with_policies`.
    """

    def __init__(
        self, verdicts: Verdicts, relevance_of: RelevanceOf | None = None, *, with_policies: bool = False
    ) -> None:
        self.verdicts, self.relevance_of, self.with_policies = verdicts, relevance_of, with_policies
        self.source = f"judge:{verdicts.judge.name}"
        folder = verdicts.folder
        self._queries, self._labels, self._policies = (
            known_queries(folder),
            known_labels(folder),
            known_policies(folder),
        )

    def label_video(self, candidates: Candidates) -> list[Outcome]:
        """What became of every question that the judge asks about a video."""
        return self.label_questions(candidates, self.verdicts.questions(candidates))

    def label_questions(self, candidates: Candidates, questions: Sequence[QuestionAnswer]) -> list[Outcome]:
        """What became of each question about a video. What was decided is stored, also where the judge then fails."""
        if not questions:
            return []
        add_lacking_queries(self._queries, [one.question for one in questions])
        p_QN = None
        if self.relevance_of:
            p_QN = self.relevance_of(candidates, [one.question for one in questions])
            if p_QN.shape != (len(questions), len(candidates.places)):
                raise ValueError(f"p of {len(candidates.places)} frames for each question is wanted: {p_QN.shape}")
        outcomes: list[Outcome] = []
        try:
            for i, question in enumerate(questions):
                p_N = None if p_QN is None else p_QN[i]
                outcomes.append(self.verdicts.decided(lambda one=question, p_N=p_N: self._decide(candidates, one, p_N)))
        finally:
            self.verdicts.store()  # where an interrupt came while it was stored
            self._keep(candidates, outcomes)
        return outcomes

    def _decide(self, candidates: Candidates, question: QuestionAnswer, p_N: np.ndarray | None) -> Outcome:
        outcome = judged(self.verdicts, candidates, question, p_N)
        if outcome.fate != "kept" or not self.with_policies:
            return outcome
        relevant = outcome.needed if p_N is None else np.flatnonzero(p_N >= RELEVANT).tolist()
        policy = probed_policy(self.verdicts, candidates, question, relevant)
        return dataclasses.replace(outcome, policy=policy)

    def _keep(self, candidates: Candidates, outcomes: Sequence[Outcome]) -> None:
        """Store the labels and policies of questions that were kept, of all in one file each."""
        kept = [one for one in outcomes if one.fate == "kept"]
        if kept:
            add_lacking(self._labels, [_labels(self.source, candidates, one) for one in kept])
        policies = [_policy(self.source, candidates.video_id, one) for one in kept if one.policy]
        if policies:
            add_lacking_policies(self._policies, policies)


def judged(
    verdicts: Verdicts, candidates: Candidates, question: QuestionAnswer, relevance_N: np.ndarray | None = None
) -> Outcome:
    """What becomes of a question about a video. Frames are left out from the last one on, or from the one of least
    relevance.
    """
    query_id, every = query_id_of(question.question), range(len(candidates.places))

    def is_right(step: str, shown: Sequence[int]) -> bool:
        shown = sorted(shown)
        row = row_of(query_id, candidates.video_id, step, [candidates.places[i] for i in shown])
        return verdicts.is_right(question, row, lambda: candidates.frames_NHWC[shown])

    def outcome(fate: Fate, needed: Sequence[int] = ()) -> Outcome:
        return Outcome(query_id=query_id, question=question.question, fate=fate, needed=tuple(needed))

    if not is_right(CONSISTENT, every):
        return outcome("inconsistent")
    order = list(every) if relevance_N is None else np.argsort(-relevance_N, kind="stable").tolist()
    needed = fewest(order, lambda shown: is_right(SUFFICIENT, shown))
    if is_right(NECESSARY, [i for i in every if i not in needed]):
        return outcome("not needed")
    return outcome("kept", needed)


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


def probed_policy(
    verdicts: Verdicts, candidates: Candidates, question: QuestionAnswer, relevant: Collection[int]
) -> Policy:
    """The policy that a question needs: the only one under which the answer is right, and ``global`` where that is both
    or neither (forced-policy probing of VideoRouter, arXiv:2605.05848).

    Under ``global`` all frames have half of their area, under ``fragment`` the `relevant` ones are whole and the others
    have a quarter. The step of that verdict is ``fragment/<n>``: its first n frames were whole.
    """
    places, query_id = candidates.places, query_id_of(question.question)
    whole = sorted(relevant)
    others = [i for i in range(len(places)) if i not in set(whole)]

    def under_global() -> np.ndarray:
        return with_less_detail(candidates.frames_NHWC, GLOBAL_AREA)

    def under_fragment() -> np.ndarray:
        frames_NHWC = candidates.frames_NHWC.copy()
        frames_NHWC[others] = with_less_detail(frames_NHWC[others], OTHERS_AREA)
        return frames_NHWC

    def is_right(step: str, shown: Sequence[Any], frames: Callable[[], np.ndarray]) -> bool:
        return verdicts.is_right(question, row_of(query_id, candidates.video_id, step, shown), frames)

    in_turn = [places[i] for i in (*whole, *others)]
    right = is_right(GLOBAL, places, under_global), is_right(f"{FRAGMENT}/{len(whole)}", in_turn, under_fragment)
    return FRAGMENT if right == (False, True) else GLOBAL


def with_less_detail(frames_NHWC: np.ndarray, area: float) -> np.ndarray:
    """Frames of the same size with the detail that they have at a share `area` of it."""
    height, width = frames_NHWC.shape[1:3]
    small = max(1, round(width * math.sqrt(area))), max(1, round(height * math.sqrt(area)))
    blurred_NHWC = np.empty_like(frames_NHWC)
    for frame_HWC, blurred_HWC in zip(frames_NHWC, blurred_NHWC, strict=True):
        shrunk = Image.fromarray(frame_HWC).resize(small, Image.Resampling.BICUBIC)
        blurred_HWC[:] = np.asarray(shrunk.resize((width, height), Image.Resampling.BICUBIC))
    return blurred_NHWC


def _labels(source: str, candidates: Candidates, outcome: Outcome) -> pa.Table:
    same = {"query_id": outcome.query_id, "source": source, "video_id": candidates.video_id}
    rows = [
        {**same, "clip_id": clip_id, "frame": frame, "label": int(i in outcome.needed)}
        for i, (clip_id, frame) in enumerate(candidates.places)
    ]
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)


def _policy(source: str, video_id: str, outcome: Outcome) -> dict[str, Any]:
    p_fragment = float(outcome.policy == FRAGMENT)
    same = {"query_id": outcome.query_id, "source": source, "video_id": video_id}
    return {**same, "policy": outcome.policy, "p_fragment": p_fragment}

"""tokenmill labels: labels of frames and policies from files, to files, and by a judge."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.markup import escape

from ..pipeline.cache import TokenCache
from ..pipeline.judge import Candidates, Judge, Verdicts
from ..pipeline.label_making import Fate, Labeller, Policy, RelevanceOf
from ..pipeline.labels import Imported, export_frame_labels, export_policies, import_frame_labels, import_policies
from ..pipeline.relevance import encoders_of
from ..pipeline.scoring import check_where, probabilities, text_vectors
from ..pipeline.storage import written_aside
from ..pipeline.views import CLIPS_WITH_VIDEOS
from ..schemas.errors import CacheError, DecodeError, RecipeError, UnclearError
from ..schemas.shard import FRAMES
from .interruption import raise_if_interrupted, resumable
from .lines import read_lines
from .openai_judge import OpenAiJudge
from .opening import open_cache
from .printing import new_table, output_console
from .reconstruct import source_of

SHOWN_PROBLEMS = 20
IMPORTED = ("queries", "rows added", "lines known", "problems")
FATES: tuple[Fate, ...] = ("kept", "inconsistent", "not needed")
POLICIES: tuple[Policy, ...] = ("global", "fragment")
MOST_FRAMES = 64  # that a judge is shown at once, at even distances (as in the paper's experiments)


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoLabels:
    """What became of the questions about a video, by fate, and how many need each policy; `problem` says why there are
    none.
    """

    uri: str
    num_candidates: int
    fates: Counter[str]
    policies: Counter[str]
    problem: str = ""


def run_labels(
    action: Literal["import", "export", "make"],
    cache: str,
    file: str | None,
    *,
    source: str | None,
    kind: Literal["frames", "policies"] | None,
    judge: str | None,
    model: str | None,
    policies: bool,
    where: str,
    limit: int | None,
) -> bool:
    """Do what a command line asks for; False where a line of a file, or a video, has a problem. RecipeError for what is
    lacking, and for options of another action.
    """
    asked = {"--judge": judge, "--model": model, "--policies": policies, "--limit": limit}
    others = [option for option, value in asked.items() if value] + (["--where"] if where != "true" else [])
    if action == "make":
        lacking = [option for option in ("--judge", "--model") if not asked[option]]
        if file or source or kind or lacking:
            said = (
                f"{' and '.join(lacking)} lacking" if lacking else "a file, --source or --kind, which it has no use for"
            )
            raise RecipeError(f"labels make: found {said}: give --judge URL and --model NAME")
        return make_labels(cache, OpenAiJudge(judge or "", model or ""), where, limit, policies=policies)
    if others:
        raise RecipeError(f"labels {action}: {', '.join(others)} found, which are of labels make: leave them out")
    if not file:
        raise RecipeError(f"labels {action}: no FILE of JSON lines was given: name one")
    if action == "export":
        export_labels(cache, file, source, kind)
        return True
    return import_labels(cache, file, source or os.path.splitext(os.path.basename(file))[0])


def import_labels(cache_uri: str, file: str, source: str) -> bool:
    """Store the labels of frames and the policies in a file of JSON lines, print what it brought and what is wrong with
    it; False where a line has a problem. A line with the key ``policy`` is a policy.
    """
    cache = open_cache(cache_uri)
    lines = read_lines(file)
    is_policy = [_is_policy(line) for line in lines]
    # The lines of the other kind become empty, so that each keeps its number.
    of_frames = ["" if policy else line for line, policy in zip(lines, is_policy, strict=True)]
    policies = [line if policy else "" for line, policy in zip(lines, is_policy, strict=True)]
    brought = {
        "labels of frames": import_frame_labels(cache, of_frames, file, source),
        "policies": import_policies(cache, policies, file, source),
    }
    _print_imported(brought)
    return not any(one.problems for one in brought.values())


def export_labels(
    cache_uri: str, output: str, source: str | None = None, kind: Literal["frames", "policies"] | None = None
) -> None:
    """Write labels of frames, policies, or both, of one source or all, to a file of JSON lines."""
    cache, kinds = open_cache(cache_uri), {"frames": export_frame_labels, "policies": export_policies}
    counts: Counter[str] = Counter()
    with written_aside(output) as aside, open(aside, "w", encoding="utf-8") as stream:
        for name, export in kinds.items():
            for line in export(cache, source) if kind in (None, name) else ():
                stream.write(f"{line}\n")
                counts[name] += 1
    print(f"{output}: {counts['frames']} lines of labels of frames, {counts['policies']} policies")


def make_labels(
    cache_uri: str, judge: Judge, where: str = "true", limit: int | None = None, *, policies: bool = False
) -> bool:
    """Label candidate frames of videos by a judge, as `label_videos`, and print what became of its questions; False
    where a video had a problem. What is stored is never asked again.
    """
    made: list[VideoLabels] = []
    with resumable():
        try:
            for one in label_videos(open_cache(cache_uri), judge, where, limit, policies=policies):
                made.append(one)
        finally:
            if made:
                _print_made(made, policies=policies)
    return not any(one.problem for one in made)


def label_videos(
    cache: TokenCache, judge: Judge, where: str, limit: int | None, *, policies: bool = False
) -> Iterator[VideoLabels]:
    """What a judge made of each video that clips are of where an SQL condition holds, the first `limit` of them, as it
    is done; with `policies` also which policy each question needs that is kept.

    A video that cannot be read, or where the judge cannot be understood, is left for another time. CacheError for a
    cache without candidate frames, and for a condition that holds for no clip.
    """
    if FRAMES not in cache.info.products:
        raise CacheError(
            f"{cache.folder.url}: it has no candidate frames: add `frames: {{}}` to its recipe and run it again"
        )
    check_where(cache, where)
    chosen = cache.sql(
        f"""select distinct video_id, uri from {CLIPS_WITH_VIDEOS}
            where video_id in (select video_id from frames) and ({where}\n)
            order by video_id limit {limit if limit is not None else "all"}"""
    )
    labeller = Labeller(Verdicts(cache.folder, judge), relevance_of(cache), with_policies=policies)
    for row in chosen.to_pylist():
        raise_if_interrupted()
        candidates = candidates_of(cache, row["video_id"])
        outcomes, problem = [], ""
        try:
            outcomes = labeller.label_video(candidates)
        except (UnclearError, DecodeError) as error:
            problem = str(error)
        yield VideoLabels(
            uri=row["uri"],
            num_candidates=len(candidates.places),
            fates=Counter(one.fate for one in outcomes),
            policies=Counter(one.policy for one in outcomes if one.policy),
            problem=problem,
        )


def relevance_of(cache: TokenCache) -> RelevanceOf | None:
    """How candidate frames matter to questions by the first encoder of the cache that takes texts and whose embeddings
    are stored; None where there is none. p is 0 of frames without an embedding.
    """
    encoders = encoders_of(cache.info)
    able = [name for name, one in encoders.items() if one.spec["takes_texts"] and one.has_embeddings]
    if not able:
        return None

    def of_questions(candidates: Candidates, questions: Sequence[str]) -> np.ndarray:
        p_QN = np.zeros((len(questions), len(candidates.places)))
        vectors_QD = text_vectors(cache, able[0], questions, store=False)
        for p_N, vector_D in zip(p_QN, vectors_QD, strict=True):
            rows = probabilities(cache, able[0], vector_D, f"video_id = '{candidates.video_id}'")
            places = zip(rows["clip_id"].to_pylist(), rows["frame"].to_pylist(), strict=True)
            known = dict(zip(places, rows["p"].to_pylist(), strict=True))
            p_N[:] = [known.get(place, 0) for place in candidates.places]
        return p_QN

    return of_questions


def candidates_of(cache: TokenCache, video_id: str, most: int = MOST_FRAMES) -> Candidates:
    """The different candidate frames of a video, `most` of them at even distances, to be read from its source."""
    rows = cache.sql(
        """select clip_id, frame from frames where video_id = ?
           qualify row_number() over (partition by frame_number order by clip_id) = 1 order by frame_number""",
        [video_id],
    ).to_pylist()
    count = min(len(rows), most)
    chosen = [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]
    places = tuple((row["clip_id"], row["frame"]) for row in chosen)
    return Candidates(video_id=video_id, places=places, read=lambda: _read(cache, places))


def _read(cache: TokenCache, places: Sequence[tuple[str, int]]) -> np.ndarray:
    """Frames (N,H,W,3) uint8 from the source, each clip decoded once."""
    frames: dict[tuple[str, int], np.ndarray] = {}
    for clip_id in dict.fromkeys(clip_id for clip_id, _ in places):
        _, source_THWC = source_of(cache, clip_id)
        frames |= {place: source_THWC[place[1]].copy() for place in places if place[0] == clip_id}
    return np.stack([frames[place] for place in places])


def _is_policy(line: str) -> bool:
    try:
        found = json.loads(line)
    except ValueError:
        return False  # the import of labels says so
    return isinstance(found, dict) and "policy" in found


def _print_imported(brought: Mapping[str, Imported]) -> None:
    table = new_table("", *IMPORTED, numbers=IMPORTED)
    for name, one in brought.items():
        counts = one.num_queries, one.num_labels, one.num_known, len(one.problems)
        table.add_row(name, *map(str, counts))
    output_console().print(table)
    problems = [problem for one in brought.values() for problem in one.problems]
    for problem in problems[:SHOWN_PROBLEMS]:
        print(problem)
    if len(problems) > SHOWN_PROBLEMS:
        print(f"and {len(problems) - SHOWN_PROBLEMS} more")


def _print_made(made: Sequence[VideoLabels], *, policies: bool) -> None:
    numbers = ("candidates", *FATES, *(POLICIES if policies else ()))
    table = new_table("video", *numbers, "problem", numbers=numbers)
    for one in made:
        counts = [one.num_candidates, *((one.fates | one.policies)[name] for name in numbers[1:])]
        table.add_row(escape(one.uri), *map(str, counts), escape(one.problem))
    output_console().print(table)
    fates = sum((one.fates for one in made), Counter())
    print(f"{len(made)} videos: {fates['kept']} questions kept, {fates.total() - fates['kept']} rejected")

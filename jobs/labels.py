"""tokenmill labels: labels of frames and policies from files, to files, and by a judge."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.markup import escape

from ..pipeline.cache import TokenCache, open_cache
from ..pipeline.judge import Judge, UnclearError
from ..pipeline.label_making import Candidates, Fate, Verdicts, label_video
from ..pipeline.labels import Imported, export_frame_labels, export_policies, import_frame_labels, import_policies
from ..pipeline.storage import written_aside
from ..schemas.errors import DecodeError, RecipeError
from .interruption import raise_if_interrupted, resumable
from .lines import read_lines
from .openai_judge import OpenAiJudge
from .printing import new_table, output_console
from .reconstruct import source_of

SHOWN_PROBLEMS = 20
IMPORTED = ("queries", "rows added", "lines known", "problems")
FATES: tuple[Fate, ...] = ("kept", "inconsistent", "not needed")
MOST_FRAMES = 64  # that a judge is shown at once, at even distances (as in the paper's experiments)


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoLabels:
    """What became of the questions about a video, by fate; `problem` says why there are none."""

    uri: str
    num_candidates: int
    fates: Counter[str]
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
    where: str,
    limit: int | None,
) -> bool:
    """Do what a command line asks for; False where a line of a file has a problem, RecipeError for what is lacking."""
    if action == "make":
        if file or not judge or not model:
            raise RecipeError(
                "labels make: found no endpoint, or a file: give --judge URL and --model NAME, and no FILE"
            )
        make_labels(cache, judge, model, where, limit)
        return True
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


def make_labels(cache_uri: str, judge_url: str, model: str, where: str = "true", limit: int | None = None) -> None:
    """Label candidate frames of videos that an SQL condition holds for, the first `limit` of them, by a judge behind an
    OpenAI-compatible endpoint, and print what became of its questions. What is stored is never asked again.
    """
    judge, made = OpenAiJudge(judge_url, model), []
    with resumable():
        try:
            for one in label_videos(open_cache(cache_uri), judge, where, limit):
                made.append(one)
        finally:
            _print_made(made)


def label_videos(cache: TokenCache, judge: Judge, where: str, limit: int | None) -> Iterator[VideoLabels]:
    """What a judge made of each video, as it is done. One that cannot be read, or where the judge cannot be
    understood, is left for another time.
    """
    verdicts = Verdicts(cache.folder, judge)
    chosen = cache.sql(
        f"""select video_id, uri from videos where video_id in (select video_id from frames) and ({where})
            order by video_id limit {limit if limit is not None else "all"}"""
    )
    for row in chosen.to_pylist():
        raise_if_interrupted()
        candidates = candidates_of(cache, row["video_id"])
        fates, problem = Counter(), ""
        try:
            fates.update(outcome.fate for outcome in label_video(verdicts, candidates))
        except (UnclearError, DecodeError) as error:
            problem = str(error)
        yield VideoLabels(uri=row["uri"], num_candidates=len(candidates.places), fates=fates, problem=problem)


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


def _print_made(made: Sequence[VideoLabels]) -> None:
    numbers = ("candidates", *FATES)
    table = new_table("video", *numbers, "problem", numbers=numbers)
    for one in made:
        table.add_row(
            escape(one.uri), str(one.num_candidates), *(str(one.fates[fate]) for fate in FATES), escape(one.problem)
        )
    output_console().print(table)
    fates = sum((one.fates for one in made), Counter())
    print(f"{len(made)} videos: {fates['kept']} questions kept, {fates.total() - fates['kept']} rejected")

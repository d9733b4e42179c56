"""The clips of a training: planned once, in a new order every epoch, decoded ahead of the steps."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from ..pipeline.decoders import DECODE_AHEAD_BYTES, ClipDecoder
from ..pipeline.plan_file import Plan, clips_of, plans_of
from ..pipeline.prefetch import ReadAhead
from ..pipeline.storage import Folder
from ..schemas.clip import Clip, ClipFailure, ClipFrames
from ..schemas.errors import SourceError
from ..schemas.recipe import Recipe
from .display import Display
from .plan import update_plans

SMALLEST_BYTES = 1 << 20  # what a small clip counts for: no more than some hundred are decoded ahead


def plan_once(recipe: Recipe, folder: Folder, display: Display) -> Plan:
    """The plan of the folder, made where it has none with clips: what is added to the sources later changes nothing."""
    plan = _with_clips(plans_of(folder)) or _with_clips(update_plans(recipe, folder, display))
    if plan is None:
        places = ", ".join(source.path for source in recipe.sources)
        raise SourceError(f"no video in {places} gives a clip to train on, for the reasons above: give other sources")
    return plan


def _with_clips(plans: Sequence[Plan]) -> Plan | None:
    return next((plan for plan in plans if plan.num_clips), None)


class ClipOrder:
    """The clips of a plan in an endless order: all of them in every epoch, shuffled by seed and epoch alone."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self._rows: pa.Table = plan.rows_of(range(len(plan.shards()))).combine_chunks()
        self._seed = seed

    def __len__(self) -> int:
        return self._rows.num_rows

    def candidates(self, place: int) -> Iterator[Clip]:
        """The clip at `place` (from 0, through all epochs), then those that may stand for it: the next of its epoch."""
        number = len(self)
        epoch, first = divmod(place, number)
        order = _shuffled(number, self._seed, epoch)
        for later in range(number):
            yield clips_of(self._rows.slice(int(order[(first + later) % number]), 1))[0]


@lru_cache(maxsize=4)
def _shuffled(number: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below `number` in the order of random bits, which every version of numpy draws alike."""
    return np.random.Philox(key=[seed, epoch]).random_raw(number).argsort(kind="stable")


class ClipStream:
    """Frames of the clips at `places` of an order, in that order, made ahead by the decoders in turns.

    A clip that cannot be decoded is told by a ClipFailure, once, and the next of its epoch that can be stands for it.
    So which clips a step has does not depend on when failures were found.
    """

    def __init__(self, order: ClipOrder, decoders: Sequence[ClipDecoder], places: range) -> None:
        self._order, self._num_places = order, len(places)
        self._failures: dict[str, ClipFailure] = {}
        self._told: set[str] = set()
        self._ahead = [
            ReadAhead(
                [self._decoded(decoder, places[first :: len(decoders)])],
                _num_bytes,
                DECODE_AHEAD_BYTES // len(decoders),
                decoder.close,
            )
            for first, decoder in enumerate(decoders)
        ]

    def __iter__(self) -> Iterator[ClipFrames | ClipFailure]:
        """All frames, and the failures met on the way; SourceError where no clip can be decoded."""
        sources = [iter(ahead) for ahead in self._ahead]
        for number in range(self._num_places):
            for result in sources[number % len(sources)]:
                if isinstance(result, ClipFrames):
                    yield result
                    break
                if result.clip_id not in self._told:  # two decoders may find the same one
                    self._told.add(result.clip_id)
                    yield result
        for source in sources:
            next(source, None)  # until its thread has ended, and its decoder is free

    def close(self) -> None:
        """Stop decoding, also in the middle; the decoders cannot be used again then."""
        for ahead in self._ahead:
            ahead.close()

    def _decoded(self, decoder: ClipDecoder, places: range) -> Iterator[ClipFrames | ClipFailure]:
        for place in places:
            yield from self._frames_for(decoder, place)

    def _frames_for(self, decoder: ClipDecoder, place: int) -> Iterator[ClipFrames | ClipFailure]:
        """The frames for one place, after the failures that were found for it."""
        for clip in self._order.candidates(place):
            if clip.clip_id in self._failures:
                continue
            (result,) = decoder.decode([clip])
            yield result
            if isinstance(result, ClipFrames):
                return
            self._failures[clip.clip_id] = result
        first = next(iter(self._failures.values()))  # of at least one: an order has a clip
        raise SourceError(
            f"none of the {len(self._order)} clips can be decoded, the first because of: {first.reason}: give sources"
            f" that can be read, and another output"
        )


def _num_bytes(result: ClipFrames | ClipFailure) -> int:
    return max(SMALLEST_BYTES, result.frames_THWC.nbytes) if isinstance(result, ClipFrames) else 0

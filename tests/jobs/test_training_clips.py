"""The clips of a training: their order, what stands for those that fail, and how far decoding runs ahead."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tokenmill.jobs.display import LineDisplay
from tokenmill.jobs.training_clips import ClipOrder, ClipStream, plan_once
from tokenmill.pipeline.plan_file import plans_of
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.clip import Clip, ClipFailure, ClipFrames
from tokenmill.schemas.errors import SourceError
from tokenmill.schemas.recipe import ClipsSection, FilesSource, Recipe

from ..conftest import MakeVideo


@pytest.fixture
def recipe(make_video: MakeVideo, tmp_path: Path) -> Recipe:
    """Eight clips of one video."""
    source = FilesSource(path=make_video(num_frames=40))
    clips = ClipsSection(num_frames=5, height=16, width=16)
    return Recipe(cache=str(tmp_path / "out"), sources=(source,), clips=clips)


@pytest.fixture
def order(recipe: Recipe) -> ClipOrder:
    return ClipOrder(plan_once(recipe, Folder(recipe.cache), LineDisplay()), seed=0)


def first_ids(order: ClipOrder, number: int) -> list[str]:
    return [next(order.candidates(place)).clip_id for place in range(number)]


class Decoder:
    """Decodes all but some clips, each into the digits of its id."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.asked, self.is_closed = failing, [], False

    def decode(self, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
        for clip in clips:
            self.asked.append(clip.clip_id)
            if clip.clip_id in self.failing:
                yield ClipFailure(clip_id=clip.clip_id, step="decode", reason="broken")
                continue
            frames = np.full((5, 16, 16, 3), int(clip.clip_id[:2], 16), np.uint8)
            times = clip.frame_pts_s
            yield ClipFrames(clip=clip, frames_THWC=frames, decoded_pts_s=times, frame_numbers=(), decoder="")

    def close(self) -> None:
        self.is_closed = True


def taken(order: ClipOrder, places: range, *decoders: Decoder) -> list[str]:
    """The clips that come out, failures with a !."""
    stream = ClipStream(order, decoders, places)
    found = [one.clip.clip_id if isinstance(one, ClipFrames) else f"!{one.clip_id}" for one in stream]
    stream.close()
    assert not any(decoder.is_closed for decoder in decoders)
    return found


def test_every_epoch_has_every_clip_once_in_an_order_of_its_own(order: ClipOrder) -> None:
    ids = first_ids(order, 24)
    epochs = [ids[:8], ids[8:16], ids[16:]]
    assert len(set(ids)) == 8
    assert all(sorted(epoch) == sorted(set(ids)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_is_that_of_plan_and_seed(recipe: Recipe, order: ClipOrder) -> None:
    plan = plans_of(Folder(recipe.cache))[0]
    assert first_ids(ClipOrder(plan, seed=0), 24) == first_ids(order, 24)
    assert first_ids(ClipOrder(plan, seed=1), 24) != first_ids(order, 24)


def test_a_plan_stays_as_it_is_when_sources_grow(recipe: Recipe, order: ClipOrder, make_video: MakeVideo) -> None:
    grown = recipe.model_copy(update={"sources": (*recipe.sources, FilesSource(path=make_video("mkv")))})
    plan = plan_once(grown, Folder(recipe.cache), LineDisplay())
    assert plan.num_clips == len(order) == 8
    assert len(plans_of(Folder(recipe.cache))) == 1


def test_clips_come_in_their_order_whichever_decoder_made_them(order: ClipOrder) -> None:
    ids = first_ids(order, 20)
    assert taken(order, range(20), Decoder()) == ids
    assert taken(order, range(20), Decoder(), Decoder(), Decoder()) == ids
    assert taken(order, range(7, 20), Decoder(), Decoder()) == ids[7:]


def test_the_next_clip_of_the_epoch_stands_for_one_that_fails(order: ClipOrder) -> None:
    ids = first_ids(order, 16)
    bad = ids[2]
    here = ids.index(bad, 8)
    following = ids[here + 1] if here < 15 else ids[8]
    wanted = [*ids[:2], ids[3], *ids[3:here], following, *ids[here + 1 :]]
    assert taken(order, range(16), Decoder(bad)) == [*wanted[:2], f"!{bad}", *wanted[2:]]
    several = taken(order, range(16), Decoder(bad), Decoder(bad), Decoder(bad))
    assert [one for one in several if not one.startswith("!")] == wanted
    assert several.count(f"!{bad}") == 1
    assert [one for one in taken(order, range(5, 16), Decoder(bad)) if one != f"!{bad}"] == wanted[5:]


def test_a_clip_that_failed_is_not_asked_for_again(order: ClipOrder) -> None:
    ids = first_ids(order, 8)
    decoder = Decoder(ids[0], ids[1])
    taken(order, range(32), decoder)
    assert [decoder.asked.count(one) for one in ids[:2]] == [1, 1]


def test_where_no_clip_can_be_decoded_it_is_said_why(order: ClipOrder) -> None:
    with pytest.raises(
        SourceError, match="none of the 8 clips can be decoded, the first because of: broken: give sour"
    ):
        taken(order, range(4), Decoder(*first_ids(order, 8)))


def test_a_stream_that_is_closed_early_stops_its_decoders(order: ClipOrder) -> None:
    decoders = [Decoder(), Decoder()]
    stream = ClipStream(order, decoders, range(10**12))
    first = [one.clip.clip_id for one in islice(stream, 5) if isinstance(one, ClipFrames)]
    stream.close()
    assert first == first_ids(order, 5)
    assert all(decoder.is_closed for decoder in decoders)


def test_videos_that_give_no_clip_are_refused(recipe: Recipe, unreadable: dict[str, str]) -> None:
    broken = recipe.model_copy(update={"sources": (FilesSource(path=unreadable["garbage"]),)})
    with pytest.raises(
        SourceError, match=r"no video in .*garbage\.mp4 gives a clip to train on, for the reasons above"
    ):
        plan_once(broken, Folder(recipe.cache), LineDisplay())
    assert plan_once(recipe, Folder(recipe.cache), LineDisplay()).num_clips == 8

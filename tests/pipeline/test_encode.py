"""Models see one batch shape, chosen for the memory there is, and smaller ones only where memory runs short."""

import numpy as np
import pytest
import torch

from tokenmill.pipeline.encode import LARGEST_BATCH, VALUES, BatchEncoder, EncodedBatch, largest_batch
from tokenmill.schemas.clip import Clip, FrameBatch, Sampling, Video
from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers.base import NO_CODE, FakeTokenizer

SAMPLING = Sampling(fps=None, num_frames=4, height=8, width=8, resize="squash/bilinear", tail="pad")


class Short(FakeTokenizer):
    """Has memory for so many clips."""

    is_batched = True

    def __init__(self, most: int) -> None:
        self.most, self.shapes = most, []

    def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        self.shapes.append(len(frames_BTHWC))
        if len(frames_BTHWC) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return super().encode(frames_BTHWC)


def batch_of(num_clips: int) -> FrameBatch:
    video = Video(uri="v", size_bytes=1, digest="uri:v")
    clips = [
        Clip(clip_id=f"{i:032x}", video=video, start_s=i, end_s=i + 1, frame_pts_s=(i, i + 0.2, i + 0.4, i + 0.6))
        for i in range(num_clips)
    ]
    frames = np.stack([np.full((4, 8, 8, 3), 10 * i, np.uint8) for i in range(num_clips)])
    return FrameBatch(clips=tuple(clips), frames_BTHWC=frames, num_valid_B=(4,) * num_clips)


def codes_of(encoder: BatchEncoder, num_clips: int) -> list[int]:
    return encoder.encode(batch_of(num_clips)).wait()[VALUES].flatten().tolist()


def test_the_last_batch_is_filled_up_where_clips_are_computed_together() -> None:
    together, singly = Short(100), Short(100)
    singly.is_batched = False
    for tokenizer, shapes in ((together, [4, 4]), (singly, [4, 2])):
        encoder = BatchEncoder(tokenizer=tokenizer, batch_size=4, sampling=SAMPLING)
        assert codes_of(encoder, 6) == [0, 10, 20, 30, 40, 50]
        assert tokenizer.shapes == shapes
        assert encoder.encode(batch_of(6)).num_splits == 0


def test_a_batch_that_memory_does_not_hold_is_encoded_in_halves_and_counted() -> None:
    tokenizer = Short(3)
    encoder = BatchEncoder(tokenizer=tokenizer, batch_size=8, sampling=SAMPLING)
    assert codes_of(encoder, 7) == [0, 10, 20, 30, 40, 50, 60]
    assert tokenizer.shapes == [8, 4, 2, 2, 4, 2, 2]  # halves are filled up to a shape too
    assert encoder.encode(batch_of(7)).num_splits == 3


def test_memory_for_no_clip_is_an_error() -> None:
    encoder = BatchEncoder(tokenizer=Short(0), batch_size=4, sampling=SAMPLING)
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(batch_of(4))


@pytest.mark.parametrize(("most", "size"), [(1, 1), (4, 2), (9, 4), (10_000, LARGEST_BATCH)])
def test_the_largest_batch_leaves_half_of_the_memory_free(most: int, size: int) -> None:
    assert largest_batch(Short(most), SAMPLING) == size


@pytest.mark.parametrize(
    "tokens",
    [torch.tensor([[1.0, float("nan")]]), torch.tensor([[float("inf")]]), torch.tensor([[3, NO_CODE]])],
    ids=str,
)
def test_values_that_are_no_numbers_are_never_stored(tokens: torch.Tensor) -> None:
    with pytest.raises(TokenizerError, match="not finite: set dtype"):
        EncodedBatch({VALUES: tokens}, (1,), num_splits=0).wait()

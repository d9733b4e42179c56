"""Planes of small integers come back as they were, in few bytes, and damage is noticed."""

import numpy as np
import pytest

from tokenmill.pipeline.label_codec import pack_planes, unpack_planes

SHAPES = [(1, 1, 1), (3, 5, 7), (16, 64, 48), (1, 0, 4), (300, 3, 2)]


def blobs(shape: tuple[int, int, int], block: int) -> np.ndarray:
    """Random ids in blocks of pixels that last for all frames."""
    _, h, w = shape
    small = np.random.default_rng(0).integers(0, 256, (1, -(-h // block), -(-w // block)), dtype=np.uint8)
    return np.broadcast_to(small.repeat(block, 1).repeat(block, 2)[:, :h, :w], shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [1, 16])
def test_planes_come_back_as_they_were(shape: tuple[int, int, int], block: int) -> None:
    planes = blobs(shape, block)
    np.testing.assert_array_equal(unpack_planes(pack_planes(planes), shape), planes)


def test_the_smaller_of_runs_and_planes_is_kept() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64), dtype=np.uint8)
    large = np.zeros((16, 224, 224), np.uint8)
    large[:, 60:160, 60:160] = 1
    assert (pack_planes(noise)[:1], pack_planes(large)[:1]) == (b"p", b"r")
    assert len(pack_planes(large)) < large.size / 1000


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda packed: packed[:9] + bytes(4) + packed[13:], "damaged"),
        (lambda packed: b"x" + packed[1:], "form b'x'"),
        (lambda packed: pack_planes(np.zeros((1, 2, 2), np.uint8)), r"are none of shape \(3, 5, 7\)"),
        (lambda packed: packed[:20], "damaged"),
    ],
)
def test_what_was_not_packed_so_is_refused(harm, message: str) -> None:
    packed = pack_planes(np.random.default_rng(0).integers(0, 9, (3, 5, 7), dtype=np.uint8))
    with pytest.raises(ValueError, match=message):
        unpack_planes(harm(packed), (3, 5, 7))

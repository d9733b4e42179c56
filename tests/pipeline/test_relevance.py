"""Relevance: cosines, smoothing by hand, and the span that fits best."""

import numpy as np
import pytest

from tokenmill.pipeline.relevance import FakeEncoder, best_span, relevance, smoothed, unit


def test_relevance_is_the_cosine() -> None:
    scorer = FakeEncoder()
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    frames[1, ..., 0], frames[2, ..., 2] = 255, 255
    scores = relevance(scorer.embed_frames(frames), scorer.embed_texts(["a red thing"])[0])
    assert scores.argmax() == 1
    assert scores[1] == pytest.approx(1)
    assert np.allclose(np.linalg.norm(scorer.embed_frames(frames), axis=1), 1)
    assert not scorer.embed_texts(["nothing known"]).any()


def test_scores_are_smoothed_over_the_frames_that_there_are() -> None:
    assert smoothed(np.array([0.0, 3, 0, 0, 6]), 3).tolist() == [1.5, 1, 1, 2, 3]
    scores = np.random.default_rng(0).random(40)
    wanted = [scores[max(0, i - 12) : i + 13].mean() for i in range(40)]
    assert np.allclose(smoothed(scores), wanted)
    assert smoothed(scores, 1).tolist() == scores.tolist()
    with pytest.raises(ValueError, match="an odd number of frames: window=4"):
        smoothed(scores, 4)


@pytest.mark.parametrize(
    ("scores", "span"),
    [
        ([0.1, 0.9, 0.9, 0.1, 0.6, 0.0], (1, 3)),
        ([0.6, 0.6, 0.1, 0.6, 0.6, 0.6], (3, 6)),
        ([0.6, 0.0, 0.6], (0, 1)),
        ([0.5], (0, 1)),
        ([0.4, 0.2], None),
    ],
)
def test_the_best_span_has_the_highest_mean(scores: list[float], span: tuple[int, int] | None) -> None:
    assert best_span(np.array(scores), 0.5) == span


def test_vectors_without_length_stay_so() -> None:
    assert unit(np.array([[3.0, 4], [0, 0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]

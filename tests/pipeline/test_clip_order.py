"""The order of clips in an epoch."""

import numpy as np
import pytest

from tokenmill.pipeline.clip_order import ClipOrder, shares


def order(*sizes: int, shuffle: str = "window", window: int = 64, run: int = 10, **others: object) -> ClipOrder:
    settings: dict = {"weights": (1.0,) * len(sizes), "seed": 7, **others}
    return ClipOrder(sizes, shuffle=shuffle, window=window, run=run, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("shuffle", ["none", "window", "global"])
@pytest.mark.parametrize("size", [1, 9, 10, 63, 1000, 1007])
def test_an_epoch_has_every_clip_once(shuffle: str, size: int) -> None:
    one = order(size, shuffle=shuffle)
    _, clips = one.clips(3, np.arange(size))
    assert np.array_equal(np.sort(clips), np.arange(size))
    some = np.random.default_rng(0).permutation(size)[:20]
    assert np.array_equal(one.clips(3, some)[1], clips[some])


@pytest.mark.parametrize("shuffle", ["window", "global"])
def test_epochs_and_seeds_have_orders_of_their_own(shuffle: str) -> None:
    found = {
        tuple(order(500, shuffle=shuffle, seed=seed).clips(epoch, np.arange(500))[1])
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(found) == 4


def test_a_window_has_whole_runs_and_no_more_than_its_share() -> None:
    _, clips = order(1000, window=50).clips(0, np.arange(1000))
    for begin in range(0, 1000, 50):
        runs, counts = np.unique(clips[begin : begin + 50] // 10, return_counts=True)
        assert len(runs) == 5
        assert set(counts) == {10}
    assert np.abs(np.diff(clips[:50])).mean() > 20  # and they are mixed in it


def test_shares_are_whole_and_as_near_to_the_weights_as_can_be() -> None:
    assert shares([3, 1], 100).tolist() == [75, 25]
    assert shares([1, 1, 1], 100).sum() == 100
    assert shares([1, 1e-9], 1000).tolist() == [999, 1]


def test_a_mixture_goes_on_through_its_sources_over_epochs() -> None:
    one = order(700, 30, shuffle="global", weights=(0.5, 0.5))
    seen: list[np.ndarray] = []
    for epoch in range(3):
        sources, clips = one.clips(epoch, np.arange(730))
        assert abs((sources == 0).mean() - 0.5) < 0.01
        seen.append(clips[sources == 0])
        counts = np.bincount(clips[sources == 1], minlength=30)
        assert counts.max() - counts.min() <= 2
    together = np.bincount(np.concatenate(seen), minlength=700)
    assert together.max() - together.min() <= 1

"""Permutations that are computed."""

import numpy as np
import pytest

from tokenmill.pipeline.permutation import key_of, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100, 1000, 65_536, 100_003])
def test_every_number_comes_once(size: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(size), size, key_of(1))), np.arange(size))


def test_a_number_is_found_without_the_others_and_among_very_many() -> None:
    whole = permuted(np.arange(10_007), 10_007, key_of(4))
    some = np.random.default_rng(0).permutation(10_007)[:50]
    assert np.array_equal(permuted(some, 10_007, key_of(4)), whole[some])
    far = permuted(np.arange(10**12, 10**12 + 1000), 10**13, key_of(4))
    assert len(set(far.tolist())) == 1000
    assert 0 <= far.min() < far.max() < 10**13


def test_it_looks_random() -> None:
    """Distances of neighbours, fixed points and correlation are those of random permutations, within five sigma."""
    size, keys = 1000, range(200)
    found = np.stack([permuted(np.arange(size), size, key_of(key)) for key in keys])
    distance = np.abs(np.diff(found)).mean() / (size / 3)
    assert abs(distance - 1) < 5 * 0.022 / np.sqrt(len(keys))
    assert abs((found == np.arange(size)).sum(axis=1).mean() - 1) < 5 / np.sqrt(len(keys))
    correlations = [np.corrcoef(one, np.arange(size))[0, 1] for one in found]
    assert abs(np.mean(correlations)) < 5 / np.sqrt(size * len(keys))
    places = np.stack([found[:, 0], found[:, 500]])
    assert len(np.unique(places)) > 300  # other keys, other places


def test_keys_differ_by_every_part_and_their_order() -> None:
    keys = {key_of(*parts) for parts in [(1,), (2,), (1, 2), (2, 1), (1, 2, 0), (0, 1, 2)]}
    assert len(keys) == 6

"""Slots of chunks are linked to trajectories by their features."""

import numpy as np

from tokenmill.tokenizers.trajtok_link import linked


def units(*angles: float) -> np.ndarray:
    """Features (K,2) of so many degrees."""
    return np.stack([(np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))) for angle in angles]).astype(np.float32)


def link(*chunks: tuple[float | None, ...], threshold: float | None = 0.0) -> list[list[int]]:
    """Trajectories of slots whose features point so many degrees; None is a slot that is not valid."""
    queries = np.stack([units(*(angle or 0 for angle in chunk)) for chunk in chunks])
    valid = np.array([[angle is not None for angle in chunk] for chunk in chunks])
    return linked(queries, valid, threshold).tolist()


def test_permuted_slots_keep_their_trajectories() -> None:
    random = np.random.default_rng(0)
    first = random.standard_normal((40, 16)).astype(np.float32)
    orders = [np.arange(40), random.permutation(40), random.permutation(40)]
    noisy = [first[order] * 3 + 0.1 * random.standard_normal((40, 16)).astype(np.float32) for order in orders]
    found = linked(np.stack(noisy), np.ones((3, 40), bool), 0.5)
    assert np.array_equal(found, np.stack(orders))


def test_a_trajectory_that_vanishes_comes_back_by_its_last_features() -> None:
    assert link((10, 100), (25, None), (None, 101), (40, 98), threshold=0.9) == [[0, 1], [0, -1], [-1, 1], [0, 1]]
    assert link((10, 100), (100, None), (12, 99)) == [[0, 1], [1, -1], [0, 1]]
    # By steps of 20 degrees, cosine 0.94, it has turned by 60, of cosine 0.5.
    assert link((0,), (20,), (40,), (60,), threshold=0.9) == [[0], [0], [0], [0]]


def test_slots_that_are_like_none_begin_trajectories() -> None:
    assert link((0, 90), (180, 91)) == [[0, 1], [2, 1]]
    assert link((0, 90), (180, 91), threshold=-1) == [[0, 1], [0, 1]]
    assert link((0, None), (50, 2), threshold=0.5) == [[0, -1], [1, 0]]
    assert link((0, 90), (1, 91), threshold=None) == [[0, 1], [2, 3]]
    assert link((None, None), (None, 5)) == [[-1, -1], [-1, 0]]


def test_pairs_below_the_threshold_do_not_displace_others() -> None:
    # Cosines of 18 degrees with 0 and 46: .95 and .88; of 337 degrees: .92 and .36. In sum 18 with 46 and 337 with 0
    # are the best, but 18 with 46 is not allowed.
    assert link((0, 46), (18, 337), threshold=0.9) == [[0, 1], [0, 2]]
    assert link((0, 46), (18, 337)) == [[0, 1], [1, 0]]


def test_ties_go_the_same_way_every_time() -> None:
    assert link((7, 7, 7), (7, 7, 7), (7, None, 7)) == [[0, 1, 2], [0, 1, 2], [0, -1, 1]]
    assert link((30, 30), (30, 30), threshold=1.0) == [[0, 1], [0, 1]]
    zeros = np.zeros((2, 3, 4), np.float32)
    assert linked(zeros, np.ones((2, 3), bool), 0.5).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_features_that_are_no_numbers_link_nothing() -> None:
    queries = np.stack([units(0, 90), units(0, 90)])
    queries[1, 0] = np.inf
    queries[1, 1] = np.nan
    assert linked(queries, np.ones((2, 2), bool), 0.5).tolist() == [[0, 1], [2, 3]]

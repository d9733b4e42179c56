"""Budgets are kept and used, more matters more, and a larger budget never takes anything away."""

from typing import Any

import numpy as np
import pytest

from tokenmill.pipeline.allocation import TIERS, Policy, allocate, image_budget
from tokenmill.schemas.errors import RecipeError

CASES = 5_000
NESTED: list[tuple[Policy, bool]] = [("fragment", False), ("fragment", True), ("utility", False)]
ALL: list[Policy] = ["global", "fragment", "utility", "paper_global", "paper_fragment"]


def instances(seed: int) -> Any:
    """Relevance, budget, tiers and floor: few values, many ties, and values one unit of rounding apart."""
    rng = np.random.default_rng(seed)
    for _ in range(CASES):
        num_frames = int(rng.integers(1, 24))
        kind = rng.integers(4)
        p = rng.random(num_frames) if kind else rng.integers(0, 3, num_frames) / 2
        if kind == 2:
            p = np.nextafter(np.full(num_frames, rng.choice([0.3, 0.5, 0.7])), rng.integers(0, 2, num_frames))
        tiers = tuple(sorted(rng.choice(np.arange(1, 40), rng.integers(1, 5), replace=False).tolist()))
        budget, floor = int(rng.integers(0, 30 * num_frames)), int(rng.integers(0, 9))
        yield p, budget, tiers, floor, rng


def floor_bins(p: np.ndarray, floor: int) -> list[range]:
    n = len(p)
    bins = [range(g * n // floor, (g + 1) * n // floor) for g in range(floor)]
    return [one for one in bins if len(one)]


@pytest.mark.parametrize("policy", ALL)
def test_no_budget_is_exceeded(policy: Policy) -> None:
    for p, budget, tiers, floor, _ in instances(1):
        given = allocate(p, 20 * budget, policy, tiers, floor)
        assert given.sum() <= 20 * budget
        assert given.dtype == np.int64
        assert (given >= 0).all()


@pytest.mark.parametrize(("policy", "fill"), NESTED)
def test_what_is_left_is_less_than_the_next_upgrade(policy: Policy, fill: bool) -> None:
    for p, budget, tiers, floor, _ in instances(2):
        given = allocate(p, budget, policy, tiers, floor, fill=fill)
        largest_step = max(np.diff([0, *tiers])) if policy == "utility" else max(tiers[0], tiers[-1] - tiers[0])
        more = allocate(p, budget + int(largest_step), policy, tiers, floor, fill=fill)
        everything = allocate(p, 10**9, policy, tiers, floor, fill=fill)
        assert (given == everything).all() or more.sum() > given.sum()
        assert (given == everything).all() or budget - given.sum() < largest_step


@pytest.mark.parametrize(("policy", "fill"), NESTED)
def test_frames_that_matter_more_have_no_less(policy: Policy, fill: bool) -> None:
    for p, budget, tiers, floor, _ in instances(3):
        given = allocate(p, budget, policy, tiers, floor, fill=fill)
        less = (p[:, None] > p[None]) & (given[:, None] < given[None])
        for j in {int(j) for j in np.argwhere(less)[:, 1]}:
            assert given[j] == tiers[0]  # a floor frame alone may be before a better one, at the lowest tier
            assert any(j in one and p[j] == p[list(one)].max() for one in floor_bins(p, floor))


@pytest.mark.parametrize(("policy", "fill"), NESTED)
def test_mattering_more_never_costs_a_frame_tokens(policy: Policy, fill: bool) -> None:
    for p, budget, tiers, floor, rng in instances(4):
        i = int(rng.integers(len(p)))
        higher = p.copy()
        higher[i] = rng.choice([np.nextafter(p[i], 2), p[i] + (1 - p[i]) * rng.random(), 1.0])
        before = allocate(p, budget, policy, tiers, floor, fill=fill)
        assert allocate(higher.clip(0, 1), budget, policy, tiers, floor, fill=fill)[i] >= before[i]


@pytest.mark.parametrize(("policy", "fill"), NESTED)
def test_a_larger_budget_takes_nothing_away(policy: Policy, fill: bool) -> None:
    for p, budget, tiers, floor, rng in instances(5):
        more = budget + int(rng.integers(0, 100))
        small, large = (allocate(p, b, policy, tiers, floor, fill=fill) for b in (budget, more))
        assert (small <= large).all()


@pytest.mark.parametrize(("policy", "fill"), NESTED)
def test_every_part_of_the_clip_has_a_frame_where_the_budget_allows(policy: Policy, fill: bool) -> None:
    for p, budget, tiers, floor, _ in instances(6):
        given = allocate(p, max(budget, floor * tiers[0]), policy, tiers, floor, fill=fill)
        assert all(given[list(one)].max() >= tiers[0] for one in (floor_bins(p, floor) if floor else []))


def test_a_cut_floor_is_still_spread_over_the_clip() -> None:
    given = allocate(np.zeros(64), 3 * 64, "fragment", floor=8)
    assert np.flatnonzero(given).tolist() == [0, 16, 32]  # bins 0, 4, 2 of 8


def test_global_frames_are_alike_and_evenly_spaced() -> None:
    for p, budget, tiers, _, _ in instances(7):
        given = allocate(p, budget, "global", tiers)
        chosen = np.flatnonzero(given)
        assert len(set(given[chosen].tolist())) <= 1
        if len(chosen) > 1:
            assert np.diff(chosen).max() - np.diff(chosen).min() <= 1


def test_the_numbers_of_the_paper() -> None:
    twenty = np.where(np.arange(64) < 20, 0.9, 0.1)
    assert allocate(twenty, 7_936, "fragment", (64, 256)).sum() == 7_936
    assert allocate(twenty, 12_288, "global").tolist() == [128] * 64
    assert allocate(twenty, 7_936, "global").sum() == 4_096
    assert allocate(twenty, 7_936, "paper_global").sum() == 62 * 128
    for num_relevant, wanted in ((42, 12_160), (43, 12_288)):
        p = np.where(np.arange(64) < num_relevant, 0.9, 0.1)
        given = allocate(p, 12_288, "paper_fragment")
        assert given.sum() == wanted
        assert (given == 256).sum() == num_relevant
        assert (given == 64).sum() == (22 if num_relevant == 42 else 20)
    all_relevant = allocate(np.ones(64), 12_288, "fragment", (64, 256))
    assert ((all_relevant == 256).sum(), (all_relevant > 0).sum()) == (42, 64)
    starved = allocate(np.where(np.arange(64) % 2 == 0, 0.9, 0.1), 8 * 256, "paper_fragment")
    assert np.flatnonzero(starved).tolist() == [4 * 2 * i + 4 for i in range(8)]
    assert allocate(np.full(4, 0.5), 1_000, "paper_fragment").tolist() == [64] * 4  # relevant is above 0.5
    assert image_budget(16_384, 300, 512) == 16_384 - 300 - 512 - 100
    assert image_budget(100, 300, 512) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy": "half"}, "policy: found 'half'; accepted: global, fragment"),
        ({"tiers": ()}, "tiers: found"),
        ({"tiers": (64, 64)}, "different numbers of tokens"),
        ({"tiers": (0, 64)}, "from 1 on"),
        ({"budget": -1}, "budget: found -1"),
        ({"floor": -1}, "floor: found -1"),
    ],
)
def test_what_cannot_be_allocated_is_refused(change: dict[str, Any], said: str) -> None:
    settings = {"budget": 100, "policy": "fragment", "tiers": TIERS, "floor": 0} | change
    with pytest.raises(RecipeError, match=said):
        allocate(np.ones(3), **settings)


@pytest.mark.parametrize("p", [np.array([0.5, np.nan]), np.array([1.1]), np.array([-0.1]), np.zeros((2, 2))])
def test_relevance_is_from_0_to_1(p: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one number from 0 to 1 for each frame"):
        allocate(p, 100, "fragment")


def test_no_frames_have_no_tokens() -> None:
    assert [len(allocate(np.zeros(0), 100, policy, floor=3)) for policy in ALL] == [0] * 5

"""Which policy a query has, and what policies give with tiers of any sizes."""

from typing import get_args

import numpy as np
import pytest

from tokenmill.pipeline.allocation import Policy, allocate
from tokenmill.pipeline.policy import choose_policy, tokens_given
from tokenmill.schemas.errors import RecipeError

FLAT = np.full(64, 0.7)
PLANTED = np.where(np.arange(64) // 6 == 4, 0.9, 0.1)


def test_flat_scores_are_of_the_whole_video_and_planted_ones_of_parts() -> None:
    assert choose_policy(FLAT).policy == "global"
    assert choose_policy(FLAT + np.linspace(0, 0.2, 64)).policy == "global"
    decision = choose_policy(PLANTED)
    assert decision.policy == "fragment"
    assert decision.contrast == pytest.approx(0.9 - 0.1 - 0.8 * 6 / 64 - 0.8 / 7)  # six of the best seven are planted
    assert decision.reason == "the best tenth of 64 frames is 0.61 above the mean in p, more than 0.25"
    assert choose_policy(PLANTED, delta=0.7).policy == "global"
    assert choose_policy(np.array([0.3])).policy == "global"


@pytest.mark.parametrize(
    ("p_fragment", "policy"), [(0.6, "fragment"), (1.0, "fragment"), (0.59, "global"), (0, "global")]
)
def test_a_head_is_believed_where_it_is_certain(p_fragment: float, policy: str) -> None:
    for p in (FLAT, PLANTED):
        assert choose_policy(p, p_fragment=p_fragment).policy == policy
    assert choose_policy(FLAT, p_fragment=0.5, certainty=0.5).policy == "fragment"


def test_what_cannot_be_decided_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"p_fragment: found 1\.5; accepted: a probability from 0 to 1"):
        choose_policy(FLAT, p_fragment=1.5)
    with pytest.raises(ValueError, match="one frame or more"):
        choose_policy(np.zeros(0))


@pytest.mark.parametrize("policy", get_args(Policy))
def test_frames_of_256_have_what_the_paper_gives(policy: Policy) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        p, budget = rng.random(int(rng.integers(1, 80))), int(rng.integers(0, 20_000))
        tiers = [64, 128, 256]
        assert np.array_equal(tokens_given(p, budget, policy, tiers), allocate(p, budget, policy, tiers))


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("tiers", [[12, 24, 48, 96], [6, 12], [15], [12, 21, 35], [96, 192, 288, 384]])
def test_no_policy_gives_what_is_no_tier_or_more_than_the_budget(policy: Policy, tiers: list[int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        num = int(rng.integers(1, 40))
        p, budget = rng.random(num), int(rng.integers(1, num * max(tiers) + 50))
        given = tokens_given(p, budget, policy, tiers, floor=int(rng.integers(0, 4)))
        assert given.sum() <= budget
        assert set(given.tolist()) <= {0, *tiers}


def test_global_goes_down_to_the_lowest_tier_before_it_leaves_frames_out() -> None:
    tiers = [12, 24, 48, 96]
    given = [set(tokens_given(FLAT, 64 * tokens, "global", tiers).tolist()) for tokens in (96, 48, 47, 24, 12)]
    assert given == [{48}, {48}, {24}, {24}, {12}]
    assert np.flatnonzero(tokens_given(FLAT, 4 * 12 + 11, "global", tiers)).tolist() == [8, 24, 40, 56]

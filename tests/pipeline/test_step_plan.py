"""Which positions make the batch of each step."""

import numpy as np
import pytest

from tokenmill.pipeline.step_plan import BudgetPlan, CountPlan, packed


@pytest.mark.parametrize("budget", [300, 512, 4096])
def test_packs_are_full_and_whole(budget: int) -> None:
    tokens = np.random.default_rng(0).integers(20, 301, 4096)
    packs = packed(tokens, budget)
    assert np.array_equal(np.sort(np.concatenate(packs)), np.arange(4096))
    assert max(tokens[pack].sum() for pack in packs) <= budget
    assert tokens.sum() / (len(packs) * budget) > 0.97
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)


def test_a_clip_over_the_budget_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="a clip of 7 tokens is over the budget of 6"):
        packed(np.array([1, 7, 2]), 6)


def plan(tail: str = "keep") -> BudgetPlan:
    lengths = np.random.default_rng(1).integers(1, 9, (3, 10_000))
    return BudgetPlan(
        num_positions=10_000, num_packs=6, budget=16, tail=tail,  # type: ignore[arg-type]
        tokens_of=lambda epoch, positions_N: lengths[epoch, positions_N],
    )  # fmt: skip


@pytest.mark.parametrize("tail", ["keep", "drop", "wrap"])
def test_steps_of_a_budget_are_the_same_wherever_one_begins(tail: str) -> None:
    whole = plan(tail)
    num_steps = whole.num_steps(1)
    found = whole.positions(1, np.arange(num_steps + 5), 0, 1)
    assert found is not None
    assert len(found.ends_S) == num_steps
    steps = np.split(found.positions_N, found.ends_S[:-1])
    if tail == "keep":
        assert np.array_equal(np.sort(np.concatenate(steps)), np.arange(10_000))
    assert whole.positions(1, np.arange(num_steps, num_steps + 3), 0, 1) is None
    for first in (num_steps - 1, 0, num_steps // 2, 5):  # also back
        one = whole.positions(1, np.array([first]), 0, 1)
        assert one is not None
        assert np.array_equal(one.positions_N, steps[first])
        ranks = [whole.positions(1, np.array([first]), rank, 3) for rank in range(3)]
        assert np.array_equal(
            np.sort(np.concatenate([part.positions_N for part in ranks if part])), np.sort(steps[first])
        )
        other = plan(tail)
        other.use_hint(1, whole.hint(1))
        again = other.positions(1, np.array([first]), 0, 1)
        assert again is not None
        assert np.array_equal(again.positions_N, steps[first])


def test_a_hint_spares_packing_what_lies_before() -> None:
    asked: list[int] = []
    one = plan()
    one.positions(0, np.array([300]), 0, 1)
    other = plan()
    inner = other.tokens_of
    other.tokens_of = lambda epoch, positions_N: asked.append(int(positions_N[0])) or inner(epoch, positions_N)
    other.use_hint(0, one.hint(0))
    other.positions(0, np.array([300]), 0, 1)
    assert asked[0] == 4096


def test_counted_steps_end_where_the_epoch_does() -> None:
    one = CountPlan(num_positions=10, batch_size=4, tail="keep")
    assert [one.num_steps(0), CountPlan(num_positions=10, batch_size=4, tail="drop").num_steps(0)] == [3, 2]
    found = one.positions(0, np.arange(1, 9), 1, 2)
    assert found is not None
    assert found.positions_N.tolist() == [5, 7, 9]
    assert found.ends_S.tolist() == [2, 3]
    assert one.positions(0, np.arange(3, 9), 0, 1) is None

"""Codes and digits are the same thing, and rounding is that of the published formula."""

import math

import pytest
import torch

from tokenmill.tokenizers.fsq import Fsq


@pytest.mark.parametrize("levels", [(8,), (8, 8, 8, 8, 8), (3, 5), (2, 7, 4), (8, 6, 5)])
def test_codes_and_digits_are_one_to_one(levels: tuple[int, ...]) -> None:
    fsq = Fsq(levels)
    assert fsq.codebook_size == math.prod(levels)
    codes = torch.arange(fsq.codebook_size, dtype=torch.int32)
    digits = fsq.digits(codes)
    assert len(torch.unique(digits, dim=0)) == fsq.codebook_size
    assert (digits >= 0).all()
    assert (digits < torch.tensor(levels)).all()
    assert torch.equal(fsq.codes(digits), codes)


@pytest.mark.parametrize("levels", [(8, 8), (3, 5), (2, 7, 4)])
def test_every_value_is_reached_and_is_its_own_code(levels: tuple[int, ...]) -> None:
    fsq, latents = Fsq(levels), 10 * torch.rand(20_000, len(levels), generator=torch.Generator().manual_seed(0)) - 5
    values, codes = fsq.quantize(latents)
    assert codes.dtype == torch.int32
    assert set(codes.tolist()) == set(range(fsq.codebook_size))
    assert torch.equal(fsq.values(codes), values)
    assert values.abs().max() <= 1


def test_the_first_channel_is_the_lowest_digit() -> None:
    assert Fsq((8, 8, 8)).digits(torch.tensor(1 + 2 * 8 + 3 * 64)).tolist() == [1, 2, 3]
    assert Fsq((3, 5)).codes(torch.tensor([2, 4])).item() == 2 + 4 * 3


def test_levels_lie_as_published() -> None:
    """Eight levels: from -4 to 3 quarters, bounded by tanh; odd numbers lie around zero."""
    values, _ = Fsq((8, 5)).quantize(torch.tensor([[-9.0, -9.0], [0.0, 0.0], [9.0, 9.0], [0.45, 0.3]]))
    assert values.tolist() == [[-1.0, -1.0], [0.0, 0.0], [0.75, 1.0], [0.25, 0.5]]


def test_margins_say_how_far_the_next_code_is() -> None:
    fsq = Fsq((8,))
    latents = torch.linspace(-2, 2, 4001).unsqueeze(-1)
    codes, margins = fsq.quantize(latents)[1], fsq.margins(latents)
    changed = (codes[1:] != codes[:-1]).nonzero().flatten()
    assert len(changed) == 7
    assert (margins[changed] < 4e-3).all()
    assert margins.max() <= 0.5


@pytest.mark.parametrize("levels", [(), (1, 8), (8,) * 11])
def test_codebooks_that_cannot_be_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="levels"):
        Fsq(levels)

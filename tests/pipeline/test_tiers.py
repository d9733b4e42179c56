"""Tiers are the tokens that they say, from the bytes that they need; steps cover the frames that they were made of."""

import numpy as np
import pytest
import torch

from tokenmill.pipeline.tiers import chosen_tiers, filled, frames_of_steps, spans_of, tiers_of, tokens_of
from tokenmill.pipeline.token_file import TokenLayout, levels_of, to_planes
from tokenmill.schemas.errors import RecipeError
from tokenmill.tokenizers.load import load_tokenizer

STEPS = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}


@pytest.mark.parametrize(
    ("grid", "tokens"),
    [
        ((16, 16), [32, 64, 128, 256]),
        ((8, 12), [12, 24, 48, 96]),
        ((5, 7), [8, 12, 21, 35]),
        ((2, 3), [2, 3, 6]),
        ((1, 4), [4]),
        ((1, 1), [1]),
        ((4, 1), [2, 4]),
    ],
)
def test_grids_are_thinned_out_as_far_as_they_go(grid: tuple[int, int], tokens: list[int]) -> None:
    for shape in ((4, *grid), (4, *grid, 16)):
        tiers = tiers_of(shape)
        assert [tier.num_tokens for tier in tiers] == tokens
        assert [tier.number for tier in tiers] == list(range(1, len(tokens) + 1))


def test_levels_have_a_tier_for_every_number_of_them() -> None:
    assert [tier.num_tokens for tier in tiers_of((5, 4, 6, 3), [(5, 4, 6)] * 3)] == [24, 48, 72]
    assert [tier.num_tokens for tier in tiers_of((10,), [(1, 2, 2), (1, 1, 6)])] == [4, 10]


def test_tiers_are_chosen_by_their_tokens() -> None:
    tiers = tiers_of((4, 16, 16))
    assert [tier.number for tier in chosen_tiers(tiers, (256, 64), "p")] == [2, 4]
    assert chosen_tiers(tiers, None, "p") == list(tiers)
    for wanted in ((64, 100), ()):
        with pytest.raises(RecipeError, match=r"tiers: found .*; tokens/x has tiers of 32, 64, 128, 256 tokens"):
            chosen_tiers(tiers, wanted, "tokens/x")


@pytest.mark.parametrize(
    "kind", [256, 32_768, 1 << 17, 1 << 18, 1 << 20, 1 << 24, 1 << 25, "float16", "float32", "bfloat16"]
)
@pytest.mark.parametrize("grid", [(3, 8, 12), (4, 5, 7), (5, 1, 1), (3, 2, 3)])
def test_tokens_of_any_step_and_tier_come_from_their_own_bytes(kind: int | str, grid: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    if isinstance(kind, int):
        layout = TokenLayout(dtype="uint16", shape=grid, codebook_size=kind)
        values = rng.integers(0, kind, (1, *grid))
        wanted = torch.from_numpy(values[0].astype(np.int32))
    else:
        layout = TokenLayout(dtype=kind, shape=(*grid, 3), codebook_size=None)
        wanted = torch.from_numpy(rng.standard_normal((*grid, 3), np.float32)).to(getattr(torch, kind))
        values = (wanted.view(torch.int16) if kind == "bfloat16" else wanted).numpy()[None]
    planes = to_planes(values, layout)
    for step in range(grid[0]):
        for tier in tiers_of(layout.shape):
            spans = spans_of(layout, step, tier)
            found = tokens_of(
                [planes[one.column][0, one.begin : one.end].tobytes() for one in spans], layout, step, tier
            )
            assert torch.equal(found, wanted[step, :: tier.every_rows, :: tier.every_columns])
            assert found.dtype == wanted.dtype
            assert found.shape[0] * found.shape[1] == tier.num_tokens
            row_bits = 8 * sum(layout.widths.values()) / (grid[0] * grid[1])
            most_bits = -(-grid[1] // tier.every_rows) * (row_bits + 2 * 8)  # whole rows, and bytes that are shared
            assert 8 * sum(one.end - one.begin for one in spans) <= most_bits


def test_levels_come_from_the_bytes_of_the_first_alone() -> None:
    rng = np.random.default_rng(0)
    for grids in ([(3, 4, 5)] * 3, [(5, 8, 8), (3, 4, 4), (3, 2, 2)]):
        layout = TokenLayout.of_levels(grids, 1 << 16)
        values = rng.integers(0, 1 << 16, (1, *layout.shape))
        planes, wanted = to_planes(values, layout), levels_of(values, layout)
        for tier in tiers_of(layout.shape, layout.levels):
            for step in range(grids[0][0] if len(layout.shape) == 4 else 1):
                spans = spans_of(layout, step, tier)
                assert {one.column for one in spans} == {f"level_{n}" for n in range(1, tier.levels + 1)}
                assert sum(one.end - one.begin for one in spans) == 2 * tier.num_tokens
                parts = [planes[one.column][0, one.begin : one.end].tobytes() for one in spans]
                found = tokens_of(parts, layout, step, tier).numpy()
                if len(layout.shape) == 4:
                    assert np.array_equal(found, values[0, step, ..., : tier.levels])
                else:
                    assert np.array_equal(found, np.concatenate([one.ravel() for one in wanted[: tier.levels]]))


def test_a_thinned_step_is_filled_from_the_nearest_token_and_decodes() -> None:
    step = torch.arange(8 * 12).reshape(8, 12)
    for s, tier in ((8, 1), (4, 2), (2, 3), (1, 4)):
        rows, columns = STEPS[s]
        whole = filled(step[::rows, ::columns], tier, (8, 12))
        assert whole.shape == (8, 12)
        assert torch.equal(whole[::rows, ::columns], step[::rows, ::columns])  # tokens that are there stay in place
    assert (filled(step[::4, ::2], 1, (8, 12))[:, 0] // 12).tolist() == [0, 0, 0, 4, 4, 4, 4, 4]
    latents = torch.randn(3, 4, 5).to(torch.bfloat16)
    assert filled(latents, 2, (5, 7)).shape == (5, 7, 5)
    tokenizer = load_tokenizer("dct_fsq/488_262144")
    grey = torch.full((1, 4, 64, 96, 3), 120, dtype=torch.uint8)
    codes = tokenizer.encode(grey)
    frames = tokenizer.decode(filled(codes[0, 0, ::4, ::2], 1, (8, 12))[None, None])
    assert torch.equal(frames, tokenizer.decode(codes))


@pytest.mark.parametrize(
    ("num_frames", "num_steps", "tokenizer", "lengths"),
    [
        (16, 4, {"stride_thw": [4, 8, 8]}, [4, 4, 4, 4]),
        (16, 4, {}, [4, 4, 4, 4]),
        (17, 5, {"stride_thw": [4, 8, 8]}, [1, 4, 4, 4, 4]),
        (17, 5, {}, [1, 4, 4, 4, 4]),
        (1, 1, {"stride_thw": [4, 8, 8]}, [1]),
        (16, 5, {"name": "pyratok/release", "stride_thw": [4, 8, 8]}, [1, 4, 4, 4, 3]),
        (19, 5, {"name": "vidtok/fsq_causal_488_32768_v1_1", "stride_thw": [4, 8, 8]}, [3, 4, 4, 4, 4]),
        (34, 10, {"name": "vidtok/fsq_causal_488_32768", "stride_thw": [4, 8, 8]}, [1, 4, 4, 4, 4] * 2),
        (34, 10, {"name": "pyratok/release", "stride_thw": [4, 8, 8]}, [1, *[4] * 8, 1]),
        (20, 10, {"name": "vidtok/fsq_causal_488_32768", "stride_thw": [4, 8, 8]}, [1, 4, 4, 4, 4, 1, 2, 0, 0, 0]),
        (9, 3, {"name": "vidtok/fsq_causal_488_32768", "stride_thw": [4, 8, 8]}, [1, 4, 4]),
        (10, 5, {"name": "vidtok/fsq_causal_488_32768", "stride_thw": [4, 8, 8]}, [1, 4, 4, 1, 0]),
        (30, 8, {"name": "vidtok/kl_noncausal_488_4chn", "stride_thw": [4, 8, 8]}, [*[4] * 7, 2]),
        (17, 9, {"name": "vidtok/kl_causal_288_8chn", "stride_thw": [2, 8, 8]}, [1, *[2] * 8]),
    ],
)
def test_steps_cover_the_frames_that_they_were_made_of(
    num_frames: int, num_steps: int, tokenizer: dict, lengths: list[int]
) -> None:
    steps = frames_of_steps(num_frames, num_steps, tokenizer)
    assert np.maximum(steps.ends_t - steps.begins_t, 0).tolist() == lengths
    is_real = steps.ends_t > steps.begins_t
    assert steps.begins_t[is_real].tolist() == [0, *np.cumsum(lengths)[:-1].tolist()][: is_real.sum()]
    assert steps.ends_t.max() == num_frames

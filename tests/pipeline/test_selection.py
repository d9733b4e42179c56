"""Budgeted retrieval: budgets are kept, tokens are the ones stored, and no other bytes are read."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.selection import PLAN_SCHEMA, Selection, SelectionSettings, select_tokens
from tokenmill.pipeline.tiers import tiers_of
from tokenmill.schemas.errors import CacheError, RecipeError
from tokenmill.tokenizers.load import load_tokenizer
from tokenmill.tokenizers.pyratok import build_release
from tokenmill.tokenizers.pyratok_vae import VaeSizes

from ..tokenizers.pyratok_kit import filled
from .selection_kit import SIZE, TOKENIZERS, make_cache, scored_of, table_of

PRODUCTS = [product for product in TOKENIZERS if product != "tokens/tracks"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    return make_cache(str(tmp_path_factory.mktemp("selection") / "cache"), TOKENIZERS)


def settings_of(policy: Any = "utility", **others: Any) -> SelectionSettings:
    return SelectionSettings(policy=policy, **others)


def wanted_tokens(whole: torch.Tensor, shape: tuple[int, ...], row: dict[str, Any], levels: Any) -> torch.Tensor:
    """What a row of a plan must have, out of the whole clip as `read` gives it."""
    tier = tiers_of(shape, levels)[row["tier"] - 1]
    if whole.ndim == 1:
        return whole[: row["num_tokens"]]
    thinned = whole[row["step"]][:: tier.every_rows, :: tier.every_columns]
    return thinned[..., : tier.levels] if levels else thinned


def check_selection(selection: Selection, budget: int) -> None:
    """What holds of every selection."""
    rows = selection.plan.to_pylist()
    assert selection.plan.schema.equals(PLAN_SCHEMA)
    assert selection.num_tokens == sum(row["num_tokens"] for row in rows) <= budget
    assert selection.bytes_read == sum(one["size"] for row in rows for one in row["ranges"])
    assert [(row["video_id"], row["start_s"], row["step"]) for row in rows] == sorted(
        (row["video_id"], row["start_s"], row["step"]) for row in rows
    )
    assert len(selection.tokens) == len(rows)
    assert len({(row["clip_id"], row["step"]) for row in rows}) == len(rows)
    assert all(row["start_s"] < row["end_s"] for row in rows)


@pytest.mark.parametrize("product", PRODUCTS)
def test_tokens_are_those_of_the_plan_and_no_more_than_the_budget(cache: TokenCache, product: str) -> None:
    scored, entry = scored_of(cache), cache.info.products[product]
    ids = scored["clip_id"].unique().to_pylist()
    whole = dict(zip(ids, cache.read(product, ids), strict=True))
    for policy, budget in (("utility", 3000), ("fragment", 2000), ("global", 2500), ("paper_fragment", 9000)):
        budget *= 8 if product == "tokens/native" else 1
        selection = select_tokens(cache, product, scored, budget, settings_of(policy))
        check_selection(selection, budget)
        assert selection.policy == policy
        assert selection.num_tokens > 1000
        for row, tokens in zip(selection.plan.to_pylist(), selection.tokens, strict=True):
            wanted = wanted_tokens(whole[row["clip_id"]], entry.shape, row, entry.levels)
            assert torch.equal(tokens, wanted)
            assert tokens.dtype == wanted.dtype
            assert row["num_tokens"] == (tokens[..., 0] if tokens.is_floating_point() else tokens).numel()


def zeroed(source: str, target: Path, product: str, selection: Selection) -> TokenCache:
    """A copy of a cache whose token columns hold the bytes of a selection alone, and zeros."""
    shutil.copytree(source, target)
    kept = [one for row in selection.plan["ranges"].to_pylist() for one in row]
    for path in (target / product).iterdir():
        data = path.read_bytes()
        metadata, whole = pq.read_metadata(path), bytearray(data)
        for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
            for column in (group.column(i) for i in range(group.num_columns)):
                if column.path_in_schema.startswith(("tokens", "level_")):
                    begin = column.data_page_offset
                    whole[begin : begin + column.total_compressed_size] = bytes(column.total_compressed_size)
        for one in kept:
            if one["name"] == str(path.relative_to(target)):
                place = slice(one["offset"], one["offset"] + one["size"])
                whole[place] = data[place]
        path.write_bytes(whole)
    return open_cache(str(target))


@pytest.mark.parametrize("product", ["tokens/long", "tokens/brain", "tokens/levels", "tokens/native", "tokens/tracks"])
def test_no_other_bytes_matter(cache: TokenCache, tmp_path: Path, product: str) -> None:
    settings = SelectionSettings() if product == "tokens/tracks" else settings_of()
    budget = {"tokens/native": 30_000, "tokens/tracks": 40}.get(product, 2000)
    selection = select_tokens(cache, product, scored_of(cache), budget, settings)
    damaged = zeroed(cache.folder.url, tmp_path / "cache", product, selection)
    again = select_tokens(damaged, product, scored_of(cache), budget, settings)
    assert again.plan.equals(selection.plan)
    assert again.bytes_read == selection.bytes_read > 0
    assert all(torch.equal(one, other) for one, other in zip(again.tokens, selection.tokens, strict=True))
    with pytest.raises(CacheError, match=r"the row group of \d+ bytes at \d+ is damaged"):
        select_tokens(damaged, product, scored_of(cache), budget, replace(settings, verify=True))


def test_checking_reads_whole_row_groups(cache: TokenCache) -> None:
    plain, checked = (
        select_tokens(cache, "tokens/long", scored_of(cache), 2000, settings_of(verify=verify))
        for verify in (False, True)
    )
    stored = sum(TOKENS_BYTES * 2 + TOKENS_BYTES // 4 for _ in range(cache.clips().num_rows))
    assert checked.bytes_read == plain.bytes_read + stored
    assert all(torch.equal(one, other) for one, other in zip(plain.tokens, checked.tokens, strict=True))


TOKENS_BYTES = 4 * 8 * 12  # codes of a clip


@pytest.fixture(scope="module")
def remote() -> Iterator[TokenCache]:
    tokenizers = {product: TOKENIZERS[product] for product in ("tokens/long", "tokens/tracks")}
    yield make_cache("memory:///selection/cache", tokenizers)
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize(("product", "budget"), [("long", 500), ("tracks", 30)])
def test_a_store_is_asked_for_these_bytes_alone(
    remote: TokenCache, monkeypatch: pytest.MonkeyPatch, product: str, budget: int
) -> None:
    settings = SelectionSettings() if product == "tracks" else settings_of()
    scored = scored_of(remote)  # the index is built by now
    requests: list[tuple[str, int, int]] = []
    plain = MemoryFileSystem.cat_file

    def noted(self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
        data = plain(self, path, start, end)
        requests.append((path.partition("cache/")[2], start or 0, len(data)))
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", noted)
    selection = select_tokens(remote, f"tokens/{product}", scored, budget, settings)
    check_selection(selection, budget)
    assert sum(size for _, _, size in requests) == selection.bytes_read > 0
    ranges = {tuple(one.values()) for row in selection.plan["ranges"].to_pylist() for one in row}
    assert {name for name, _, _ in requests} == {name for name, _, _ in ranges}
    assert len(requests) <= len(ranges)


@pytest.mark.s3
def test_a_cache_in_an_object_store_is_selected_from_alike(cache: TokenCache, s3_server: str, s3_url: str) -> None:
    other = make_cache(f"{s3_url}/cache", {"tokens/long": TOKENIZERS["tokens/long"]})
    here, there = (select_tokens(one, "tokens/long", scored_of(cache), 700, settings_of()) for one in (cache, other))
    assert here.plan.drop(["ranges"]).equals(there.plan.drop(["ranges"]))
    assert here.bytes_read == there.bytes_read
    assert all(torch.equal(one, other) for one, other in zip(here.tokens, there.tokens, strict=True))


@pytest.mark.parametrize("policy", ["fragment", "utility"])
@pytest.mark.parametrize("product", ["tokens/long", "tokens/levels", "tokens/native"])
def test_a_larger_budget_keeps_what_a_smaller_one_had(cache: TokenCache, product: str, policy: str) -> None:
    scored = scored_of(cache, where="video_id < 'uri:3'")
    settings, before = settings_of(policy, floor=3), {}
    many = 8 if product == "tokens/native" else 1
    for budget in range(12 * many, 900 * many, 61 * many):
        rows = select_tokens(cache, product, scored, budget, settings).plan.to_pylist()
        now = {(row["clip_id"], row["step"]): row["tier"] for row in rows}
        assert all(now[place] >= tier for place, tier in before.items())
        before = now
    assert before


def planted(cache: TokenCache, seed: int) -> tuple[pa.Table, set[tuple[str, int]]]:
    """Two candidates for each step: high in spans of a fifth of each video or so; and the steps there."""
    rng, rows, steps = np.random.default_rng(seed), [], set()
    for clip in cache.clips().to_pylist():
        begin = int(rng.integers(0, 4))
        for step in range(-(-clip["num_valid"] // 4)):
            is_planted = step == begin
            steps |= {(clip["clip_id"], step)} if is_planted else set()
            for frame in range(4 * step, min(4 * step + 4, clip["num_valid"]), 2):
                p = 0.75 + 0.2 * rng.random() if is_planted else 0.3 * rng.random()
                rows.append({"clip_id": clip["clip_id"], "frame": frame, "p": p})
    return table_of(rows), steps


@pytest.mark.parametrize("seed", range(3))
def test_planted_evidence_is_had_in_full_at_half_the_budget(cache: TokenCache, seed: int) -> None:
    scored, steps = planted(cache, seed)
    budget = 60 * 96 // 2  # of 60 steps that are not padding
    selection = select_tokens(cache, "tokens/long", scored, budget, SelectionSettings())
    check_selection(selection, budget)
    assert selection.policy == "fragment"
    rows = selection.plan.to_pylist()
    is_evidence = [(row["clip_id"], row["step"]) in steps for row in rows]
    at_top = sum(row["tier"] == 4 for row, one in zip(rows, is_evidence, strict=True) if one)
    assert at_top >= 0.95 * len(steps)
    uniform = select_tokens(cache, "tokens/long", scored, budget, settings_of("global"))
    assert len(uniform.plan) == 60
    assert evidence_share(selection, steps) >= 2 * evidence_share(uniform, steps)


def evidence_share(selection: Selection, steps: set[tuple[str, int]]) -> float:
    tokens = {(row["clip_id"], row["step"]): row["num_tokens"] for row in selection.plan.to_pylist()}
    return sum(tokens.get(step, 0) for step in steps) / sum(tokens.values())


def test_auto_decides_by_scores_or_by_a_head(cache: TokenCache) -> None:
    scored, _ = planted(cache, 0)
    flat = scored.set_column(2, "p", pa.array(np.full(len(scored), 0.6)))
    for table, p_fragment, policy in (
        (scored, None, "fragment"), (flat, None, "global"), (scored, 0.3, "global"), (flat, 0.9, "fragment"),
    ):  # fmt: skip
        selection = select_tokens(cache, "tokens/short", table, 3000, SelectionSettings(p_fragment=p_fragment))
        assert selection.policy == policy
        assert ("p_fragment" in selection.reason) == (p_fragment is not None)


def test_steps_matter_as_their_best_candidate_or_the_nearest_one(cache: TokenCache) -> None:
    clip_id = cache.clips("num_valid = 16")["clip_id"][0].as_py()
    scored = table_of(
        [
            {"clip_id": clip_id, "frame": frame, "p": p}
            for frame, p in ((0, 0.2), (3, 0.9), (3, 0.1), (9, 0.5), (2, 0.4))
        ]
    )
    rows = select_tokens(cache, "tokens/short", scored, 1000, settings_of("fragment")).plan.to_pylist()
    # Frames 4 to 7 are one frame from 3 and two from 9; frames 12 to 15 are nearest to 9.
    assert [(row["step"], row["p"]) for row in rows] == [(0, 0.9), (1, 0.9), (2, 0.5), (3, 0.5)]
    assert [row["tier"] for row in rows] == [4] * 4
    tie = table_of([{"clip_id": clip_id, "frame": frame, "p": p} for frame, p in ((2, 0.1), (9, 0.8))])
    rows = select_tokens(cache, "tokens/short", tie, 1000, settings_of("fragment")).plan.to_pylist()
    assert [row["p"] for row in rows] == [0.1, 0.1, 0.8, 0.8]


def test_padding_is_not_offered_and_spans_are_those_of_real_frames(cache: TokenCache) -> None:
    clips = {clip["clip_id"]: clip for clip in cache.clips("num_valid < 16").to_pylist()}
    scored = scored_of(cache, where="num_valid < 16")
    rows = select_tokens(cache, "tokens/short", scored, 10**6, settings_of("utility")).plan.to_pylist()
    found = {clip_id: [row for row in rows if row["clip_id"] == clip_id] for clip_id in clips}
    for clip_id, clip in clips.items():
        times_s = [*clip["frame_pts_s"], clip["end_s"]]
        steps = range(-(-clip["num_valid"] // 4))
        assert [row["step"] for row in found[clip_id]] == list(steps)
        assert [row["start_s"] for row in found[clip_id]] == [times_s[4 * step] for step in steps]
        ends = [min(4 * step + 4, clip["num_valid"]) for step in steps]
        assert [row["end_s"] for row in found[clip_id]] == [times_s[end] for end in ends]


def test_first_levels_of_causal_steps_are_those_of_pyratok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZE, "num_frames", 17)
    sizes = VaeSizes(base_dim=8, z_dim=16, dim_mult=(1, 2, 2, 2), num_res_blocks=1)
    torch.save({"model_state_dict": filled(build_release(sizes), "job.").state_dict()}, tmp_path / "release.pt")
    tokenizer = load_tokenizer("pyratok/release", str(tmp_path / "release.pt"))
    made = make_cache(str(tmp_path / "cache"), {"tokens/release": tokenizer})
    (clip,) = made.clips("num_valid = 17").slice(0, 1).to_pylist()
    scored = table_of([{"clip_id": clip["clip_id"], "frame": 5 + n, "p": p} for n, p in enumerate((0.9, 0.2))])
    selection = select_tokens(made, "tokens/release", scored, 96 * (4 + 4 + 4 + 3), settings_of())
    rows, whole = selection.plan.to_pylist(), made.read("release", [clip["clip_id"]])[0]
    times_s = [*clip["frame_pts_s"], clip["end_s"]]
    assert [(row["start_s"], row["end_s"]) for row in rows] == [
        (times_s[begin], times_s[end]) for begin, end in ((0, 1), (1, 5), (5, 9), (9, 13), (13, 17))
    ]
    assert [row["p"] for row in rows] == [0.9, 0.9, 0.9, 0.2, 0.2]
    assert [row["tier"] for row in rows] == [4, 4, 4, 2, 1]
    for row, tokens in zip(rows, selection.tokens, strict=True):
        assert torch.equal(tokens, whole[row["step"], ..., : row["tier"]])


def test_whole_trajectories_are_taken_by_how_much_they_matter(cache: TokenCache) -> None:
    clip_id = cache.clips("num_valid = 16")["clip_id"][0].as_py()
    (stored,) = cache.read_trajectories("tracks", [clip_id])
    scored = table_of(
        [{"clip_id": clip_id, "frame": frame, "p": p} for frame, p in ((0, 0.3), (4, 0.6), (7, 0.6), (15, 0.1))]
    )
    wanted = [0, 1, 2]  # all are seen in frame 7; the background has half of its area, and the others less and less
    sizes = [int((stored.trajectories_N == number).sum()) for number in wanted]
    assert sizes == [4, 2, 2]
    taken: list[list[int]] = []
    for budget in range(1, 10):
        selection = select_tokens(cache, "tokens/tracks", scored, budget, SelectionSettings())
        check_selection(selection, budget)
        assert selection.policy == "whole"
        taken.append(sorted(selection.plan["step"].to_pylist()))
        for row, tokens in zip(selection.plan.to_pylist(), selection.tokens, strict=True):
            values = torch.from_numpy(stored.values_Nd[stored.trajectories_N == row["step"]]).view(torch.bfloat16)
            assert torch.equal(tokens, values)
            assert row["p"] == 0.6
    assert taken == [[]] * 3 + [[0]] * 2 + [[0, 1]] * 2 + [[0, 1, 2]] * 2
    later = scored.set_column(2, "p", pa.array([0.3, 0.6, 0.7, 0.1]))
    rows = select_tokens(cache, "tokens/tracks", later, 8, SelectionSettings()).plan.to_pylist()
    assert [(row["step"], row["p"]) for row in rows] == [(0, 0.7), (1, 0.7), (2, 0.7)]
    times_s = cache.clips(f"clip_id = '{clip_id}'")["frame_pts_s"][0].as_py()
    assert [(row["start_s"], row["end_s"]) for row in rows][1:] == [(0, times_s[8]), (times_s[5], times_s[10])]


def test_clips_without_tokens_are_left_out_and_counted(cache: TokenCache) -> None:
    scored = scored_of(cache, where="video_id = 'uri:1'")
    more = table_of([{"clip_id": f"{n:032x}", "frame": 0, "p": 1.0} for n in range(3)])
    selection = select_tokens(cache, "tokens/short", pa.concat_tables([scored, more]), 300, settings_of())
    assert selection.num_left_out == 3
    assert set(selection.plan["video_id"].to_pylist()) == {"uri:1"}
    assert selection.plan.equals(select_tokens(cache, "tokens/short", scored, 300, settings_of()).plan)


@pytest.mark.parametrize(
    ("product", "budget", "settings", "said"),
    [
        ("short", 0, {}, "budget: found 0; accepted: tokens from 1 on"),
        ("short", 9, {"policy": "best"}, "policy: found 'best'; accepted: auto, global, fragment, utility"),
        ("short", 9, {"tiers": (96, 100)}, r"found \[96, 100\]; tokens/short has tiers of 12, 24, 48, 96 tokens"),
        ("levels", 9, {"tiers": (1,)}, "tokens/levels has tiers of 96, 192, 288 tokens"),
        ("short", 9, {"policy": "utility", "floor": -1}, "floor: found -1"),
        ("short", 9, {"p_fragment": 2.0}, "p_fragment: found 2.0"),
        ("tracks", 9, {"tiers": (2,)}, "tokens/tracks: trajectories are taken whole: leave policy at auto"),
        ("tracks", 9, {"policy": "fragment"}, "trajectories are taken whole"),
    ],
)
def test_what_cannot_be_selected_is_refused(
    cache: TokenCache, product: str, budget: int, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        select_tokens(cache, f"tokens/{product}", scored_of(cache), budget, SelectionSettings(**settings))


def test_a_scope_without_tokens_or_with_wrong_scores_is_refused(cache: TokenCache) -> None:
    unknown = table_of([{"clip_id": "0" * 32, "frame": 0, "p": 1.0}])
    with pytest.raises(CacheError, match="none of the 1 clips in scope has tokens of tokens/short: score frames of"):
        select_tokens(cache, "tokens/short", unknown, 9, settings_of())
    with pytest.raises(CacheError, match="none of the 0 clips in scope"):
        select_tokens(cache, "tokens/short", unknown.slice(1), 9, settings_of())
    scored = scored_of(cache)
    for p in (1.5, float("nan")):
        with pytest.raises(ValueError, match="one number from 0 to 1"):
            select_tokens(
                cache, "tokens/short", scored.set_column(2, "p", pa.array([p] * len(scored))), 9, settings_of()
            )


@pytest.mark.parametrize("product", ["short", "tracks"])
def test_files_that_others_have_rewritten_are_named(cache: TokenCache, tmp_path: Path, product: str) -> None:
    shutil.copytree(cache.folder.url, tmp_path / "cache")
    for path in (tmp_path / "cache" / "tokens" / product).iterdir():
        footer = pq.read_metadata(path).metadata
        table = pq.read_table(path).replace_schema_metadata({k: v for k, v in footer.items() if k != b"ARROW:schema"})
        pq.write_table(table, path, compression="zstd")
    rewritten, settings = open_cache(str(tmp_path / "cache")), SelectionSettings()
    with pytest.raises(
        CacheError, match=r"another tool has rewritten it, .* read whole clips \(TokenCache\.read\), or"
    ):
        select_tokens(rewritten, f"tokens/{product}", scored_of(cache), 3000, settings)

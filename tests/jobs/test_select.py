"""What a budget allows for a query, from planted evidence to a plan, a picture and a file; and routers on the way."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

import tokenmill as library
from tokenmill.pipeline.allocation import image_budget
from tokenmill.pipeline.cache import TokenCache
from tokenmill.pipeline.relevance import calibrated
from tokenmill.schemas.errors import CacheError, RecipeError
from tokenmill.schemas.queries import query_id_of
from tokenmill.schemas.relevance import Calibration

from .conftest import Command
from .relevance_kit import FPS, make, planted_recipe, planted_video

NUM_FRAMES = 160
# Steps of the tokenizer are of 4 frames; those of the spans are 40 in all.
SPANS = {"0.mp4": range(16, 48), "1.mp4": range(96, 112), "2.mp4": range(40, 72)}


def _videos(folder: Path) -> None:
    for seed, (name, span) in enumerate(SPANS.items()):
        planted_video(folder / name, NUM_FRAMES, {"red": [span]}, seed)
    planted_video(folder / "none.mp4", NUM_FRAMES, {}, seed=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select")
    make(planted_recipe(folder, {}, _videos))
    return folder / "cache"


@pytest.fixture
def cache(folder: Path) -> TokenCache:
    return library.open_cache(str(folder))


def evidence_of(cache: TokenCache, selection) -> tuple[int, int, int]:
    """Planted steps at the highest tier, planted steps in all, and tokens on them."""
    uris = {row["video_id"]: row["uri"].rpartition("/")[2] for row in cache.sql("from videos").to_pylist()}
    planted = {(name, frame // 4) for name, span in SPANS.items() for frame in span}
    full = tokens = 0
    for row in selection.plan.to_pylist():
        if (uris[row["video_id"]], round(row["start_s"] * FPS) // 4) in planted:
            full += row["num_tokens"] == 64
            tokens += row["num_tokens"]
    return full, len(planted), tokens


def test_at_half_the_budget_the_planted_frames_have_full_detail(cache: TokenCache) -> None:
    whole = 4 * NUM_FRAMES // 4 * 64
    chosen = cache.select("something red", whole // 2, "dct", policy="auto")
    full, planted, tokens = evidence_of(cache, chosen)
    assert chosen.policy == "fragment"
    assert full >= 0.95 * planted
    uniform = cache.select("something red", whole // 2, "dct", policy="global")
    _, _, uniform_tokens = evidence_of(cache, uniform)
    assert tokens / chosen.num_tokens >= 2 * uniform_tokens / uniform.num_tokens


@pytest.mark.parametrize("budget", [1, 500, image_budget(8192, 500, 512), 10**6])
@pytest.mark.parametrize("policy", ["global", "fragment", "utility", "paper_global", "paper_fragment"])
def test_a_budget_is_kept_and_the_plan_says_what_was_read(cache: TokenCache, budget: int, policy: str) -> None:
    chosen = cache.select("red", budget, "dct", policy=policy)
    rows = chosen.plan.to_pylist()
    assert (
        chosen.num_tokens == sum(row["num_tokens"] for row in rows) == sum(t.numel() for t in chosen.tokens) <= budget
    )
    assert chosen.bytes_read == sum(one["size"] for row in rows for one in row["ranges"])
    times = [(row["video_id"], row["start_s"]) for row in rows]
    assert times == sorted(times)


def test_the_budget_of_images_leaves_room_for_words() -> None:
    assert image_budget(16384, 1000, 996) == 16384 - 1000 - 996 - 100
    assert image_budget(500, 300, 200) == 0


def test_a_query_of_the_whole_video_is_global(cache: TokenCache) -> None:
    flat = cache.select("something red", 3000, "dct", where="uri like '%none.mp4'")
    assert flat.policy == "global"
    assert len({row["num_tokens"] for row in flat.plan.to_pylist()}) == 1
    one = cache.select("something red", 3000, "dct", where="uri like '%0.mp4'")
    assert one.policy == "fragment"
    assert cache.select("red", 3000, "dct", where="uri like '%0.mp4'", p_fragment=0.55).policy == "global"
    assert cache.select("red", 3000, "dct", where="uri like '%0.mp4'", p_fragment=0.9).policy == "fragment"


def test_a_context_leaves_its_budget(folder: Path, tokenmill: Command) -> None:
    arguments = ("select", str(folder), "--query", "red", "--context", "900", "--text-tokens", "200")
    run = tokenmill(*arguments, "--generated-tokens", "100")
    assert "of 500 tokens" in run.out, run.err
    refused = {
        "give one of --budget and --context": (*arguments, "--budget", "100"),
        "give --router too": ("score", str(folder), "--query", "red", "--router-model", "m"),
        "and of routers, are kept": ("score", str(folder), "--queries", "q", "--no-keep"),
    }
    for message, wrong in refused.items():
        run = tokenmill(*wrong)
        assert run.code == 2
        assert message in " ".join(run.err.replace("│", " ").split())


def test_settings_that_cannot_be_are_refused(cache: TokenCache) -> None:
    with pytest.raises(CacheError, match="toenail has scored no frame of these clips for 'red'"):
        cache.select("red", 100, "dct", scorer="toenail")
    with pytest.raises(RecipeError, match="budget: found 0; accepted: tokens from 1 on"):
        cache.select("red", 0, "dct")
    with pytest.raises(TypeError, match="polcy"):
        cache.select("red", 100, "dct", polcy="global")


def test_the_command_prints_a_plan_and_writes_tokens_and_a_picture(
    folder: Path, tokenmill: Command, tmp_path: Path
) -> None:
    where = "uri like '%1.mp4'"
    arguments = ("select", str(folder), "--query", "red", "--budget", "700", "--where", where, "--tiers", "16,64")
    run = tokenmill(*arguments, "-o", "tokens.safetensors", "--png", "timeline.png", "--max-rows", "3")
    assert run.code == 0, run.err
    chosen = library.open_cache(str(folder)).select("red", 700, "dct", where=where, tiers=(16, 64))
    assert f"{chosen.plan.num_rows} steps, the first 3 shown; {chosen.num_tokens:,} of 700 tokens" in run.out
    with safe_open("tokens.safetensors", framework="pt") as file:
        stored = [file.get_tensor(str(i)) for i in range(len(chosen.tokens))]
        plan = json.loads(file.metadata()["plan"])
    assert all(torch.equal(a, b) for a, b in zip(stored, chosen.tokens, strict=True))
    assert plan == chosen.plan.to_pylist()
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    run = tokenmill(*arguments[:-1], "16,x")
    assert run.code == 2
    assert "--tiers: found '16,x'; accepted: numbers of tokens" in run.err
    run = tokenmill(*arguments, "-o", "tokens.npy")
    assert run.code == 2
    assert "--output tokens.npy: it is written as .safetensors" in run.err


def likelihood(cache: TokenCache, query: str, calibration: Calibration) -> float:
    """The mean log-likelihood of the labels of a query."""
    rows = cache.sql(
        """select r.raw, r.video_id, l.label from relevance r join labels l using (query_id, clip_id, frame)
           where query_id = ?""",
        [query_id_of(query)],
    )
    p_N = calibrated(rows["raw"].to_numpy(), rows["video_id"].to_numpy(zero_copy_only=False), calibration)
    return float(np.log(np.where(rows["label"].to_numpy() == 1, p_N, 1 - p_N)).mean())


def test_a_router_that_was_trained_on_labels_ranks_the_best_again(
    folder: Path, tokenmill: Command, tmp_path: Path
) -> None:
    queries = [
        f"the {size} red thing number {i}" for i, size in enumerate(["big", "small", "wide", "late", "odd", "old"])
    ]
    with open("labels.jsonl", "w") as file:
        for name, span in SPANS.items():
            for query in queries:
                line = {"video": name, "query": query, "spans_s": [[span.start / FPS, (span.stop - 1) / FPS]]}
                file.write(json.dumps(line) + "\n")
        for i, query in enumerate(queries):
            policy = {"query": query if i % 2 else f"all of {i}", "policy": "fragment" if i % 2 else "global"}
            file.write(json.dumps(policy) + "\n")
    run = tokenmill("labels", "import", str(folder), "labels.jsonl", "--source", "mine")
    assert run.code == 0, run.out + run.err
    kept = library.open_cache(str(folder))
    kept.score(queries)
    for rule in ("standardized", "sigmoid"):
        fitted = kept.fit_calibration("colours", rule)
        before, now = (likelihood(kept, queries[0], one) for one in (Calibration(rule=rule, scale=2, bias=-1), fitted))
        assert fitted.rule == rule
        assert now > before, fitted
    with pytest.raises(CacheError, match="0 frames that nobody has scored are labelled"):
        kept.fit_calibration("nobody")
    training = {"relevance_epochs": 2, "policy_epochs": 20, "batch_size": 32, "checkpoint_every": 50}
    recipe = {"output": "router", "cache": str(folder), "features": "colours", "training": training}
    Path("router.yaml").write_text(yaml.safe_dump(recipe))
    run = tokenmill("train", "router", "router.yaml", "--log-json")
    assert run.code == 0, run.err
    held_out = next(e for line in run.out.splitlines() if (e := json.loads(line))["event"] == "held_out")
    assert held_out["relevance_auroc"] > 0.9, held_out
    arguments = (str(folder), "--query", queries[1], "--router", "router/router.safetensors", "--rerank", "64")
    run = tokenmill("score", *arguments, "--top", "5")
    assert "64 frames are scored by router_" in run.out, run.err
    assert run.out.count(".mp4") == 5
    assert "none.mp4" not in run.out
    run = tokenmill("select", *arguments, "--budget", "2000")
    assert run.code == 0, run.err
    assert "policy fragment: p_fragment is" in run.out
    kept.refresh()
    (counts,) = kept.sql(
        "select scorer, count(*) as n from relevance where scorer like 'router%' group by 1"
    ).to_pylist()
    assert counts["n"] == 64
    (policy,) = kept.sql("from policies where source like 'router:%'").to_pylist()
    assert policy["p_fragment"] > 0.5
    ranks = kept.sql("select raw, p from relevance where scorer = ? order by raw", [counts["scorer"]])
    assert np.allclose(ranks["p"].to_numpy(), 1 / (1 + np.exp(-ranks["raw"].to_numpy().astype(np.float64))))

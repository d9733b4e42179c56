"""Frames are scored for texts that come later: in SQL, without videos, each once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader, Dataset

import tokenmill as library
from tokenmill.pipeline import score_table
from tokenmill.pipeline.cache import TokenCache
from tokenmill.pipeline.cache import open_cache as open_without_encoders
from tokenmill.pipeline.cache_head import read_info, register_products
from tokenmill.pipeline.frame_file import read_embedded_rows
from tokenmill.pipeline.relevance import FakeEncoder, calibrated
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.errors import CacheError, RecipeError
from tokenmill.schemas.queries import query_id_of
from tokenmill.schemas.relevance import STANDARDIZED

from .conftest import Command
from .relevance_kit import make, planted_recipe, planted_video

NUM_VIDEOS, NUM_FRAMES = 5, 208
SHOWN = {"red": [range(40, 56)], "blue": [range(120, 128), range(160, 176)]}


def _videos(folder: Path) -> None:
    for i in range(NUM_VIDEOS):
        planted_video(folder / f"{i}.mp4", NUM_FRAMES, SHOWN if i < 2 else {}, seed=i)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = planted_recipe(tmp_path_factory.mktemp("score"), {"tokens": {"fake": {"tokenizer": "fake"}}}, _videos)
    make(path)
    return path


@pytest.fixture
def cache(recipe: str) -> TokenCache:
    return library.open_cache(str(Path(recipe).parent / "cache"))


def embeddings_of(cache: TokenCache, name: str = "colours") -> tuple[list[tuple[str, int]], np.ndarray]:
    rows = cache.sql(f"select clip_id, frame, embedding from frames_{name} order by clip_id, frame")
    vectors_ND = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)
    return list(zip(rows["clip_id"].to_pylist(), rows["frame"].to_pylist(), strict=True)), vectors_ND


def read(cache: TokenCache, name: str, clip_id: str) -> np.ndarray:
    """The embeddings of a clip as its file has them."""
    (place,) = cache.sql(
        "from locations where product = ? and clip_id = ?::uuid", [f"frames/{name}", clip_id]
    ).to_pylist()
    rows = dict(read_embedded_rows(pq.read_table(cache.folder.path(place["name"])), 3))
    return rows[clip_id].astype(np.float64)


def test_scores_in_sql_are_those_of_numpy(cache: TokenCache) -> None:
    (query_id,) = cache.score("something red")
    places, vectors_ND = embeddings_of(cache)
    assert len(places) == NUM_VIDEOS * NUM_FRAMES > 1000
    stored_ND = np.concatenate([read(cache, "colours", clip_id) for clip_id in sorted({one for one, _ in places})])
    text_D = FakeEncoder().embed_texts(["something red"])[0].astype(np.float64)
    wanted_N = stored_ND @ text_D / (np.linalg.norm(stored_ND, axis=1) * np.linalg.norm(text_D))
    rows = cache.sql("from relevance where query_id = ? order by clip_id, frame", [query_id])
    assert list(zip(rows["clip_id"].to_pylist(), rows["frame"].to_pylist(), strict=True)) == places
    assert np.abs(rows["raw"].to_numpy() - wanted_N).max() < 1e-6
    assert np.allclose(np.linalg.norm(vectors_ND, axis=1), 1, atol=1e-6)
    p_N = calibrated(rows["raw"].to_numpy(), rows["video_id"].to_numpy(zero_copy_only=False), STANDARDIZED)
    assert np.abs(rows["p"].to_numpy() - p_N).max() < 1e-9
    best = np.lexsort((np.arange(len(places)), -rows["raw"].to_numpy()))[:10]
    found = cache.search("something red", k=10)
    assert [(row["clip_id"], row["frame"]) for row in found.to_pylist()] == [places[i] for i in best]


def test_the_frames_that_show_it_are_the_best(cache: TokenCache) -> None:
    found = cache.search("red", k=32).to_pylist()
    assert {row["uri"].rpartition("/")[2] for row in found} == {"0.mp4", "1.mp4"}
    assert sorted(round(row["pts_s"] * 4) for row in found if row["uri"].endswith("0.mp4")) == list(range(40, 56))
    clips = cache.search("red", k=4, by="clip", where="uri like '%1.mp4'").to_pylist()
    assert len({row["clip_id"] for row in clips}) == 4
    assert [row["raw"] > 0.9 for row in clips] == [True, True, False, False]  # frames 40 to 56 are of two clips


def test_an_example_finds_what_is_like_it(cache: TokenCache) -> None:
    (frame,) = cache.sql("""
        select clip_id, frame from frames join videos using (video_id)
        where uri like '%0.mp4' and frame_number = 122""").to_pylist()
    found = cache.search(like=f"{frame['clip_id'][:12]}:{frame['frame']}", k=48).to_pylist()
    shown = {*range(120, 128), *range(160, 176)}
    assert {round(row["pts_s"] * 4) for row in found} == shown
    with pytest.raises(CacheError, match=r"has no candidate frame 99; accepted: 0, 1, 2"):
        cache.search(like=f"{frame['clip_id']}:99")
    with pytest.raises(CacheError, match="no clip begins with 'zz'"):
        cache.search(like="zz")
    with pytest.raises(CacheError, match="give a text, or like=CLIP_ID"):
        cache.search()


@pytest.fixture
def opened_files() -> Iterator[list[str]]:
    """Every file that this process opens, by Python's own audit of itself."""
    opened: list[str] = []
    is_on = [True]

    def note(event: str, arguments: tuple) -> None:
        if is_on[0] and event in ("open", "os.open") and arguments and isinstance(arguments[0], str):
            opened.append(arguments[0])

    sys.addaudithook(note)
    yield opened
    is_on[0] = False


def test_a_query_never_seen_before_takes_no_video(tmp_path: Path, opened_files: list[str]) -> None:
    path = planted_recipe(tmp_path, {"tokens": {"fake": {"tokenizer": "fake"}}}, _first_video)
    make(path)
    opened_files.clear()
    for video in (tmp_path / "videos").iterdir():
        video.unlink()
    cache = library.open_cache(str(tmp_path / "cache"))
    cache.score("a blue thing")
    assert next(round(row["pts_s"] * 4) for row in cache.search("a blue thing", k=1).to_pylist()) in SHOWN["blue"][0]
    assert cache.select("a blue thing", 100, "fake").num_tokens > 0
    assert opened_files
    assert not [name for name in opened_files if name.endswith(".mp4")]


def _first_video(folder: Path) -> None:
    planted_video(folder / "0.mp4", 160, {"blue": SHOWN["blue"][:1]}, seed=0)


def test_scoring_again_adds_nothing(cache: TokenCache) -> None:
    ids = cache.score(["green", "green and blue"])
    count = "select count(*) as n, count(distinct (query_id, clip_id, frame)) as different from relevance_history"
    (before,) = cache.sql(count).to_pylist()
    assert cache.score(["green", "green and blue"]) == ids
    assert cache.sql(count).to_pylist() == [before]
    assert before["n"] == before["different"]


def test_a_part_that_was_scored_is_completed(cache: TokenCache) -> None:
    (clip_id,) = cache.sql(
        "select any_value(clip_id) as c from clips join videos using (video_id) where uri like '%3.mp4'"
    )["c"].to_pylist()
    (query_id,) = cache.score("yellow", where=f"clip_id = '{clip_id}'")  # p is of a frame among those of its video
    count = "select count(*) as n from relevance where query_id = ?"
    assert cache.sql(count, [query_id])["n"].to_pylist() == [NUM_FRAMES]
    cache.score("yellow")
    assert cache.sql(count, [query_id])["n"].to_pylist() == [NUM_VIDEOS * NUM_FRAMES]


def test_threads_that_score_the_same_add_every_row_once(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_table, "FILE_ROWS", 500)  # a dozen files
    caches = [library.open_cache(str(Path(recipe).parent / "cache")) for _ in range(3)]
    texts = ["red or grey", "blue or grey", "green or grey"]
    threads = [threading.Thread(target=one.score, args=(texts,)) for one in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    caches[0].refresh()
    ids = [query_id_of(text) for text in texts]
    rows = (
        caches[0]
        .sql(
            """select query_id, count(*) as n, count(distinct (clip_id, frame)) as different from relevance_history
           where list_contains(?, query_id) group by 1""",
            [ids],
        )
        .to_pylist()
    )
    assert [(row["n"], row["different"]) for row in rows] == [(NUM_VIDEOS * NUM_FRAMES,) * 2] * 3


def test_a_killed_run_is_taken_up_without_a_frame_twice_or_missing(recipe: str, tmp_path: Path) -> None:
    folder = Path(recipe).parent / "cache"
    queries = tmp_path / "queries.jsonl"
    texts = [f"red number {i}" for i in range(300)]
    queries.write_text("".join(json.dumps({"query": text}) + "\n" for text in texts))
    before = set((folder / "relevance" / "scores" / "colours").glob("*.parquet"))
    command = [sys.executable, "-c", _SCORE, str(folder), str(queries)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    deadline = time.monotonic() + 120
    while not set((folder / "relevance" / "scores" / "colours").glob("*.parquet")) - before:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ids = [query_id_of(text) for text in texts]
    count = """select count(*) as n, count(distinct (query_id, clip_id, frame)) as different from relevance_history
               where list_contains(?, query_id)"""
    (after,) = library.open_cache(str(folder)).sql(count, [ids]).to_pylist()
    assert 0 < after["n"] < len(texts) * NUM_VIDEOS * NUM_FRAMES
    cache = library.open_cache(str(folder))
    cache.score(texts)
    whole = len(texts) * NUM_VIDEOS * NUM_FRAMES
    assert cache.sql(count, [ids]).to_pylist() == [{"n": whole, "different": whole}]


# A rate at which it can be killed: files of one query each.
_SCORE = """
import sys
from tokenmill.pipeline import score_table
score_table.FILE_ROWS = 1000
score_table.QUERIES_AT_ONCE = 4
from tokenmill.jobs.score import score_cache
score_cache(sys.argv[1], [], sys.argv[2], None, where="true", top=1, by="frame")
"""


def test_another_scorer_needs_no_other_tables_and_another_version_keeps_the_old(tmp_path: Path) -> None:
    path = planted_recipe(tmp_path, {"tokens": {}}, _first_video)
    make(path)
    cache = library.open_cache(str(tmp_path / "cache"))
    (query_id,) = cache.score("blue")
    schema = cache.sql("describe relevance").to_pylist()
    files = {one: one.read_bytes() for one in tmp_path.glob("cache/frames/*.parquet")}
    make(path, "frames.encoders.other={encoder: fake, batch_size: 3}")
    cache = library.open_cache(str(tmp_path / "cache"))
    with pytest.raises(CacheError, match="give one encoder of colours, other"):
        cache.score("blue")
    cache.score("blue", "other")
    assert cache.sql("describe relevance").to_pylist() == schema
    counted = "select scorer, count(*) as n from {} where query_id = ? group by 1 order by 1"
    both = [{"scorer": "colours", "n": 160}, {"scorer": "other", "n": 160}]
    assert cache.sql(counted.format("relevance"), [query_id]).to_pylist() == both
    assert {one: one.read_bytes() for one in tmp_path.glob("cache/frames/*.parquet")} == files
    make(path, "frames.encoders.other={encoder: fake, batch_size: 5}")
    cache = library.open_cache(str(tmp_path / "cache"))
    assert cache.sql(counted.format("relevance"), [query_id]).to_pylist() == both[:1]
    cache.score("blue", "other")
    assert cache.sql(counted.format("relevance"), [query_id]).to_pylist() == both
    history = [both[0], {"scorer": "other", "n": 320}]
    assert cache.sql(counted.format("relevance_history"), [query_id]).to_pylist() == history


def test_a_calibration_in_the_recipe_changes_p_and_makes_nothing_anew(tmp_path: Path) -> None:
    path = planted_recipe(tmp_path, {"tokens": {}}, _first_video)
    make(path)
    (query_id,) = library.open_cache(str(tmp_path / "cache")).score("blue")
    files = sorted(str(one) for one in tmp_path.glob("cache/**/*.parquet"))
    make(path, "frames.encoders.colours.calibration={rule: sigmoid, scale: 10, bias: -5}")
    assert sorted(str(one) for one in tmp_path.glob("cache/**/*.parquet")) == files
    rows = library.open_cache(str(tmp_path / "cache")).sql("from relevance where query_id = ?", [query_id])
    assert np.allclose(rows["p"].to_numpy(), 1 / (1 + np.exp(5 - 10 * rows["raw"].to_numpy().astype(np.float64))))


def test_without_an_encoder_of_texts_a_query_is_refused(tmp_path: Path, tokenmill: Command) -> None:
    recipe = planted_recipe(
        tmp_path, {"tokens": {}, "frames": {"encoders": {"seen": {"encoder": "look"}}}}, _first_video
    )
    make(recipe)
    run = tokenmill("score", str(tmp_path / "cache"), "--query", "blue")
    assert run.code == 1
    assert "no encoder of its frames takes texts (its encoders: seen (look))" in run.err
    assert "add one to the recipe, for instance frames: {encoders: {siglip: {encoder: transformers" in run.err
    cache = library.open_cache(str(tmp_path / "cache"))
    with pytest.raises(CacheError, match=r"encoder seen \(look\) takes no texts"):
        cache.search("blue", scorer="seen")
    with pytest.raises(CacheError, match="no encoder 'sen'"):
        cache.search("blue", scorer="sen")
    assert cache.sql("select count(*) as n from relevance")["n"].to_pylist() == [0]


def test_without_embeddings_an_example_is_refused(tmp_path: Path) -> None:
    make(planted_recipe(tmp_path, {"tokens": {}, "frames": {}}, _first_video))
    cache = library.open_cache(str(tmp_path / "cache"))
    clip_id = cache.sql("select clip_id from clips")["clip_id"][0].as_py()
    with pytest.raises(CacheError, match=r"it has no embeddings of frames .*for instance frames: .encoders: .look:"):
        cache.search(like=clip_id)


def test_a_snapshot_shows_the_scores_of_its_clips(tmp_path: Path) -> None:
    recipe = planted_recipe(tmp_path, {"tokens": {}}, _first_video)
    make(recipe)
    number = library.open_cache(str(tmp_path / "cache")).snapshot()
    planted_video(tmp_path / "videos" / "1.mp4", 32, {}, seed=5)
    make(recipe)
    cache = library.open_cache(str(tmp_path / "cache"))
    cache.score("red")
    count = "select count(*) as n from relevance"
    assert cache.sql(count)["n"].to_pylist() == [192]
    assert library.open_cache(str(tmp_path / "cache"), snapshot=number).sql(count)["n"].to_pylist() == [160]


def test_damage_below_relevance_is_found_and_hinders_no_reader_of_tokens(tmp_path: Path, tokenmill: Command) -> None:
    make(planted_recipe(tmp_path, {}, _first_video))
    folder = tmp_path / "cache"
    library.open_cache(str(folder)).score("red")
    (file,) = folder.glob("relevance/scores/colours/*.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    cache = library.open_cache(str(folder))
    clip_id = cache.clips()["clip_id"][0].as_py()
    assert len(cache.read("dct", [clip_id])) == 1
    with pytest.raises(CacheError, match=r"relevance/scores/colours/1.parquet"):
        cache.sql("from relevance")
    run = tokenmill("verify", str(folder))
    assert run.code == 1
    assert "relevance/scores/colours/1.parquet: damaged" in run.out + run.err


def test_candidates_at_another_rate_are_another_version(tmp_path: Path, tokenmill: Command) -> None:
    recipe = planted_recipe(tmp_path, {"tokens": {}}, _first_video)
    make(recipe)
    make(recipe, "frames={fps: 1, encoders: {other: {encoder: fake}}}")
    cache = library.open_cache(str(tmp_path / "cache"))
    counts = [cache.sql(f"select count(*) as n from {view}")["n"][0].as_py() for view in ("frames", "frames_other")]
    assert counts == [40, 40]
    assert cache.sql("select count(*) as n from frames_colours")["n"].to_pylist() == [160]
    run = tokenmill("verify", str(tmp_path / "cache"), "--deep", "--retokenize", "1")
    assert run.code == 0, run.out + run.err


def test_a_query_in_words_takes_the_encoder_that_made_the_frames(recipe: str) -> None:
    folder = str(Path(recipe).parent / "cache")
    with pytest.raises(CacheError, match=r"opened without encoders: open it by tokenmill.open_cache"):
        open_without_encoders(folder).score("words that are new")
    cache = library.open_cache(folder)

    class Other(FakeEncoder):
        spec = type(FakeEncoder.spec)(name="fake", dim=3, weights_sha256="of another file")

    changed = open_without_encoders(folder, load_encoder=lambda entry: Other())
    with pytest.raises(
        CacheError, match=r"made by another encoder than is here \(weights_sha256 None there, of another"
    ):
        changed.score("words that are new too")
    with pytest.raises(RecipeError, match="an empty text is no query"):
        cache.score("  ")


@pytest.mark.s3
@pytest.mark.slow
def test_a_cache_in_an_object_store_is_asked_there(tmp_path: Path, s3_server: str, s3_url: str) -> None:
    path = planted_recipe(tmp_path, {"tokens": {"fake": {"tokenizer": "fake"}}}, _first_video)
    make(path)
    make(path, f"cache={s3_url}")
    for video in (tmp_path / "videos").iterdir():
        video.unlink()
    here, there = (library.open_cache(url) for url in (str(tmp_path / "cache"), s3_url))
    for cache in (here, there):
        cache.score(["blue", "red"])
        cache.score("blue")
    rows = "select query_id, clip_id, frame, raw, p from relevance order by all"
    assert there.sql(rows).equals(here.sql(rows))
    assert there.search("blue", k=5).equals(here.search("blue", k=5))
    chosen = [cache.select("blue", 200, "fake") for cache in (here, there)]
    assert [one.num_tokens for one in chosen] == [chosen[0].num_tokens] * 2
    assert chosen[1].bytes_read == sum(part["size"] for row in chosen[1].plan.to_pylist() for part in row["ranges"])
    assert all((a == b).all() for a, b in zip(chosen[0].tokens, chosen[1].tokens, strict=True))


class Searches(Dataset):
    """Asks a cache in the process that loads."""

    def __init__(self, cache: TokenCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[int]:
        found = self.cache.search("red", k=2)["frame"].to_pylist()
        return [*found, self.cache.select("red", 50, "fake").num_tokens]


def test_loaders_give_embedded_frames_and_scores_of_clips(cache: TokenCache) -> None:
    (query,) = cache.score("red")
    best = f"(select max(r.p) from relevance r where r.clip_id = c.clip_id and r.query_id = '{query}')"
    loader = cache.loader(["frames/colours", "fake"], 8, columns={"best": best}, where=f"{best} > 0.01")
    wanted = {
        row["clip_id"]: row["p"]
        for row in cache.sql(
            "select clip_id, max(p) as p from relevance where query_id = ? group by 1", [query]
        ).to_pylist()
    }
    assert 0 < loader.num_clips == sum(p > 0.01 for p in wanted.values()) < len(wanted)
    for batch in loader:
        values, cu_seqlens, _ = batch["frames/colours"]
        for i, clip_id in enumerate(batch["clip_id"]):
            found = values[cu_seqlens[i] : cu_seqlens[i + 1]].numpy()
            assert np.array_equal(found, cache.read_frames("frames/colours", clip_id).embeddings_KD)
        assert batch["best"].tolist() == [wanted[clip_id] for clip_id in batch["clip_id"]]


def test_forked_loaders_can_ask_what_their_parent_has_asked(cache: TokenCache) -> None:
    cache.score("red")
    asked = Searches(cache)
    wanted = [asked[0], asked[1]]
    loader = DataLoader(asked, num_workers=1, timeout=60, multiprocessing_context="fork", collate_fn=list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own, of a process with threads that forks
        assert [one for batch in loader for one in batch] == wanted


def test_one_text_with_other_spaces_is_scored_once(cache: TokenCache) -> None:
    ids = cache.score(["spaced green", " spaced green ", "spaced green"])
    assert len(set(ids)) == 1
    count = "select count(*) as n from relevance where query_id = ?"
    assert cache.sql(count, [ids[0]])["n"].to_pylist() == [NUM_VIDEOS * NUM_FRAMES]


@pytest.mark.parametrize(
    ("where", "message"),
    [("nope = 1", "nope"), ("", "the query failed"), ("false", "no clip where false: give another condition")],
)
def test_a_condition_that_cannot_be_is_refused_before_anything_is_kept(
    cache: TokenCache, where: str, message: str
) -> None:
    before = cache.sql("select count(*) as n from queries")["n"].to_pylist()
    for ask in (cache.score, lambda text, where: cache.select(text, 10, "fake", where=where)):
        with pytest.raises(CacheError, match=message):
            ask("never stored", where=where)
    cache = library.open_cache(cache.folder.url)
    assert cache.sql("select count(*) as n from queries")["n"].to_pylist() == before
    assert cache.select("red", 50, "fake", where="true -- all of them").num_tokens > 0


def test_nothing_is_found_by_embeddings_that_are_not_made_yet(tmp_path: Path) -> None:
    recipe = planted_recipe(tmp_path, {"tokens": {}}, _first_video)
    make(recipe)
    folder = Folder(str(tmp_path / "cache"))
    entry = read_info(folder).products["frames/colours"]
    register_products(folder, {"frames/colours": replace(entry, fingerprint="0" * 64)})
    with pytest.raises(CacheError, match="no frame is embedded by the current version of frames/colours yet: run"):
        library.open_cache(folder.url).score("red")


def test_what_to_look_for_is_said_in_full(cache: TokenCache) -> None:
    for wrong in ({"k": 0}, {"by": "video"}):
        with pytest.raises(CacheError, match="accepted: k from 1 on, by frame or clip; found"):
            cache.search("red", **wrong)  # pyright: ignore[reportArgumentType]


def test_the_command_scores_files_of_queries_and_shows_the_best(
    recipe: str, tmp_path: Path, tokenmill: Command
) -> None:
    folder, queries = str(Path(recipe).parent / "cache"), tmp_path / "queries.jsonl"
    assert tokenmill("score", folder, "--query", "it's [/red]", "--no-keep", "--top", "1").out.count(".mp4") == 1
    queries.write_text('{"query": "red"}\n"blue"\n')
    run = tokenmill("score", folder, "--queries", str(queries), "--query", "blue", "--top", "3", "--by", "clip")
    assert run.code == 0, run.err
    assert "2 queries are scored by colours" in run.out
    assert run.out.count(".mp4") == 3
    like = library.open_cache(folder).search("red", k=1)["clip_id"][0].as_py()
    assert tokenmill("score", folder, "--like", like[:10], "--top", "2").out.count(".mp4") == 2
    queries.write_text('{"text": "red"}\n')
    run = tokenmill("score", folder, "--queries", str(queries))
    assert run.code == 2
    assert "line 1: no query" in run.err
    assert "give it alone" in tokenmill("score", folder, "--like", like, "--query", "red").err
    assert "give --query TEXT, --queries FILE or --like" in tokenmill("score", folder).err

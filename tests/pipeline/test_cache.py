"""Reading a cache: SQL, tokens by clip, and loaders."""

import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tokenmill
from tokenmill.jobs.opening import open_cache as open_with_encoders
from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.cache_head import register_products
from tokenmill.pipeline.decode import FakeDecoder
from tokenmill.pipeline.decoders import DirectDecoder
from tokenmill.pipeline.encode import BatchEncoder
from tokenmill.pipeline.loader import TokenLoader
from tokenmill.pipeline.plan import make_plan
from tokenmill.pipeline.plan_file import plans_of, write_plan
from tokenmill.pipeline.shard import process_shard
from tokenmill.pipeline.storage import Folder
from tokenmill.pipeline.videos import VideoFacts
from tokenmill.pipeline.worker import Worker, fingerprints_of
from tokenmill.schemas.cache_info import CACHE_INFO, ProductInfo, recipe_to_json
from tokenmill.schemas.clip import Clip
from tokenmill.schemas.errors import CacheError
from tokenmill.schemas.recipe import Recipe, parse_recipe
from tokenmill.schemas.shard import ShardTask
from tokenmill.schemas.tokens import TokenizerSpec
from tokenmill.tokenizers.base import FakeLevels, FakeTokenizer, joined_levels
from tokenmill.tokenizers.load import load_tokenizer

from ..conftest import Store

SIZE = {"num_frames": 8, "height": 16, "width": 24}


class Averages:
    """Latents for tests: the mean colour of each 4x8x8 block, in bfloat16."""

    is_batched = False
    spec = TokenizerSpec(
        name="averages", kind="continuous", codebook_size=None, latent_dim=3,
        stride_thw=(4, 8, 8), weights_sha256=None, dtype="bfloat16",
    )  # fmt: skip

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return num_frames // 4, height // 8, width // 8

    def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        b, t, h, w, c = frames_BTHWC.shape
        blocks = frames_BTHWC.float().reshape(b, t // 4, 4, h // 8, 8, w // 8, 8, c)
        return blocks.mean(dim=(2, 4, 6)).to(torch.bfloat16)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.to(torch.uint8)


TOKENIZERS: dict[str, Any] = {
    "tokens/fake": FakeTokenizer(),
    "tokens/dct": load_tokenizer("dct_fsq/488_262144"),
    "tokens/mean": Averages(),
    "tokens/levels": FakeLevels(),
    "tokens/native": FakeLevels(native_grid=True),
}


def make_cache(url: str) -> tuple[Recipe, list[Clip]]:
    """A cache of made-up videos with three products; returns its recipe and clips."""
    recipe = parse_recipe(
        {
            "cache": url,
            "sources": ["v"],
            "clips": SIZE,
            "tokens": {"fake": {"tokenizer": "fake"}},
            "shards": {"frames": 64},
        }
    )
    sampling, folder = recipe.clips.sampling, Folder(url)
    encoders = {p: BatchEncoder(tokenizer=t, batch_size=3, sampling=sampling) for p, t in TOKENIZERS.items()}
    decoder = FakeDecoder(sampling)
    prints = fingerprints_of(decoder, encoders)
    worker = Worker(folder=folder, decoders=(DirectDecoder(decoder),), encoders=encoders, fingerprints=prints)
    products = {"clips": ProductInfo(fingerprint=prints["clips"])}
    for product, encoder in encoders.items():
        spec = encoder.tokenizer.spec
        tokenizer = {"name": spec.name, "kind": spec.kind, "codebook_size": spec.codebook_size, "dtype": spec.dtype}
        products[product] = ProductInfo(
            fingerprint=prints[product],
            tokenizer=tokenizer,
            shape=encoder.layout.shape,
            levels=encoder.layout.levels,
            section={"tokenizer": spec.name},
        )
    folder.create(CACHE_INFO, recipe_to_json(recipe.model_dump(mode="json")))
    register_products(folder, products)
    write_plan(folder, make_plan(recipe, [fact(i) for i in range(7)]))
    clips = []
    for plan in plans_of(folder):
        for i in range(len(plan.shards())):
            task = ShardTask(plan=plan.shard(i), products=tuple(prints))
            list(process_shard(task, worker))
            clips += task.plan.clips
    return recipe, clips


def fact(i: int) -> VideoFacts:
    return VideoFacts(
        uri=__file__,
        stamp="",
        video_id=f"uri:{i}",
        size_bytes=-1,
        caption=f"caption {i}",
        metadata='{"lang":"en"}',
        pts_s=np.arange(30 + i) / 30,
        is_regular=False,
        end_s=(30 + i) / 30,
        fps=30.0,
        width=24,
        height=16,
        codec=None,
        reason=None,
    )


def expected(product: str, clips: list[Clip], recipe: Recipe) -> torch.Tensor:
    """The tokens that the clips must have, made outside of the cache."""
    frames = [one.frames_THWC for one in FakeDecoder(recipe.clips.sampling).decode("", clips)]  # pyright: ignore
    return joined_levels(TOKENIZERS[product].encode(torch.from_numpy(np.stack(frames))))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Recipe, list[Clip]]:
    url = str(tmp_path_factory.mktemp("caches") / "cache")
    return url, *make_cache(url)


@pytest.fixture
def cache(made: tuple[str, Recipe, list[Clip]]) -> TokenCache:
    return open_cache(made[0])


@pytest.mark.parametrize("product", list(TOKENIZERS))
def test_tokens_of_any_clips_in_any_order_are_the_ones_made(
    cache: TokenCache, made: tuple[str, Recipe, list[Clip]], product: str
) -> None:
    _, recipe, clips = made
    chosen = [clips[i] for i in (20, 0, 13, 13, 5)]
    tokens = cache.read(product.removeprefix("tokens/"), [clip.clip_id for clip in chosen])
    assert torch.equal(tokens, expected(product, chosen, recipe).to(tokens.dtype))
    assert tokens.dtype == (torch.bfloat16 if product == "tokens/mean" else torch.int32)


def test_a_cache_reads_alike_on_every_store(store: Store) -> None:
    recipe, clips = make_cache(f"{store.url}/cache")
    cache = open_cache(f"{store.url}/cache")
    tokens = cache.read("dct", [clip.clip_id for clip in clips])
    assert torch.equal(tokens, expected("tokens/dct", clips, recipe).to(tokens.dtype))
    assert cache.sql("select count(*) as n from tokens_dct where len(codes) = 12")["n"].to_pylist() == [len(clips)]


def test_one_clips_grid_says_how_many_frames_are_real(cache: TokenCache, made: tuple[str, Recipe, list[Clip]]) -> None:
    short = next(clip for clip in made[2] if clip.num_valid < 8)
    for product in ("dct", "mean"):
        grid = cache.grid(product, short.clip_id)
        assert grid.num_valid == short.num_valid
        assert np.array_equal(grid.values_thw, cache.read(product, [short.clip_id])[0].to(torch.float32).numpy())


def test_codes_in_sql_are_the_codes_read(cache: TokenCache) -> None:
    rows = cache.sql("select clip_id, codes from tokens_dct order by clip_id")
    read = cache.read("dct", rows["clip_id"].to_pylist())
    assert rows["codes"].to_pylist() == read.flatten(1).tolist()


def test_code_usage_counts_every_code(cache: TokenCache) -> None:
    ids = cache.sql("select clip_id from clips")["clip_id"].to_pylist()
    codes, uses = np.unique(cache.read("fake", ids).numpy(), return_counts=True)
    answer = cache.sql("from code_usage('fake')")
    assert set(answer["level"].to_pylist()) == {1}
    assert answer["code"].to_pylist() == codes.tolist()
    assert answer["uses"].to_pylist() == uses.tolist()


@pytest.mark.parametrize("product", ["levels", "native"])
def test_the_first_levels_are_read_alone(cache: TokenCache, product: str) -> None:
    ids = cache.sql("select clip_id from clips limit 5")["clip_id"].to_pylist()
    tokens = cache.read(product, ids)
    levels = cache.read_levels(product, ids)
    assert [tuple(level.shape) for level in levels] == [
        (5, 2, 2, 3),
        (5, 2, 4, 6) if product == "native" else (5, 2, 2, 3),
    ]
    assert torch.equal(joined_levels(levels) if product == "native" else torch.stack(levels, dim=-1), tokens)
    first = cache.read(product, ids, levels=1)
    assert first.shape == ((5, 12) if product == "native" else (5, 2, 2, 3, 1))
    assert torch.equal(first.flatten(), levels[0].flatten())
    assert torch.equal(cache.read_levels(product, ids, levels=1)[0], levels[0])
    assert cache.grid(product, ids[0]).values_thw.shape == tuple(tokens.shape[1:])


@pytest.mark.parametrize("product", ["levels", "native"])
def test_the_codes_of_every_level_are_in_sql(cache: TokenCache, product: str) -> None:
    rows = cache.sql(f"select clip_id, codes from tokens_{product} order by clip_id")
    ids = rows["clip_id"].to_pylist()
    assert rows["codes"].to_pylist() == cache.read(product, ids).flatten(1).tolist()
    for n, level in enumerate(cache.read_levels(product, ids), start=1):
        found = cache.sql(f"select codes from levels_{product} where level = {n} order by clip_id")
        assert found["codes"].to_pylist() == level.flatten(1).tolist()
    three = cache.sql(f"select codes from tokens_{product} order by clip_id limit 3 offset 2")
    assert three["codes"].to_pylist() == rows["codes"].to_pylist()[2:5]


@pytest.mark.parametrize("product", ["levels", "native", "fake"])
def test_code_statistics_are_those_of_numpy(cache: TokenCache, product: str) -> None:
    ids = cache.sql("select clip_id from clips")["clip_id"].to_pylist()
    levels = [cache.read(product, ids)] if product == "fake" else cache.read_levels(product, ids)
    usage = cache.sql(f"from code_usage('{product}')").to_pylist()
    rows = cache.sql(f"from code_statistics('{product}')").to_pylist()
    size = TOKENIZERS[f"tokens/{product}"].spec.codebook_size
    for n, (level, row) in enumerate(zip(levels, rows, strict=True), start=1):
        codes, uses = np.unique(level.numpy(), return_counts=True)
        of_level = [one for one in usage if one["level"] == n]
        assert [(one["code"], one["uses"]) for one in of_level] == list(zip(codes.tolist(), uses.tolist(), strict=True))
        shares = uses / uses.sum()
        entropy = float(-(shares * np.log2(shares)).sum())
        assert (row["level"], row["num_tokens"], row["num_codes"]) == (n, uses.sum(), len(codes))
        assert row["utilisation"] == len(codes) / size
        assert row["entropy_bits"] == pytest.approx(entropy, abs=1e-12)
        assert row["perplexity"] == pytest.approx(2**entropy, rel=1e-12)


def test_levels_that_are_not_there_are_refused(cache: TokenCache) -> None:
    ids = cache.sql("select clip_id from clips limit 1")["clip_id"].to_pylist()
    for count in (0, 3):
        with pytest.raises(CacheError, match=f"tokens/levels: {count} levels were asked for: it has 1 to 2"):
            cache.read("levels", ids, levels=count)
    with pytest.raises(CacheError, match="tokens/dct: its tokens do not come in levels: read it without levels"):
        cache.read("dct", ids, levels=1)
    with pytest.raises(CacheError, match="tokens/dct: its tokens do not come in levels"):
        cache.read_levels("dct", ids)


def test_all_products_are_in_one_view(cache: TokenCache) -> None:
    answer = cache.sql("select product, count(*) as n from tokens group by 1 order by 1")
    assert answer["product"].to_pylist() == ["dct", "fake", "levels", "mean", "native"]
    assert len(set(answer["n"].to_pylist())) == 1


def test_clips_carry_their_videos_caption(cache: TokenCache, made: tuple[str, Recipe, list[Clip]]) -> None:
    clips = cache.clips("caption = 'caption 3'").to_pylist()
    planned = [clip for clip in made[2] if clip.video.digest == "uri:3"]
    assert [row["clip_id"] for row in clips] == sorted(clip.clip_id for clip in planned)
    by_id = {clip.clip_id: clip for clip in planned}
    assert all(tuple(row["frame_pts_s"]) == by_id[row["clip_id"]].frame_pts_s for row in clips)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("drop table clips", "one read-only query is accepted .*, found: DROP"),
        ("copy clips to '/tmp/x.csv'", "found: COPY"),
        ("attach '/tmp/x.db'", "found: ATTACH"),
        ("set memory_limit='1GB'", "found: SET"),
        ("select 1; select 2", "found: SELECT, SELECT"),
        ("", "found: nothing"),
        ("selec 1", "the query failed: Parser Error: syntax error"),
        ("from clip", "Table with name clip does not exist! Did you mean"),
    ],
)
def test_only_one_reading_query_is_accepted(cache: TokenCache, query: str, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        cache.sql(query)


def test_unknown_clips_and_products_are_named(cache: TokenCache, made: tuple[str, Recipe, list[Clip]]) -> None:
    known = made[2][0].clip_id
    with pytest.raises(CacheError, match=r"tokens/dct has no clip 'abc' \(1 of 2 asked are missing\)"):
        cache.read("dct", [known, "abc"])
    with pytest.raises(CacheError, match=r"no product tokens/dtc \(did you mean 'dct'\?\); there are dct, fake,"):
        cache.read("dtc", [known])
    with pytest.raises(CacheError, match="no clip was asked for"):
        cache.read("dct", [])
    assert cache.clip_id(known[:12]) == known
    with pytest.raises(CacheError, match="no clip begins with 'zz'"):
        cache.clip_id("zz")
    with pytest.raises(CacheError, match="more than one clip begins with ''"):
        cache.clip_id("")


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no token cache there \(no cache\.json\): make one with tokenmill run"):
        open_cache(str(tmp_path))


def test_a_deleted_or_outdated_index_is_rebuilt(tmp_path: Path) -> None:
    _, clips = make_cache(str(tmp_path / "cache"))
    assert open_cache(str(tmp_path / "cache")).sql("select count(*) as n from clips")["n"][0].as_py() == len(clips)
    index = tmp_path / "cache" / "index.duckdb"
    index.unlink()
    assert open_cache(str(tmp_path / "cache")).sql("select count(*) as n from clips")["n"][0].as_py() == len(clips)
    manifest = next((tmp_path / "cache" / "manifests" / "clips").iterdir())
    manifest.unlink()
    assert open_cache(str(tmp_path / "cache")).sql("select count(*) as n from clips")["n"][0].as_py() < len(clips)
    index.write_bytes(b"not a database")
    assert open_cache(str(tmp_path / "cache")).sql("select count(*) as n from clips")["n"][0].as_py() < len(clips)


def test_a_damaged_token_file_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    _, clips = make_cache(str(tmp_path / "cache"))
    for path in (tmp_path / "cache" / "tokens" / "fake").iterdir():
        chunk = pq.read_metadata(path).row_group(0).column(2)
        data = bytearray(path.read_bytes())
        data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
        path.write_bytes(data)
    cache = open_cache(str(tmp_path / "cache"))
    with pytest.raises(CacheError, match="row group 0 of column tokens is damaged"):
        cache.read("fake", [clips[0].clip_id])
    assert cache.read("fake", [clips[0].clip_id], verify=False).shape == (1, 2, 2, 3)


def test_many_threads_may_ask_at_once(cache: TokenCache, made: tuple[str, Recipe, list[Clip]]) -> None:
    ids = [clip.clip_id for clip in made[2]]
    whole = cache.read("dct", ids)
    wrong: list[int] = []

    def read(i: int) -> None:
        if not torch.equal(cache.read("dct", [ids[i]])[0], whole[i]):
            wrong.append(i)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_cache_can_be_sent_to_another_process(cache: TokenCache, made: tuple[str, Recipe, list[Clip]]) -> None:
    cache.sql("select 1 as x")
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.read("dct", [made[2][0].clip_id]), cache.read("dct", [made[2][0].clip_id]))


def test_the_public_names_are_there() -> None:
    assert tokenmill.open_cache is open_with_encoders
    assert tokenmill.TokenLoader is TokenLoader
    assert tokenmill.load_tokenizer("fake").spec.name == "fake"
    with pytest.raises(AttributeError, match="has no attribute 'opencache'; it has TokenCache"):
        tokenmill.opencache  # noqa: B018

"""The queries of docs/queries.md answer, are those that are saved, and are asked by name on the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from tokenmill.jobs.display import showing
from tokenmill.jobs.opening import open_cache
from tokenmill.jobs.recipes import load_recipe
from tokenmill.jobs.run import run_recipe
from tokenmill.pipeline.cache import TokenCache
from tokenmill.pipeline.duplicates import MOST_HASHES, MOST_POSITIONS, band_size, share_found
from tokenmill.pipeline.named_queries import NAMED_QUERIES, named_query, named_sql
from tokenmill.pipeline.render import write_video
from tokenmill.schemas.errors import CacheError, RecipeError
from tokenmill.tokenizers import trajtok_model, trajtok_segmenter
from tokenmill.tokenizers.trajtok_model import Sizes
from tokenmill.tokenizers.trajtok_tokenizer import vision_of

from ..pipeline.test_cache import make_cache
from ..tokenizers.test_trajtok_tokenizer import published
from ..tokenizers.trajtok_kit import filled
from .conftest import Command
from .relevance_kit import planted_video

PAGE = (Path(__file__).parents[2] / "docs" / "queries.md").read_text()
BLOCK = re.compile(r"^\*\*(?P<number>\d+)\. (?P<head>[^\n]+)\n```sql\n(?P<sql>.+?)\n```$", re.M | re.S)
BLOCKS = {int(found["number"]): found for found in BLOCK.finditer(PAGE)}
NAMED = re.compile(r"`--named (\w+)((?: --param \w+=\w+)*)`$")
SIZES = Sizes(dim=64, num_slots=16, grid=14, depths=(1, 1, 1, 1), level=1, vit_layers=2, vit_heads=4, vit_dim=64)
OPTIONS = {"grid": 14, "vit_heads": 4, "chunk_frames": 4, "level": 1, "embedding": True}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """A cache with every kind of product: of something red, two still videos that hardly differ, and a broken one."""
    folder = tmp_path_factory.mktemp("queries")
    planted_video(folder / "red.mp4", 24, {"red": [range(8, 16)]}, seed=0)
    still_THWC = np.full((24, 64, 64, 3), 100, np.uint8)
    write_video(str(folder / "still.mp4"), still_THWC, 4)
    still_THWC[:, :8, :8] = 200
    write_video(str(folder / "marked.mp4"), still_THWC, 4)
    (folder / "broken.mp4").write_bytes(b"nothing")
    rows = ["red.mp4,Something red,en", "still.mp4,A wall,de", "marked.mp4,A wall,de", "broken.mp4,Nothing,en"]
    (folder / "videos.csv").write_text("\n".join(["uri,caption,lang", *rows]))
    with pytest.MonkeyPatch.context() as patch:
        for module in (trajtok_model, trajtok_segmenter):
            patch.setattr(module, "IMAGE_SIDE", 56)
        weights = published(filled(vision_of(SIZES), ""), folder / "model.pth")  # type: ignore[arg-type]
        recipe = {
            "cache": str(folder / "cache"),
            "sources": [{"kind": "table", "path": str(folder / "videos.csv")}],
            "clips": {"num_frames": 8, "height": 56, "width": 56, "resize": "squash", "interpolation": "bicubic"},
            "tokens": {
                "dct": {"tokenizer": "dct_fsq/488_262144"},
                "objects": {"tokenizer": "trajtok/trajvit2", "weights": weights, "options": OPTIONS},
            },
            "masks": {"seen": {"segmenter": "fake"}},
            "frames": {"fps": "all", "encoders": {"colours": {"encoder": "fake"}}},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        with showing(log_json=True) as display:
            assert run_recipe(load_recipe(str(folder / "recipe.yaml"), []), display).exit_code == 3
    made = open_cache(str(folder / "cache"))
    made.score("something red")
    return made


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """A cache with four products of codes, and none of embeddings."""
    url = str(tmp_path_factory.mktemp("several") / "cache")
    make_cache(url)
    return open_cache(url)


def test_the_page_has_twenty_queries_and_every_saved_one() -> None:
    assert list(BLOCKS) == list(range(1, 21))
    assert PAGE.count("```sql") == 20
    named = [found[1] for block in BLOCKS.values() if (found := NAMED.search(block["head"]))]
    assert named == list(NAMED_QUERIES)
    assert "usage" in named


@pytest.mark.parametrize("number", BLOCKS)
def test_every_query_of_the_page_answers(cache: TokenCache, number: int) -> None:
    assert cache.sql(BLOCKS[number]["sql"]).num_rows > 0


@pytest.mark.parametrize("number", [number for number, block in BLOCKS.items() if "--named" in block["head"]])
def test_saved_queries_are_those_of_the_page(cache: TokenCache, number: int) -> None:
    found = NAMED.search(BLOCKS[number]["head"])
    assert found
    parameters = dict(one.split("=") for one in found[2].split() if "=" in one)
    assert named_sql(cache, found[1], **parameters) == BLOCKS[number]["sql"]


@pytest.mark.parametrize("row", re.findall(r"^\| (0\.\d+) \| (\d+) \| ([\d.]+)% \| (\d+) \| ([\d.]+)% \|$", PAGE, re.M))
def test_the_page_says_how_many_pairs_are_found(row: tuple[str, ...]) -> None:
    least, *found = map(float, row)
    sizes = band_size(least, MOST_POSITIONS), band_size(least, MOST_HASHES)
    assert found == [value for k in sizes for value in (k, round(100 * share_found(least, k), 1))]


def test_queries_say_what_is_so(cache: TokenCache) -> None:
    clips = cache.clips().to_pylist()
    sizes = {row["product"]: row for row in named_query(cache, "sizes").to_pylist()}
    assert {row["num_clips"] for row in sizes.values()} == {len(clips)} == {9}
    assert sizes["tokens/dct"]["tokens_per_clip"] == 2 * 7 * 7
    assert [row["status"] for row in named_query(cache, "failures").to_pylist()] == ["failed"]
    assert sum(row["num_clips"] for row in named_query(cache, "clips_per_video").to_pylist()) == 9
    (group,) = named_query(cache, "duplicates").to_pylist()[:1]
    assert group["num_clips"] == 3
    near = named_query(cache, "near_duplicates", min_share=0.9).to_pylist()
    assert [(row["num_same"], row["other_num_same"]) for row in near] == [(3, 3)]
    (first, *_) = named_query(cache, "best_frames", text="red").to_pylist()
    assert first["uri"].endswith("red.mp4")
    assert first["p"] > 0.5


def test_neighbours_are_those_of_numpy(cache: TokenCache) -> None:
    ids = [clip["clip_id"] for clip in cache.clips().to_pylist()]
    embeddings_NE = cache.read("embeddings/objects", ids).numpy()
    asked = ids[4]
    cosines = dict(zip(ids, embeddings_NE @ embeddings_NE[4], strict=True))
    rows = named_query(cache, "neighbours", clip=asked[:12], limit=3).to_pylist()
    wanted = sorted((cosine for clip_id, cosine in cosines.items() if clip_id != asked), reverse=True)[:3]
    assert [row["cosine"] for row in rows] == pytest.approx(wanted, abs=1e-6)


def test_texts_are_taken_as_they_are(cache: TokenCache) -> None:
    assert named_query(cache, "captions", text="it's 100%").num_rows == 0
    assert {row["caption"] for row in named_query(cache, "captions", text="RED").to_pylist()} == {"Something red"}


def test_a_cache_with_several_products_wants_one_to_be_chosen(several: TokenCache) -> None:
    with pytest.raises(
        CacheError,
        match=r"4 products are of codes, one is wanted: give product=NAME, one of dct, fake, levels, native$",
    ):
        named_query(several, "usage")
    for product in ("levels", "tokens/levels"):
        assert set(named_query(several, "statistics", product=product)["level"].to_pylist()) == {1, 2}
    with pytest.raises(CacheError, match="has no product mean of codes: give product=NAME, one of dct, fake"):
        named_query(several, "usage", product="mean")
    with pytest.raises(CacheError, match="0 products are of embeddings of clips, one is wanted: a recipe that makes"):
        named_query(several, "neighbours")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("usag", {}, r"no saved query 'usag' \(did you mean 'usage'\?\); there are\n  sizes .*\n  failures "),
        ("usage", {"limt": 3}, r"usage: no parameter 'limt' \(did you mean 'limit'\?\); accepted: product, limit$"),
        ("hosts", {"limit": 3}, "hosts: no parameter 'limit'; accepted: none$"),
        ("usage", {"limit": "many"}, "usage: limit is a whole number, found 'many'"),
        ("usage", {"limit": 2.9}, r"usage: limit is a whole number, found 2\.9"),
        ("usage", {"limit": True}, "usage: limit is a whole number, found True"),
        ("usage", {"limit": float("inf")}, "usage: limit is a whole number, found inf"),
        ("static", {"min_share": "most"}, "static: min_share is a number, found 'most'"),
        ("static", {"min_share": "nan"}, "static: min_share is a number, found 'nan'"),
        ("static", {"min_share": True}, "static: min_share is a number, found True"),
    ],
)
def test_what_is_not_saved_is_refused(cache: TokenCache, name: str, parameters: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        named_query(cache, name, **parameters)


def test_saved_queries_are_asked_on_the_command_line(tokenmill: Command, cache: TokenCache) -> None:
    url = cache.folder.url
    done = tokenmill("sql", url, "--named", "usage", "--param", "limit=3", "--param", "product=dct", "--format", "json")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert rows == named_query(cache, "usage", limit=3).to_pylist()
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a query, or --named NAME for a saved one: one of both"),
        (["from clips", "--named", "usage"], "give a query, or --named NAME for a saved one: one of both"),
        (["from clips", "--param", "limit=3"], "they are of saved queries: give --named NAME too"),
        (["--named", "usage", "--param", "limit"], "--param 'limit': accepted is key=value, for instance limit=50"),
        (["--named", "all"], "no saved query 'all'; there are sizes what is in the cache"),
    ],
)
def test_wrong_commands_say_what_is_accepted(
    tokenmill: Command, cache: TokenCache, arguments: list[str], message: str
) -> None:
    done = tokenmill("sql", cache.folder.url, *arguments)
    assert done.code == 2
    assert message in " ".join(re.sub("[│╭╰╮╯─]", " ", done.err).split())  # without the box that typer draws

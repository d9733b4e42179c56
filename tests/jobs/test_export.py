"""WebDataset tars, from jobs and from caches, through the command line."""

import csv
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from tokenmill.jobs.build import recipe_of
from tokenmill.jobs.display import showing
from tokenmill.jobs.run import run_recipe
from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.manifests import read_manifests
from tokenmill.schemas.errors import CacheError
from tokenmill.schemas.recipe import parse_recipe

from ..conftest import Store
from ..pipeline.test_webdataset_output import read_back
from .conftest import Command

WriteRecipe = Callable[..., str]
TWO_PRODUCTS = {
    "fake": {"tokenizer": "fake", "batch_size": 4},
    "dct": {"tokenizer": "dct_fsq/488_262144", "batch_size": 4},
}


def in_format(format: str) -> dict[str, Any]:
    return {"frames": 64, "format": format}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, footage: Path) -> dict[str, str]:
    """A table of two videos with captions and metadata, as a source."""
    path = tmp_path_factory.mktemp("table") / "videos.csv"
    with open(path, "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["uri", "caption", "split"])
        rows.writerow([footage / "carphone_pristine.mp4", "a man in a car", "train"])
        rows.writerow([footage / "carphone_distorted.mp4", "the same, blurred", "test"])
    return {"kind": "table", "path": str(path)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, table: dict[str, str]) -> Path:
    """A cache of that table, in both formats, for tests that only read it."""
    cache = tmp_path_factory.mktemp("made") / "cache"
    clips = {"num_frames": 8, "height": 32, "width": 48}
    sections = {"clips": clips, "tokens": TWO_PRODUCTS, "shards": in_format("both")}
    with showing(log_json=False) as display:
        run_recipe(parse_recipe({"cache": str(cache), "sources": [table], **sections}), display)
    return cache


def tars_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tar"))


def data_in(folder: Path) -> dict[str, str]:
    """Every data file of a cache or an export, and the digest of its bytes."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".tar", ".parquet") and path.parent.name != "plan"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def members_of(paths: list[Path]) -> dict[str, bytes]:
    """The contents of all members of tars, by name."""
    members = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                members[member.name] = content.read()
    return members


def check_index(tar: Path, index: Path, cache: TokenCache) -> None:
    """Every member that the index names is where it says, and every array is what the cache has."""
    data, rows = tar.read_bytes(), pq.read_table(index).to_pylist()
    assert {row["member"] for row in rows} == members_of([tar]).keys()
    for row in rows:
        content = data[row["offset"] : row["offset"] + row["size_bytes"]]
        name = row["member"].removeprefix(f"{row['clip_id']}.").removesuffix(".npy")
        if name == "json":
            assert json.loads(content)["clip_id"] == row["clip_id"]
        else:
            stored = cache.read(name, [row["clip_id"]])[0].numpy()
            np.testing.assert_array_equal(np.load(io.BytesIO(content)), stored)


def test_tars_of_a_job_hold_what_the_cache_holds(made: Path) -> None:
    samples, cache = read_back(*tars_in(made)), open_cache(str(made))
    clips = {row["clip_id"]: row for row in cache.clips().to_pylist()}
    assert sorted(one["__key__"] for one in samples) == list(clips)
    assert len(clips) == 30
    for one in samples:
        clip = clips[one["__key__"]]
        for name in TWO_PRODUCTS:
            stored = cache.read(name, [one["__key__"]])[0].numpy()
            np.testing.assert_array_equal(one[f"{name}.npy"], stored)
            assert one["json"]["products"][name]["shape"] == list(stored.shape)
        keys = ("clip_id", "video_id", "uri", "caption", "start_s", "end_s", "num_valid", "frame_pts_s")
        assert {key: one["json"][key] for key in keys} == {key: clip[key] for key in keys}
        split = {"a man in a car": "train", "the same, blurred": "test"}[one["json"]["caption"]]
        assert one["json"]["metadata"] == {"split": split}
    assert (samples[0]["fake.npy"].dtype, samples[0]["dct.npy"].dtype) == (np.uint16, np.int32)


def test_the_index_of_a_job_leads_into_its_tar(made: Path) -> None:
    cache = open_cache(str(made))
    manifests = read_manifests(cache.folder, {"webdataset": cache.info.products["webdataset"].fingerprint})
    assert len(manifests) == 4
    for manifest in manifests:
        tar, index = (made / file.name for file in manifest.files)
        check_index(tar, index, cache)


def test_an_export_has_the_same_members_as_the_tars_of_the_job(tokenmill: Command, made: Path, tmp_path: Path) -> None:
    done = tokenmill("export", "webdataset", str(made), "out", "--clips-per-tar", "12")
    assert done.code == 0, done.err
    assert done.out.endswith("manifest.json: 30 clips with dct, fake\n")
    exported = tars_in(tmp_path / "out")
    assert [path.name for path in exported] == ["00000.tar", "00001.tar", "00002.tar"]
    assert members_of(exported) == members_of(tars_in(made))


def test_the_manifest_of_an_export_lists_its_tars(tokenmill: Command, made: Path, tmp_path: Path) -> None:
    assert tokenmill("export", "webdataset", str(made), "out", "--clips-per-tar", "20", "--product", "fake").code == 0
    manifest, cache = json.loads((tmp_path / "out/manifest.json").read_text()), open_cache(str(made))
    assert (manifest["num_clips"], manifest["num_left_out"], manifest["where"]) == (30, 0, "true")
    assert list(manifest["products"]) == ["fake"]
    assert manifest["products"]["fake"]["fingerprint"] == cache.info.products["tokens/fake"].fingerprint
    assert [tar["num_clips"] for tar in manifest["tars"]] == [20, 10]
    for tar in manifest["tars"]:
        data = (tmp_path / "out" / tar["name"]).read_bytes()
        assert (tar["size_bytes"], tar["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        check_index(tmp_path / "out" / tar["name"], tmp_path / "out" / tar["index"], cache)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.index.parquet", "00000.tar", "00001.index.parquet", "00001.tar", "manifest.json",
    ]  # fmt: skip


def test_two_exports_are_the_same_bytes(tokenmill: Command, made: Path, tmp_path: Path) -> None:
    for output in ("one", "two"):
        assert tokenmill("export", "webdataset", str(made), output, "--clips-per-tar", "7").code == 0
    assert data_in(tmp_path / "one") == data_in(tmp_path / "two")
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_jobs_of_one_and_two_decoders_make_the_same_tars(
    tokenmill: Command, write_recipe: WriteRecipe, table: dict[str, str], tmp_path: Path
) -> None:
    recipe = write_recipe([table], shards=in_format("both"))
    for output, processes in (("one", 1), ("two", 2)):
        chosen = ["--set", f"cache={tmp_path / output}", "--set", f"decode.processes={processes}"]
        assert tokenmill("run", recipe, *chosen).code == 0
    assert len(tars_in(tmp_path / "one")) == 4
    assert data_in(tmp_path / "one") == data_in(tmp_path / "two")


def test_a_cache_may_have_its_tokens_in_tars_only(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path, tmp_path: Path
) -> None:
    recipe = write_recipe([footage / "carphone_pristine.mp4"], shards=in_format("webdataset"))
    done = tokenmill("run", recipe)
    assert done.code == 0, done.err
    assert not (tmp_path / "cache/tokens").exists()
    assert len(read_back(*tars_in(tmp_path / "cache"))) == 15
    assert tokenmill("sql", "cache", "select count(*) as n from clips", "--format", "csv").out == "n\n15\n"
    assert "shards=0" in tokenmill("run", recipe).err
    with pytest.raises(CacheError, match=r"its tokens are in tars only .*: read those with the webdataset library"):
        open_cache("cache").read("fake", ["0" * 32])
    refused = tokenmill("export", "webdataset", "cache", "out")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "it has no tokens as Parquet to export: tars can be read as they are" in refused.err


def test_tars_are_added_to_a_cache_of_token_files_and_the_other_way_round(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path, tmp_path: Path
) -> None:
    video = footage / "carphone_pristine.mp4"
    tokenmill("run", write_recipe([video]))
    before = data_in(tmp_path / "cache")
    assert tokenmill("run", write_recipe([video], shards=in_format("both"))).code == 0
    after = data_in(tmp_path / "cache")
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {"webdataset"}
    assert before.items() <= after.items()
    chosen = ["--set", f"cache={tmp_path / 'other'}"]
    tokenmill("run", write_recipe([video], shards=in_format("webdataset")), *chosen)
    assert tokenmill("run", write_recipe([video], shards=in_format("both")), *chosen).code == 0
    assert data_in(tmp_path / "other") == after


@pytest.mark.parametrize(
    ("left_out", "format", "tokens"),
    [
        (set(), "both", {"fake", "dct"}),
        ({"webdataset"}, "parquet", {"fake", "dct"}),
        ({"tokens/fake", "tokens/dct"}, "webdataset", {"fake", "dct"}),
        ({"tokens/dct"}, "parquet", {"fake"}),  # its tars are of other tokens than its token files
    ],
)
def test_the_recipe_of_a_cache_asks_for_what_the_cache_has(
    made: Path, left_out: set[str], format: str, tokens: set[str]
) -> None:
    info = open_cache(str(made)).info
    recipe = recipe_of(replace(info, products={p: e for p, e in info.products.items() if p not in left_out}))
    assert (recipe.shards.format, set(recipe.tokens), recipe.shards.frames) == (format, tokens, 64)


def test_another_tokenizer_makes_a_new_version_of_every_tar(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path, tmp_path: Path
) -> None:
    video = footage / "carphone_pristine.mp4"
    tokenmill("run", write_recipe([video], shards=in_format("both")))
    before = data_in(tmp_path / "cache")
    assert tokenmill("run", write_recipe([video], tokens=TWO_PRODUCTS, shards=in_format("both"))).code == 0
    after = data_in(tmp_path / "cache")
    assert before.items() <= after.items()
    added = [tmp_path / "cache" / name for name in after.keys() - before.keys() if name.endswith(".tar")]
    assert len(added) == 2
    assert {key for one in read_back(*added) for key in one if key.endswith(".npy")} == {"fake.npy", "dct.npy"}


def test_a_condition_chooses_clips_and_a_product_what_they_hold(tokenmill: Command, made: Path, tmp_path: Path) -> None:
    where = "metadata->>'split' = 'test' and start_s > 1"
    assert tokenmill("export", "webdataset", str(made), "out", "--product", "dct", "--where", where).code == 0
    samples = read_back(tmp_path / "out/00000.tar")
    assert 0 < len(samples) < 15
    assert sorted(one["__key__"] for one in samples) == open_cache(str(made)).clips(where)["clip_id"].to_pylist()
    assert {one["json"]["caption"] for one in samples} == {"the same, blurred"}
    assert {key for one in samples for key in one if key.endswith(".npy")} == {"dct.npy"}


def test_clips_that_lack_a_product_are_left_out_and_counted(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path, tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(footage / "carphone_pristine.mp4", videos)
    tokenmill("run", write_recipe([videos]))
    shutil.copy(footage / "bikes.mp4", videos)
    tokenmill("run", write_recipe([videos], tokens={"dct": TWO_PRODUCTS["dct"]}))
    done = tokenmill("export", "webdataset", "cache", "out")
    assert done.out.endswith("manifest.json: 15 clips with dct, fake, 32 left out for want of a product\n")
    assert len(read_back(tmp_path / "out/00000.tar")) == 15
    assert json.loads((tmp_path / "out/manifest.json").read_text())["num_left_out"] == 32


def test_an_export_of_a_snapshot_has_the_clips_of_its_time(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path, tmp_path: Path
) -> None:
    tokenmill("run", write_recipe([footage / "carphone_pristine.mp4"]))
    assert open_cache("cache").snapshot() == 1
    tokenmill("run", write_recipe([footage / "carphone_pristine.mp4", footage / "bikes.mp4"]))
    assert tokenmill("export", "webdataset", "cache", "now").code == 0
    assert tokenmill("export", "webdataset", "cache", "then", "--snapshot", "1").code == 0
    assert [len(read_back(tmp_path / name / "00000.tar")) for name in ("now", "then")] == [47, 15]


def test_an_export_goes_to_any_store(tokenmill: Command, made: Path, tmp_path: Path, store: Store) -> None:
    tokenmill("export", "webdataset", str(made), "here", "--clips-per-tar", "20")
    done = tokenmill("export", "webdataset", str(made), f"{store.url}/out", "--clips-per-tar", "20")
    assert done.code == 0, done.err
    filesystem, root = fsspec.core.url_to_fs(f"{store.url}/out")
    there = {path.rpartition("/")[2]: filesystem.cat_file(path) for path in filesystem.find(root)}
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("full",), "full: not empty (notes.txt is there): give an empty or new folder"),
        (("out", "--product", "fak"), "no product tokens/fak (did you mean 'fake'?); there are"),
        (("out", "--where", "num_valid > 99"), "no clip has tokens/dct, tokens/fake where num_valid > 99: tokenmill"),
        (("out", "--where", "nonsense"), "the query failed"),
    ],
)
def test_an_export_that_cannot_be_is_refused_in_one_line(
    tokenmill: Command, made: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    refused = tokenmill("export", "webdataset", str(made), *arguments)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert message in refused.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full/notes.txt").read_text() == "mine"

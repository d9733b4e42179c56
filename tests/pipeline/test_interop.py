"""A cache as other tools read it: by its files, and what their columns mean."""

import gc
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch

from tokenmill.jobs.export import export_webdataset
from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.decoding import TokenDecoder, decoder_of, token_files
from tokenmill.pipeline.token_file import TokenLayout
from tokenmill.schemas.errors import CacheError

from .test_cache import TOKENIZERS, make_cache
from .test_trajectory_file import clip_of, written

DOCS = Path(__file__).parents[2] / "docs" / "interop.md"
PRODUCTS = [product.removeprefix("tokens/") for product in TOKENIZERS]
Table = tuple[list[str], Any]  # clip ids, and what a decoder takes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    url = str(tmp_path_factory.mktemp("caches") / "cache")
    make_cache(url)
    return open_cache(url)


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenCache, "files", token_files, raising=False)
    monkeypatch.setattr(TokenCache, "decoder", decoder_of, raising=False)


@pytest.fixture(scope="module", autouse=True)
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Its libraries write to a folder of the tests, and ask nobody."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        import datasets

        environment.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def by_pyarrow(files: list[str], columns: list[str]) -> Table:
    table = pads.dataset(files).to_table(columns=["clip_id", *columns])
    return table["clip_id"].to_pylist(), table


def by_record_batch(files: list[str], columns: list[str]) -> Table:
    """A part of a part of a file: Arrow's offsets are then not 0."""
    batch = pq.read_table(files[0], columns=["clip_id", *columns]).to_batches()[0].slice(1, 3)
    return batch["clip_id"].to_pylist(), batch


def by_polars(files: list[str], columns: list[str]) -> Table:
    import polars

    frame = polars.scan_parquet(files).filter(polars.col("clip_id") < "a").select("clip_id", *columns).collect()
    return frame["clip_id"].to_list(), frame


def by_duckdb(files: list[str], columns: list[str]) -> Table:
    import duckdb

    table = duckdb.sql(f"select clip_id, {', '.join(columns)} from read_parquet({files})").to_arrow_table()
    return table["clip_id"].to_pylist(), table


def by_datasets(files: list[str], columns: list[str]) -> Table:
    import datasets

    rows = datasets.load_dataset("parquet", data_files=files, split="train")
    return list(rows["clip_id"]), rows[:]


TOOLS = [by_pyarrow, by_record_batch, by_polars, by_duckdb, by_datasets]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_reads_the_tokens_that_are_stored(cache: TokenCache, tool: Callable[..., Table]) -> None:
    for product in PRODUCTS:
        decoder = pickle.loads(pickle.dumps(decoder_of(cache, product)))
        clip_ids, stored = tool(token_files(cache, product), decoder.columns)
        assert len(clip_ids) >= 3
        wanted = cache.read(product, clip_ids)
        found = decoder(stored)[product]
        assert found.dtype == ("float32" if product == "mean" else "int32" if product == "dct" else "uint16")
        np.testing.assert_array_equal(found, wanted.float())


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_tool_reads_tokens_of_trajectories(tmp_path: Path, tool: Callable[..., Table], dtype: str) -> None:
    clips = [clip_of(i, dtype) for i in range(6)]
    path = written(tmp_path / "a.parquet", clips, dtype)
    layout = TokenLayout(dtype=dtype, shape=(16,), codebook_size=None)
    decoder = TokenDecoder(name="objects", layout=layout, has_trajectories=True)
    clip_ids, stored = tool([str(path)], decoder.columns)
    found = decoder(stored)["objects"]
    assert len(found) == len(clip_ids) >= 3
    for clip_id, one in zip(clip_ids, found, strict=True):
        bits = torch.from_numpy(clips[int(clip_id, 16)].values_Nd)
        np.testing.assert_array_equal(one, bits.view(torch.bfloat16).float() if dtype == "bfloat16" else bits)


def test_bytes_may_come_in_any_array() -> None:
    decoder = TokenDecoder(name="x", layout=TokenLayout(dtype="uint16", shape=(1, 1, 2), codebook_size=512))
    values = [b"\x01\x00\x00\x00", b"\x00\x01\x02\x00"]  # numpy shows such strings without their zeros
    for column in (
        values,
        np.array(values),
        np.array(values, "V4"),
        np.array(values, object),
        np.frombuffer(b"".join(values), np.uint8).reshape(2, 4),
        pa.chunked_array([values[:1], values[1:]]),
    ):
        assert decoder({"tokens": column})["x"].tolist() == [[[[1, 0]]], [[[256, 2]]]]
    assert decoder({"tokens": []})["x"].shape == (0, 1, 1, 2)


def test_columns_of_another_product_are_refused(cache: TokenCache) -> None:
    decoder = decoder_of(cache, "mean")
    with pytest.raises(CacheError, match="mean: 1 values of column tokens have 24 bytes, 72 to each were expected"):
        decoder({"tokens": [bytes(24)]})
    with pytest.raises(CacheError, match="levels: there is no column level_1: read level_1, level_2"):
        decoder_of(cache, "levels")({"tokens": [bytes(24)]})
    with pytest.raises(CacheError, match=r"no product tokens/dtc \(did you mean 'dct'"):
        decoder_of(cache, "dtc")
    with pytest.raises(CacheError, match="no product tokens/clip; there are dct"):
        token_files(cache, "clip")


def test_files_are_those_of_the_product_alone(cache: TokenCache) -> None:
    folder = Path(cache.folder.root)
    for product, full in (("dct", "tokens/dct"), ("tokens/fake", "tokens/fake"), ("clips", "clips")):
        assert token_files(cache, product) == sorted(map(str, (folder / full).glob("*.parquet")))


def documented() -> dict[str, str]:
    """The code of the document that can be run, by heading."""
    parts = re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    found = {heading: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for heading, text in parts}
    assert all(len(code) == 1 for code in found.values())
    return {heading: code for heading, (code,) in found.items()}


def assert_is_so(code: str, cache: TokenCache, folder: Path) -> None:
    """Run code of the document on a cache; it names clips, and their codes."""
    found: dict[str, Any] = {}
    exec(code.replace("out/cache", cache.folder.url).replace("tars/", f"{folder}/tars/"), found)
    assert len(found["clip_ids"]) >= 3
    np.testing.assert_array_equal(found["codes"], cache.read("dct", found["clip_ids"]))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of the webdataset library
@pytest.mark.parametrize("heading", [heading for heading in documented() if not heading.startswith("Ray")])
def test_what_the_document_says_is_so(cache: TokenCache, heading: str, tmp_path: Path) -> None:
    if heading == "WebDataset":
        export_webdataset(cache, str(tmp_path / "tars"), [], "true", 10)
    assert_is_so(documented()[heading], cache, tmp_path)
    gc.collect()

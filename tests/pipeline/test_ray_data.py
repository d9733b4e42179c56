"""A cache as a dataset of Ray Data: every clip once, the tokens that are stored, and shards for trainers."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.decoding import layout_of
from tokenmill.pipeline.ray_data import _blocks, _places, _Product, _product, _Reader, to_ray
from tokenmill.pipeline.token_file import TokenLayout
from tokenmill.schemas.errors import CacheError

from ..conftest import Store
from .test_cache import make_cache
from .test_interop import assert_is_so, documented
from .test_trajectory_file import clip_of, written

# Ray reads old settings of its own when its context is made.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    url = str(tmp_path_factory.mktemp("caches") / "cache")
    make_cache(url)
    return open_cache(url)


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.mark.usefixtures("two_cpus")
def test_every_clip_comes_once_with_its_tokens_and_columns(cache: TokenCache) -> None:
    products = ["dct", "tokens/mean", "levels"]
    rows = to_ray(cache, products, where="num_valid > 2", columns=["caption", "frame_pts_s"]).take_all()
    ids = [row["clip_id"] for row in rows]
    wanted = {clip["clip_id"]: clip for clip in cache.clips("num_valid > 2").to_pylist()}
    assert sorted(ids) == list(wanted)
    for name in ("num_valid", "caption", "frame_pts_s"):
        assert [row[name] for row in rows] == [wanted[clip_id][name] for clip_id in ids]
    for product, dtype in zip(products, ("int32", "float32", "uint16"), strict=True):
        found = np.stack([row[product] for row in rows])
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, cache.read(product, ids).float())


@pytest.mark.usefixtures("two_cpus")
def test_batches_of_torch_come_without_the_columns_that_are_texts(cache: TokenCache) -> None:
    codes = to_ray(cache, "fake", columns={"long": "end_s - start_s > 0.2"}).drop_columns(["clip_id"])
    batches = list(codes.iter_torch_batches(batch_size=5))
    assert sum(len(batch["long"]) for batch in batches) == len(cache.clips())
    assert {(batch["fake"].dtype, *batch["fake"].shape[1:]) for batch in batches} == {(torch.uint16, 2, 2, 3)}


@pytest.mark.usefixtures("two_cpus")
def test_what_the_document_says_of_ray_is_so(
    cache: TokenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenCache, "to_ray", to_ray, raising=False)
    assert_is_so(documented()["Ray Data and Ray Train"], cache, tmp_path)


def train_one_epoch(settings: dict) -> None:
    """What each worker of a TorchTrainer runs."""
    from ray import train

    shard = train.get_dataset_shard("train")
    found = [batch["codes"].long().sum(dim=(1, 2, 3)) for batch in shard.iter_torch_batches(batch_size=4)]
    torch.save(torch.cat(found), f"{settings['folder']}/{train.get_context().get_world_rank()}.pt")


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_each_worker_of_a_trainer_has_its_share_of_the_clips(cache: TokenCache, tmp_path: Path) -> None:
    import ray
    from ray import train
    from ray.train.torch import TorchTrainer

    ray.shutdown()  # two workers, and the tasks that read for them
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    dataset = to_ray(cache, "fake").rename_columns({"fake": "codes"}).drop_columns(["clip_id"])
    TorchTrainer(
        train_one_epoch,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=train.ScalingConfig(num_workers=2),
        run_config=train.RunConfig(storage_path=str(tmp_path / "runs")),
        datasets={"train": dataset},
    ).fit()
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert abs(len(shares[0]) - len(shares[1])) <= 1
    wanted = cache.read("fake", cache.clips()["clip_id"].to_pylist()).sum(dim=(1, 2, 3))
    assert torch.cat(shares).sort().values.tolist() == wanted.sort().values.tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tokens_of_trajectories_are_as_many_as_a_clip_has(cache: TokenCache, tmp_path: Path, dtype: str) -> None:
    folder = shutil.copytree(cache.folder.root, tmp_path / "cache")
    clips = [clip_of(i, dtype) for i in range(5)]
    written(folder / "objects.parquet", clips, dtype)
    layout, columns = TokenLayout(dtype=dtype, shape=(16,), codebook_size=None), ("__file_0", "__row_0")
    one = _Product(asked="objects", full="tokens/objects", kind="trajectories", layout=layout, columns=columns)
    places = pa.table({"clip_id": ["b", "a"], "__file_0": ["objects.parquet"] * 2, "__row_0": [4, 1]})
    table = _Reader(url=str(folder), products=(one,))(places)
    assert table["clip_id"].to_pylist() == ["b", "a"]
    for row, found in zip((4, 1), table["objects"].combine_chunks().to_numpy(), strict=True):
        bits = torch.from_numpy(clips[row].values_Nd)
        values = bits.view(torch.bfloat16).float() if dtype == "bfloat16" else bits
        np.testing.assert_array_equal(found, values)


def test_a_block_of_a_cache_in_any_store_may_be_of_several_files(store: Store) -> None:
    recipe, clips = make_cache(f"{store.url}/cache")
    cache = open_cache(recipe.cache)
    ids = [clips[i].clip_id for i in (20, 0, 31, 0)]
    asked = pa.table({"clip_id": ids, "i": range(4)})
    query = """select a.clip_id, name as __file_0, row_in_file as __row_0 from asked a join locations l
               on l.clip_id = a.clip_id::uuid where product = 'tokens/mean' order by i"""
    places = cache.answer(query, asked=asked)
    assert len(set(places["__file_0"].to_pylist())) > 1
    layout = layout_of("tokens/mean", cache.info.products["tokens/mean"])
    columns = ("__file_0", "__row_0")
    one = _Product(asked="mean", full="tokens/mean", kind="grid", layout=layout, columns=columns)
    table = _Reader(url=cache.folder.url, products=(one,))(places)
    found = table["mean"].combine_chunks().to_numpy()
    np.testing.assert_array_equal(np.stack(found), cache.read("mean", ids).float())


def test_blocks_are_of_one_file_and_not_too_large() -> None:
    places = pa.table({"__file_0": ["a"] * 5 + ["b"] * 2 + ["c"], "row": range(8)})
    assert [block["row"].to_pylist() for block in _blocks(places, "__file_0", 3)] == [[0, 1, 2], [3, 4], [5, 6], [7]]


def test_what_no_clip_has_is_refused(cache: TokenCache) -> None:
    with pytest.raises(CacheError, match=r"no product tokens/dtc \(did you mean 'dct'"):
        to_ray(cache, "dtc")
    with pytest.raises(CacheError, match="no clip has tokens/dct, tokens/fake where num_valid > 99"):
        to_ray(cache, ["dct", "fake"], where="num_valid > 99")
    with pytest.raises(CacheError, match=r"one product or more is needed, each once; found \[\]"):
        to_ray(cache, [])


@pytest.mark.parametrize("name", ["clip_id", "num_valid", "dct"])
def test_names_of_columns_that_are_taken_are_refused(cache: TokenCache, name: str) -> None:
    with pytest.raises(CacheError, match=f"columns: {name} would be twice in a batch: give them other names"):
        to_ray(cache, "dct", columns={name: "start_s"})


def test_columns_have_any_name_and_expressions_end_in_comments(cache: TokenCache) -> None:
    columns = {'a "b"': "num_valid -- of a clip", "CLIP_ID": "caption", "id_0": "start_s"}
    places = _places(cache, [_product(cache, "dct", 0)], "true -- all", columns)
    assert places.column_names == ["clip_id", "num_valid", *columns, "__file_0", "__row_0"]
    clips = {clip["clip_id"]: clip for clip in cache.clips().to_pylist()}
    assert sorted(places["clip_id"].to_pylist()) == sorted(clips)
    for row in places.to_pylist():
        clip = clips[row["clip_id"]]
        found = [row["num_valid"], *(row[name] for name in columns)]
        assert found == [clip["num_valid"], clip["num_valid"], clip["caption"], clip["start_s"]]

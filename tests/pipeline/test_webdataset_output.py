"""Tars: what the webdataset library and plain tar make of them, and that the same samples are the same bytes."""

import gc
import hashlib
import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds

from tokenmill.pipeline.store import bits_of
from tokenmill.pipeline.token_file import TokenLayout
from tokenmill.pipeline.webdataset_output import Sample, TarProduct, index_path, tars_fingerprint, write_tar
from tokenmill.schemas.shard import VideoText

SHAPE = (2, 3, 4)


def product_of(codebook_size: int | None = 1000, dtype: str = "uint16") -> TarProduct:
    shape = SHAPE if codebook_size else (*SHAPE, 5)
    return TarProduct(
        tokenizer="some/tokenizer", layout=TokenLayout(dtype=dtype, shape=shape, codebook_size=codebook_size)
    )


def clip_of(number: int) -> dict[str, Any]:
    return {
        "clip_id": f"{number:032x}",
        "video_id": "v" * 64,
        "uri": "/videos/ä.mp4",
        "start_s": number / 10,
        "end_s": number / 10 + 0.5,
        "num_valid": 3,
        "frame_pts_s": (0.0, 0.1, 0.2),
        "decoder": "not for tars",
    }


def samples_of(num_clips: int, products: dict[str, TarProduct]) -> list[Sample]:
    """Samples with different tokens; the first clip's video has no text."""
    arrays = {}
    for name, product in products.items():
        values = np.arange(num_clips * product.layout.num_values, dtype=np.int16) % 251
        arrays[name] = product.arrays(values.reshape(num_clips, *product.layout.shape))
    text = VideoText(caption='a "caption"', metadata='{"b": [1, null], "a": "ü"}')
    return [
        Sample(clip=clip_of(i), text=text if i else VideoText(), arrays={name: a[i] for name, a in arrays.items()})
        for i in range(num_clips)
    ]


def described(products: dict[str, TarProduct]) -> dict[str, dict[str, Any]]:
    return {name: product.to_json() for name, product in products.items()}


def read_back(*paths: Path) -> list[dict[str, Any]]:
    """All samples of tars as the webdataset library decodes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the library leaves its files to the garbage collector
        samples = list(wds.WebDataset([str(path) for path in paths], shardshuffle=False).decode())
        gc.collect()
    return samples


def test_the_webdataset_library_reads_what_was_written(tmp_path: Path) -> None:
    products = {"dct": product_of(), "vae": product_of(None, "float32"), "big": product_of(1 << 18)}
    samples = samples_of(3, products)
    assert write_tar(str(tmp_path / "a.tar"), samples, described(products), "version") == 3
    read = read_back(tmp_path / "a.tar")
    assert [one["__key__"] for one in read] == [sample.clip["clip_id"] for sample in samples]
    for one, sample in zip(read, samples, strict=True):
        for name, array in sample.arrays.items():
            assert one[f"{name}.npy"].dtype == array.dtype
            np.testing.assert_array_equal(one[f"{name}.npy"], array)
    assert {name: array.dtype.name for name, array in samples[0].arrays.items()} == {
        "dct": "uint16",
        "vae": "float32",
        "big": "int32",
    }


def test_a_sample_says_what_it_is(tmp_path: Path) -> None:
    products = {"dct": product_of(), "vae": product_of(None, "bfloat16")}
    write_tar(str(tmp_path / "a.tar"), samples_of(2, products), described(products), "version")
    without, with_text = (one["json"] for one in read_back(tmp_path / "a.tar"))
    assert with_text == {
        "clip_id": f"{1:032x}",
        "video_id": "v" * 64,
        "uri": "/videos/ä.mp4",
        "caption": 'a "caption"',
        "metadata": {"b": [1, None], "a": "ü"},
        "start_s": 0.1,
        "end_s": 0.6,
        "num_valid": 3,
        "frame_pts_s": [0.0, 0.1, 0.2],
        "fingerprint": "version",
        "products": {
            "dct": {"tokenizer": "some/tokenizer", "dtype": "uint16", "shape": [2, 3, 4], "codebook_size": 1000},
            "vae": {"tokenizer": "some/tokenizer", "dtype": "bfloat16", "shape": [2, 3, 4, 5], "codebook_size": None},
        },
    }
    assert (without["caption"], without["metadata"]) == (None, None)


def test_members_of_a_sample_are_neighbours_and_name_no_time_or_user(tmp_path: Path) -> None:
    products = {"zz": product_of(), "dct": product_of()}
    write_tar(str(tmp_path / "a.tar"), samples_of(2, products), described(products), "version")
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        f"{i:032x}.{suffix}" for i in range(2) for suffix in ("dct.npy", "json", "zz.npy")
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_the_index_leads_to_every_member(tmp_path: Path) -> None:
    products = {"dct": product_of(), "vae": product_of(None, "float16")}
    samples = samples_of(4, products)
    path = tmp_path / "a.tar"
    write_tar(str(path), samples, described(products), "version")
    index = pq.read_table(index_path(str(path)))
    assert index.schema.metadata[b"tokenmill.fingerprint"] == b"version"
    assert index.num_rows == 4 * 3
    data = path.read_bytes()
    for row in index.to_pylist():
        number, (key, suffix) = int(row["clip_id"], 16), row["member"].split(".", 1)
        content = data[row["offset"] : row["offset"] + row["size_bytes"]]
        assert key == row["clip_id"]
        if suffix == "json":
            assert json.loads(content)["clip_id"] == key
        else:
            np.testing.assert_array_equal(np.load(io.BytesIO(content)), samples[number].arrays[suffix[:-4]])


def test_the_same_samples_are_the_same_bytes(tmp_path: Path) -> None:
    products = {"dct": product_of(), "vae": product_of(None, "float32")}
    digests = set()
    for name in ("a", "b"):
        write_tar(str(tmp_path / f"{name}.tar"), samples_of(3, products), described(products), "version")
        digests.add(hashlib.sha256((tmp_path / f"{name}.tar").read_bytes()).hexdigest())
    # Golden: a change of these bytes needs a new LAYOUT_REVISION.
    assert digests == {"2c63f6daeb1a186fe05e6fc6554af240725712485edab53b31da7d7774d133fb"}
    indexes = [Path(index_path(str(tmp_path / f"{name}.tar"))).read_bytes() for name in ("a", "b")]
    assert indexes[0] == indexes[1]


def test_two_versions_of_the_same_tokens_are_two_files(tmp_path: Path) -> None:
    products = {"dct": product_of()}
    for version in ("one", "two"):
        write_tar(str(tmp_path / f"{version}.tar"), samples_of(2, products), described(products), version)
    for suffix in (".tar", ".index.parquet"):
        assert (tmp_path / f"one{suffix}").read_bytes() != (tmp_path / f"two{suffix}").read_bytes()


def test_bfloat16_is_kept_exactly_as_float32() -> None:
    latents = torch.randn(2, *SHAPE, 5).to(torch.bfloat16)
    stored = product_of(None, "bfloat16").arrays(bits_of(latents))
    assert stored.dtype == np.float32
    assert torch.equal(torch.from_numpy(stored), latents.float())
    assert torch.equal(torch.from_numpy(stored).to(torch.bfloat16), latents)


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint16"), (65536, "uint16"), (65537, "int32"), (1 << 18, "int32")])
def test_the_largest_code_of_a_codebook_fits(size: int, dtype: str) -> None:
    stored = product_of(size).arrays(np.full((1, *SHAPE), size - 1, np.int32))
    assert stored.dtype == dtype
    assert (stored == size - 1).all()


@pytest.mark.parametrize("code", [-1, 1000])
def test_codes_beyond_the_codebook_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match=f"codes reach from {code} to {code}, the codebook has 1000"):
        product_of().arrays(np.full((1, *SHAPE), code, np.int32))


def test_a_product_of_a_long_name_is_read_back(tmp_path: Path) -> None:
    name = "a" * 120  # longer than a plain tar header takes
    products = {name: product_of()}
    samples = samples_of(1, products)
    write_tar(str(tmp_path / "a.tar"), samples, described(products), "version")
    (read,) = read_back(tmp_path / "a.tar")
    np.testing.assert_array_equal(read[f"{name}.npy"], samples[0].arrays[name])


def test_the_version_of_tars_follows_all_products_in_them() -> None:
    versions = [{"tokens/a": "1"}, {"tokens/a": "2"}, {"tokens/b": "1"}, {"tokens/a": "1", "tokens/b": "1"}]
    assert len({tars_fingerprint(tokens) for tokens in versions}) == 4
    assert tars_fingerprint({"x": "1", "y": "2"}) == tars_fingerprint({"y": "2", "x": "1"})

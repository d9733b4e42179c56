"""Trajectory tokens, embeddings and masks by TrajTok beside other tokens, from one decode, by a small checkpoint."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenmill as library
from tokenmill.schemas.errors import CacheError
from tokenmill.tokenizers import trajtok_model, trajtok_segmenter
from tokenmill.tokenizers.load import load_tokenizer
from tokenmill.tokenizers.trajtok_model import Sizes
from tokenmill.tokenizers.trajtok_tokenizer import vision_of

from ..pipeline.test_webdataset_output import read_back
from ..tokenizers.test_trajtok_tokenizer import published
from ..tokenizers.trajtok_kit import filled
from .conftest import Command

SIZES = Sizes(dim=64, num_slots=16, grid=14, depths=(1, 1, 1, 1), level=1, vit_layers=2, vit_heads=4, vit_dim=64)
OPTIONS = {"grid": 14, "vit_heads": 4, "chunk_frames": 4, "level": 1}
CLIPS = {"num_frames": 8, "height": 56, "width": 56, "fps": 8, "resize": "squash", "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (trajtok_model, trajtok_segmenter):
            patch.setattr(module, "IMAGE_SIDE", 56)
        model = filled(vision_of(SIZES), "")
        yield published(model, tmp_path_factory.mktemp("weights") / "model.pth")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def job(weights: str) -> dict:
    tokens = {"tokenizer": "trajtok/trajvit2", "weights": weights, "batch_size": 3}
    return {
        "clips": CLIPS,
        "tokens": {
            "objects": tokens | {"options": OPTIONS | {"embedding": True, "soft_mass": True}},
            "dct": {"tokenizer": "dct_fsq/488_262144"},
        },
        "masks": {
            "seen": {
                "segmenter": "trajtok",
                "weights": weights,
                "options": {"grid": 14, "chunk_frames": 4},
            }
        },
        "shards": {"frames": 32},
    }


def test_a_job_makes_tokens_embeddings_and_masks_of_trajectories(
    tokenmill: Command, write_recipe: Callable[..., str], footage: Path, tmp_path: Path, job: dict, weights: str
) -> None:
    sources = [footage / "carphone_pristine.mp4"]
    run = tokenmill("run", write_recipe(sources, **job))
    assert run.code == 0, run.err
    cache = library.open_cache(str(tmp_path / "cache"))
    assert set(cache.info.products) == {"clips", "tokens/objects", "tokens/dct", "embeddings/objects", "masks/seen"}
    clips = cache.clips().to_pylist()
    ids = [clip["clip_id"] for clip in clips]
    tokens = cache.read_trajectories("objects", ids)
    tokenizer = load_tokenizer("trajtok/trajvit2", weights, options=OPTIONS)
    assert tokenizer.grid_shape(8, 56, 56) == (8, 14, 14)
    for one, clip in zip(tokens, clips, strict=True):
        # A token for every slot that owns a patch, twice (level 1), in chunks that are not padding alone.
        for chunk in range(2):
            frames = one.assignment_Thw[4 * chunk : 4 * chunk + 4]
            wanted = np.unique(frames).repeat(2) if 4 * chunk < clip["num_valid"] else []
            assert one.slots_N[one.chunks_N == chunk].tolist() == list(wanted)
        assert one.values_Nd.shape == (len(one.slots_N), 64)
        assert one.mass_N is not None
        assert (one.tracks_Thw[: clip["num_valid"]] > 0).all()
    embeddings = cache.read("embeddings/objects", ids)
    assert embeddings.shape == (len(ids), 256)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(ids)))
    with pytest.raises(CacheError, match="as many tokens as trajectories: read_trajectories gives them"):
        cache.read("objects", ids)
    for batch in cache.loader(["objects", "embeddings/objects"], 2):
        wanted = cache.read_trajectories("objects", batch["clip_id"])
        assert batch["objects"].values.view(torch.int16).numpy().tobytes() == b"".join(
            one.values_Nd.tobytes() for one in wanted
        )
        assert torch.equal(batch["embeddings/objects"], cache.read("embeddings/objects", batch["clip_id"]))
    assert cache.sql("select count(*) as n from tokens")["n"][0].as_py() == 2 * len(ids)
    with pytest.raises(CacheError, match="its tokens lie in grids: read gives them"):
        cache.read_trajectories("dct", ids)
    assert_sql_answers(cache, ids, tokens, embeddings)
    assert_exports(tokenmill, cache, tmp_path / "tars")
    assert_resumes(tokenmill, tmp_path / "cache", write_recipe(sources, **job))


def assert_exports(tokenmill: Command, cache: library.TokenCache, tars: Path) -> None:
    names = ("objects", "dct", "masks/seen", "embeddings/objects")
    products = [word for name in names for word in ("--product", name)]
    run = tokenmill("export", "webdataset", cache.folder.url, str(tars), *products)
    assert run.code == 0, run.err
    for sample in read_back(tars / "00000.tar"):
        (tokens,) = cache.read_trajectories("objects", [sample["__key__"]])
        (masks,) = cache.read_masks("seen", [sample["__key__"]])
        stored = sample["objects.npz"]
        np.testing.assert_array_equal(stored["tokens"], tokens.values_Nd)
        np.testing.assert_array_equal(stored["assignment"], tokens.assignment_Thw)
        np.testing.assert_array_equal(sample["seen.masks.npz"]["masks"], masks.masks_THW)
        assert len(sample["seen.masks.npz"]["trajectory_ids"]) == len(masks.graph_MT)
        assert sample["objects.embedding.npy"].shape == (256,)
        assert sample["dct.npy"].shape == (2, 7, 7)


def assert_sql_answers(cache: library.TokenCache, ids: list[str], tokens: list, embeddings: torch.Tensor) -> None:
    rows = cache.sql("select clip_id, num_tokens, slots from tokens_objects order by clip_id").to_pylist()
    assert [row["num_tokens"] for row in rows] == [len(one.slots_N) for one in tokens]
    assert rows[0]["slots"] == tokens[0].slots_N.tolist()
    near = cache.sql(
        """select b.clip_id, array_cosine_similarity(a.embedding, b.embedding) as similarity
           from embeddings_objects a, embeddings_objects b where a.clip_id = ? order by similarity desc""",
        [ids[0]],
    )
    assert near["clip_id"][0].as_py() == ids[0]
    wanted = (embeddings @ embeddings[0]).sort(descending=True).values
    np.testing.assert_allclose(near["similarity"].to_numpy(), wanted, atol=1e-6)


def assert_resumes(tokenmill: Command, cache: Path, recipe: str) -> None:
    before = {
        path: path.read_bytes()
        for folder in ("tokens", "embeddings", "masks")
        for path in cache.glob(f"{folder}/**/*.parquet")
    }
    assert len(before) == 4
    for lost in ("embeddings/objects", "masks/seen"):  # as if killed before these were committed
        manifest = next((cache / "manifests" / lost).glob("*.json"))
        manifest.unlink()
    for packed in cache.glob("manifests/packed-*"):
        packed.unlink()
    assert tokenmill("run", recipe).code == 0
    assert {path: path.read_bytes() for path in before} == before
    run = tokenmill("verify", str(cache), "--deep", "--retokenize", "0.3", "--quality", "0.1")
    assert run.code == 0, run.out
    assert "tokens/objects: largest error 0" in run.out
    assert "0 of" in run.out.partition("masks/seen: ")[2]
    assert "embeddings/objects: largest error 0" in run.out


def test_embeddings_asked_for_later_leave_the_tokens_as_they_are(
    tokenmill: Command, write_recipe: Callable[..., str], footage: Path, tmp_path: Path, job: dict
) -> None:
    sources = [footage / "carphone_pristine.mp4"]
    objects = job["tokens"]["objects"]
    plain = {"objects": objects | {"options": OPTIONS}}
    assert tokenmill("run", write_recipe(sources, clips=CLIPS, tokens=plain)).code == 0
    cache = tmp_path / "cache"
    files = sorted(path.name for path in cache.glob("tokens/objects/*"))
    asked = {"objects": objects | {"options": OPTIONS | {"embedding": True}}}
    assert tokenmill("run", write_recipe(sources, clips=CLIPS, tokens=asked)).code == 0
    assert sorted(path.name for path in cache.glob("tokens/objects/*")) == files
    assert len(list(cache.glob("embeddings/objects/*"))) == len(files)
    masked = {"objects": objects | {"options": OPTIONS | {"embedding": True, "mask_mode": "masked"}}}
    assert tokenmill("run", write_recipe(sources, clips=CLIPS, tokens=masked)).code == 0
    assert sorted(path.name for path in cache.glob("tokens/objects/*")) == files
    assert len(list((cache / "products/embeddings/objects").glob("*.json"))) == 2


def test_tokens_of_trajectories_are_shown_and_do_not_decode(
    tokenmill: Command, write_recipe: Callable[..., str], footage: Path, tmp_path: Path, job: dict
) -> None:
    assert tokenmill("run", write_recipe([footage / "carphone_pristine.mp4"], **job)).code == 0
    cache = str(tmp_path / "cache")
    clip_id = library.open_cache(cache).clips()["clip_id"][0].as_py()
    for name in ("objects", "seen"):
        shown = tokenmill("reconstruct", cache, clip_id, f"{name}.mp4", "--masks", name, "--png", f"{name}.png")
        assert shown.code == 0, shown.err
        assert "trajectories" in shown.out
        assert (tmp_path / f"{name}.mp4").stat().st_size > 1000
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    refused = tokenmill("reconstruct", cache, clip_id, "x.mp4", "--product", "objects")
    assert refused.code == 1
    assert "tokens of trajectories do not decode to frames" in refused.err
    scored = tokenmill("verify", cache, "--quality", "0.2", "--truth", "seen")
    assert scored.code == 0, scored.out
    assert [line.split()[0] for line in scored.out.splitlines() if "tokens/objects" in line] == ["tokens/objects"]
    # The tokenizer's own segmenter made both: at the grid's size they are the same, borders apart.
    (found,) = [line.split() for line in scored.out.splitlines() if "tokens/objects" in line]
    assert float(found[2]) > 0.9
    absent = tokenmill("reconstruct", cache, clip_id, "x.mp4", "--masks", "sen")
    assert absent.code == 1
    assert "no product masks/sen (did you mean 'seen'?)" in absent.err

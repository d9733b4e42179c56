"""Frames are scored by the bits of PyraTok's codes, in caches that have nothing else of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tokenmill as library
from tokenmill.schemas.errors import CacheError, TokenizerError
from tokenmill.tokenizers.pyratok_pyramid import PyramidSizes, build_pyramid, save_pyramid
from tokenmill.tokenizers.pyratok_scorer import PyraTokScorer
from tokenmill.tokenizers.pyratok_vae import VaeSizes

from ..tokenizers.pyratok_kit import filled
from .relevance_kit import make, planted_recipe, planted_video

SIZES = VaeSizes(base_dim=4, z_dim=16, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, True))


def made(folder: Path, *, native_grid: bool, text_width: int | None = 16, num_frames: int = 17) -> tuple[str, Path]:
    weights = str(folder / "model.safetensors")
    sizes = PyramidSizes(native_grid=native_grid, text_width=text_width)
    save_pyramid(filled(build_pyramid(SIZES, sizes), "bits."), weights)
    tokens = {"codes": {"tokenizer": "pyratok/pyramid", "weights": weights}}
    clips = {"num_frames": num_frames, "height": 16, "width": 16}
    recipe = planted_recipe(folder, {"tokens": tokens, "clips": clips, "frames": None}, _video)
    make(recipe)
    return weights, folder / "cache"


def _video(folder: Path) -> None:
    planted_video(folder / "0.mp4", 60, {"red": [range(20, 30)]}, seed=0)


@pytest.mark.parametrize(("native_grid", "num_frames"), [(True, 17), (False, 17), (True, 15), (False, 4), (True, 1)])
def test_frames_have_the_embeddings_of_their_codes(tmp_path: Path, *, native_grid: bool, num_frames: int) -> None:
    weights, folder = made(tmp_path, native_grid=native_grid, num_frames=num_frames)
    (tmp_path / "videos" / "0.mp4").unlink()
    cache, scorer = library.open_cache(str(folder)), PyraTokScorer(weights)
    clips = cache.sql("from clips order by clip_id").to_pylist()
    for clip in clips:
        (first,) = cache.read_levels("codes", [clip["clip_id"]], levels=1)
        found = cache.read_frames("codes", clip["clip_id"])
        assert found.frames == tuple(range(clip["num_valid"]))
        assert list(found.pts_s) == clip["frame_pts_s"]
        wanted_TD = scorer.embed_codes(first[0], num_frames)[: clip["num_valid"]]
        assert np.allclose(found.embeddings_KD, wanted_TD, atol=1e-3)
    (query_id,) = cache.score("a red square")
    rows = cache.sql("from relevance where query_id = ? order by clip_id, frame", [query_id])
    assert rows.num_rows == sum(clip["num_valid"] for clip in clips)
    with torch.inference_mode():
        text_D = scorer.embed_texts(["a red square"])[0]
    (first,) = cache.read_levels("codes", [clips[0]["clip_id"]], levels=1)
    wanted_T = scorer.embed_codes(first[0], num_frames)[: clips[0]["num_valid"]] @ text_D
    assert np.allclose(rows["raw"].to_numpy()[: clips[0]["num_valid"]], wanted_T, atol=1e-6)
    assert cache.select("a red square", 40, "codes").num_tokens <= 40


def test_codes_answer_by_name_where_there_are_embeddings_too(tmp_path: Path) -> None:
    _, folder = made(tmp_path, native_grid=True)
    make(str(tmp_path / "recipe.yaml"), "frames={fps: all, encoders: {colours: {encoder: fake}}}")
    cache = library.open_cache(str(folder))
    cache.score("red")
    cache.score("red", "codes")
    counts = cache.sql("select scorer, count(*) as n from relevance group by 1 order by 1").to_pylist()
    assert counts == [{"scorer": "codes", "n": 60}, {"scorer": "colours", "n": 60}]


def test_a_pyramid_without_texts_says_so(tmp_path: Path) -> None:
    _, folder = made(tmp_path, native_grid=True, text_width=None)
    with pytest.raises((TokenizerError, CacheError), match="trained without texts and cannot score frames"):
        library.open_cache(str(folder)).score("red")

"""Published files of TrajTok load, whatever widths they have, and other files are refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers import trajtok_towers
from tokenmill.tokenizers.trajtok import build_segmenter, load_segment_clip, load_segmenter
from tokenmill.tokenizers.trajtok_towers import SegmentClip

from .trajtok_kit import TINY, clip, normalized


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Without gradients, and on one thread: several wait for each other where the machine has more to do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(num_threads)


def test_published_files_load_without_what_they_do_not_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajtok_towers, "TEXT_DIM", 48)
    monkeypatch.setattr(trajtok_towers, "TEXT_TOKENS", 200)
    model = SegmentClip(replace(TINY, vit_dim=96, feature_dim=32, token_dim=48))
    state = model.state_dict()
    segmenter = build_segmenter(replace(TINY, up=4))
    more = {
        "itm_head.weight": torch.zeros(2, 2),
        "text_encoder.embeddings.position_ids": torch.arange(512)[None],
        "text_encoder.encoder.layer.9.crossattention.self.query.weight": torch.zeros(48, 48),
    }
    torch.save({"model": state | more, "meta": {"epoch": 3}}, tmp_path / "clip.pth")
    only = {f"module.vision_encoder.{key}": value for key, value in segmenter.state_dict().items()}
    torch.save({"model": only | {"module.temp": torch.zeros(())}, "meta": {}}, tmp_path / "segmenter.pth")

    loaded = load_segment_clip(str(tmp_path / "clip.pth"), grid=14, vit_heads=4)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key])
    found = load_segmenter(str(tmp_path / "segmenter.pth"), grid=14)
    frames = normalized(clip(1, 56, 3))
    assert torch.equal(found(frames).fine_logits_BNK, segmenter(frames).fine_logits_BNK)
    features = torch.randn(1, 49, 32)
    rows = loaded.vision_encoder(frames, 1, features_BND=features)[0]
    assert rows.shape == (1, 17, 48)
    torch.testing.assert_close(loaded.embed_rows(rows).norm(dim=-1), torch.ones(1))
    texts = loaded.embed_text(torch.tensor([[101, 7, 102, 0]]), torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(1))
    other = load_segment_clip(str(tmp_path / "clip.pth"), grid=14, vit_heads=4, add_mean_traj=True)
    assert not torch.equal(other.vision_encoder(frames, 1, features_BND=features)[0], rows)


@pytest.mark.parametrize("up", [1, 2, 8, None])
def test_the_finer_grid_is_read_from_the_file(up: int | None, tmp_path: Path) -> None:
    sizes = replace(TINY, up=up, dim=128)
    state = build_segmenter(sizes).state_dict()
    torch.save({f"vision_encoder.{key}": value for key, value in state.items()}, tmp_path / "segmenter.pth")
    found = load_segmenter(str(tmp_path / "segmenter.pth"), grid=14)(normalized(clip(2, 32, 1)))
    assert found.logits_BNK.shape == (1, 2 * 14**2, 8)
    fine = found.fine_logits_BNK
    assert fine is None if up is None else fine.shape == (1, 2 * (14 * up) ** 2, 8)


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(TokenizerError, match=r"no tensor trajectory_perceiver.latents .* not those of TrajTok"):
        load_segmenter(str(tmp_path / "other.pth"))
    state = build_segmenter(TINY).state_dict()
    state.pop("log_scale")
    torch.save({"model": {f"vision_encoder.{key}": value for key, value in state.items()}}, tmp_path / "less.pth")
    with pytest.raises(TokenizerError, match=r"not those of Segmenter: of 121 tensors 1 missing \(log_scale\)"):
        load_segmenter(str(tmp_path / "less.pth"))

"""The networks of SAM 2, tiny and at random: what loads, what is refused, and that objects are followed as they should be."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenmill.pipeline.sam2_masks import at_size
from tokenmill.pipeline.sam2_network import TWINS, ClipNetwork, load_network
from tokenmill.schemas.errors import TokenizerError

from .sam2_kit import SIDE, boxes, save, still, tiny_config


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads gain nothing in networks this small, and cost much where other work runs beside the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("sam2"))


def test_following_gives_what_a_plain_session_of_transformers_gives(checkpoint: str) -> None:
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    model, frames_THWC = load_network(checkpoint, "cpu", None), still(12, (SIDE, SIDE))
    frames_THWC = np.stack([np.roll(frame, 2 * t, axis=1) for t, frame in enumerate(frames_THWC)])
    masks_NHW = boxes((4, 40, 8, 30), (30, 60, 20, 50), (10, 20, 40, 60), size=(SIDE, SIDE))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels_TCHW = ((torch.from_numpy(frames_THWC) / 255 - mean) / std).permute(0, 3, 1, 2)
    cpu = torch.device("cpu")
    session = Sam2VideoInferenceSession(pixels_TCHW, SIDE, SIDE, cpu, cpu, cpu, torch.float32)
    for i, mask_HW in enumerate(masks_NHW):
        session.add_mask_inputs(session.obj_id_to_idx(i), 1, mask_HW[None, None].float())
    session.obj_with_new_inputs = [0, 1, 2]
    plain = [out.pred_masks for out in model.propagate_in_video_iterator(session, start_frame_idx=1)]

    network = ClipNetwork(model, frames_THWC, torch.float32)
    network.prompt(1, masks_NHW[:2])
    network.prompt(1, masks_NHW[2:])
    for t in range(2, 12):
        expected_NHW = at_size(plain[t - 1][:, 0], SIDE, SIDE)
        found_NHW = network.follow(t)
        assert found_NHW.float().mean() == pytest.approx(expected_NHW.float().mean().item(), abs=1e-3)
        assert (found_NHW != expected_NHW).float().mean() < 1e-3


def test_what_is_remembered_does_not_grow_with_the_clip(checkpoint: str) -> None:
    def tensors_in(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel()
        return sum(map(tensors_in, value.values() if isinstance(value, dict) else ())) + (
            sum(map(tensors_in, value)) if isinstance(value, list) else 0
        )

    network = ClipNetwork(load_network(checkpoint, "cpu", None), still(60), torch.float32)
    network.prompt(0, boxes((4, 40, 8, 30), (30, 40, 20, 50), size=(48, 64)))
    held = []
    for t in range(1, 60):
        network.follow(t)
        held.append(sum(tensors_in(session.output_dict_per_obj) for session in network._sessions))
    assert held[20] == held[-1]
    assert held[-1] < 3 * held[3]
    network.forget()
    assert network._sessions == []


def refused(folder: Path, match: str) -> None:
    with pytest.raises(TokenizerError, match=match) as caught:
        load_network(str(folder), "cpu", None)
    assert "\n" not in str(caught.value)
    assert "give a folder with config.json and model.safetensors of a Sam2VideoModel" in str(caught.value)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "there is no config.json in it")
    refused(tmp_path / "absent", "there is no config.json in it")


@pytest.mark.parametrize("text", ["{", "\x00", ""])
def test_config_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "config.json is no JSON")


@pytest.mark.parametrize(("text", "kind"), [('{"model_type": "sam2"}', "'sam2'"), ("{}", "None"), ("[1]", "None")])
def test_checkpoint_of_another_model_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, f"config.json has model_type {kind}, 'sam2_video' is wanted")


def test_config_that_describes_no_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "sam2_video", "image_size": "large"}')
    refused(tmp_path, "config.json describes no network")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    refused(tmp_path, "there is no model.safetensors in it")


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = Path(save(tmp_path)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(tmp_path, "model.safetensors is not readable")


def test_missing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, without=["no_memory_embedding", "memory_encoder.projection.bias"])
    refused(tmp_path, r"lacks 2 of \d+ tensors, or has other shapes \(.*no_memory_embedding.*\)")


def test_tensors_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    config = json.loads((Path(save(tmp_path)) / "config.json").read_text())
    config["memory_attention_feed_forward_hidden_size"] = 33
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, r"lacks 3 of \d+ tensors, or has other shapes \(memory_attention.layers.0.linear1.weight,")


@pytest.mark.parametrize("absent", TWINS)
def test_position_embedding_that_is_stored_once_is_used_twice(tmp_path: Path, absent: str, checkpoint: str) -> None:
    # A checkpoint in which both are there and differ: the one that is left must be used for both.
    model = load_network(save(tmp_path, without=[absent]), "cpu", None)
    tensors = model.state_dict()
    assert torch.equal(tensors[TWINS[0]], tensors[TWINS[1]])

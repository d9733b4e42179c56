"""The networks of SAM 2, tiny and at random: what loads and what is refused, and how objects are followed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenmill.pipeline.sam2_masks import at_size
from tokenmill.pipeline.sam2_network import TWINS, ClipNetwork, check_network, load_network
from tokenmill.schemas.errors import TokenizerError

from .sam2_kit import SIDE, boxes, save, still, tiny_config


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads gain nothing in networks this small, and cost much where other work runs beside the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normalised(frames_THWC: np.ndarray) -> torch.Tensor:
    """Pixels (T,3,H,W) as the networks of transformers take them."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(frames_THWC) / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("sam2"))


def test_masks_of_points_are_those_of_the_image_model_of_transformers(checkpoint: str) -> None:
    from transformers import Sam2Config, Sam2Model

    model, frames_THWC = load_network(checkpoint, "cpu", None), still(3, (SIDE, SIDE))
    parts = {name: getattr(model.config, f"{name}_config").to_dict() for name in ("vision", "prompt_encoder")}
    config = Sam2Config(
        vision_config=parts["vision"],
        prompt_encoder_config=parts["prompt_encoder"],
        mask_decoder_config=model.config.mask_decoder_config.to_dict(),
    )
    image_model: Any = Sam2Model(config).eval()
    image_model.load_state_dict({name: model.state_dict()[name] for name in image_model.state_dict()})
    points_P2 = np.array([[0.5, 0.25], [0.125, 0.875], [0.75, 0.0]])
    with torch.inference_mode():
        plain = image_model(
            pixel_values=normalised(frames_THWC[1:2]),
            input_points=torch.from_numpy(points_P2).float()[None, :, None] * SIDE - 0.5,
            input_labels=torch.ones((1, 3, 1), dtype=torch.int32),
        )
    logits_Nhw, iou_N = ClipNetwork(model, frames_THWC, torch.float32).decode(1, points_P2)
    assert plain.pred_masks.std() > 0.01
    assert logits_Nhw.numpy() == pytest.approx(plain.pred_masks[0].flatten(0, 1).numpy(), abs=1e-5)
    assert iou_N.numpy() == pytest.approx(plain.iou_scores.flatten().numpy(), abs=1e-5)


def test_following_gives_what_a_plain_session_of_transformers_gives(checkpoint: str) -> None:
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    model, frames_THWC = load_network(checkpoint, "cpu", None), still(12, (SIDE, SIDE))
    frames_THWC = np.stack([np.roll(frame, 2 * t, axis=1) for t, frame in enumerate(frames_THWC)])
    masks_NHW = boxes((4, 40, 8, 30), (30, 60, 20, 50), (10, 20, 40, 60), size=(SIDE, SIDE))
    cpu = torch.device("cpu")
    session = Sam2VideoInferenceSession(normalised(frames_THWC), SIDE, SIDE, cpu, cpu, cpu, torch.float32)
    for i, mask_HW in enumerate(masks_NHW):
        session.add_mask_inputs(session.obj_id_to_idx(i), 1, mask_HW[None, None].float())
    session.obj_with_new_inputs = [0, 1, 2]
    plain = [out.pred_masks for out in model.propagate_in_video_iterator(session, start_frame_idx=1)]

    network = ClipNetwork(model, frames_THWC, torch.float32)
    network.prompt(1, masks_NHW[:2])
    network.prompt(1, masks_NHW[2:])
    for t in range(2, 12):
        logits_Nhw = torch.cat([network._step(session, t) for session in network._sessions])
        expected_Nhw = plain[t - 1][:, 0]
        assert expected_Nhw.std() > 0.01
        assert logits_Nhw.numpy() == pytest.approx(expected_Nhw.numpy(), abs=1e-5)
        assert torch.equal(network.follow(t), at_size(logits_Nhw, SIDE, SIDE))


def test_what_is_remembered_does_not_grow_with_the_clip(checkpoint: str) -> None:
    def tensors_in(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel()
        return sum(map(tensors_in, value.values() if isinstance(value, dict) else ())) + (
            sum(map(tensors_in, value)) if isinstance(value, list) else 0
        )

    network = ClipNetwork(load_network(checkpoint, "cpu", None), still(24), torch.float32)
    network.prompt(0, boxes((4, 40, 8, 30), (30, 40, 20, 50), size=(48, 64)))
    held = []
    for t in range(1, 24):
        network.follow(t)
        held.append(sum(tensors_in(session.output_dict_per_obj) for session in network._sessions))
    assert held[12] == held[-1]
    assert held[-1] < 3 * held[3]
    (session,) = network._sessions
    assert not any(session.mask_inputs_per_obj.values())
    assert "high_res_masks" not in str(session.output_dict_per_obj)
    network.forget()
    assert network._sessions == []


def refused(folder: Path, match: str) -> None:
    with pytest.raises(TokenizerError, match=match) as caught:
        check_network(str(folder), None)
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


def test_loading_checks_what_it_loads(tmp_path: Path) -> None:
    folder = save(tmp_path, without=["no_memory_embedding"])
    with pytest.raises(TokenizerError, match=r"lacks 1 of \d+ tensors"):
        load_network(folder, "cpu", None)


def test_checking_reads_no_tensor(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.load_file", None)
    check_network(checkpoint, None)


def test_missing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, without=["no_memory_embedding", "memory_encoder.projection.bias"])
    refused(tmp_path, r"lacks 2 of \d+ tensors, or has other shapes \(.*no_memory_embedding.*\)")


def test_tensors_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    config = json.loads((Path(save(tmp_path)) / "config.json").read_text())
    config["memory_attention_feed_forward_hidden_size"] = 33
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, r"lacks 3 of \d+ tensors, or has other shapes \(memory_attention.layers.0.linear1.weight,")


@pytest.mark.parametrize("absent", TWINS)
def test_position_embedding_that_is_stored_once_is_used_twice(tmp_path: Path, absent: str) -> None:
    # A checkpoint in which both are there and differ: the one that is left must be used for both.
    folder = save(tmp_path, without=[absent])
    check_network(folder, None)
    model = load_network(folder, "cpu", None)
    tensors = model.state_dict()
    assert torch.equal(tensors[TWINS[0]], tensors[TWINS[1]])

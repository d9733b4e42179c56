"""The networks of SAM 2 as transformers has them: masks of points on a frame, and objects followed through a clip."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..schemas.errors import TokenizerError
from .sam2_masks import at_size, scaled

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "sam2_video"
COLOUR_MEAN, COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
# The same numbers under two names: files of some versions of transformers hold one of them.
TWINS = ("prompt_encoder.shared_embedding.positional_embedding", "shared_image_embedding.positional_embedding")
SHOWN = 3  # missing tensors that an error names


def transformers_version() -> str:
    """The version of transformers here; TokenizerError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise TokenizerError(
            f"sam2 needs transformers, which is not here ({error}): pip install 'tokenmill[sam2]'"
        ) from None
    return transformers.__version__


def check_network(folder: str, image_size: int | None) -> None:
    """TokenizerError unless a folder holds a checkpoint that `load_network` loads; reads no tensor."""
    with torch.device("meta"):
        model = _built(folder, image_size)
    _check_tensors(model, folder)


def load_network(folder: str, device: str, image_size: int | None) -> Any:
    """The Sam2VideoModel of a checkpoint of transformers, in float32, ready to infer.

    The folder holds config.json and model.safetensors. With an `image_size` (a multiple of 32) it works on squares of
    so many pixels a side instead of those of the checkpoint. TokenizerError for what is no such checkpoint.
    """
    from safetensors.torch import load_file

    model = _built(folder, image_size)
    _check_tensors(model, folder)
    tensors = _with_twins(load_file(Path(folder) / WEIGHTS))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(tensors[name])
    return model.eval().requires_grad_(False).to(torch.device(device))


def _built(folder: str, image_size: int | None) -> Any:
    """The model that a folder's config.json describes, with numbers at random."""
    transformers_version()
    from transformers import Sam2VideoConfig, Sam2VideoModel

    settings = _settings_in(folder)
    try:
        config = Sam2VideoConfig.from_dict(settings)
        if image_size is not None:
            _resize(config, image_size)
        return Sam2VideoModel(config)
    except Exception as error:  # every part of the configuration has errors of its own
        raise _unusable(folder, f"config.json describes no network ({type(error).__name__}: {_line(error)})") from error


def _settings_in(folder: str) -> dict[str, Any]:
    """The configuration in a folder, which must be one of a network that follows objects through videos."""
    path = Path(folder) / CONFIG
    try:
        settings = json.loads(path.read_text())
    except OSError:
        raise _unusable(folder, "there is no config.json in it") from None
    except ValueError as error:
        raise _unusable(folder, f"config.json is no JSON ({_line(error)})") from None
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind != MODEL_TYPE:
        raise _unusable(folder, f"config.json has model_type {kind!r}, {MODEL_TYPE!r} is wanted")
    return settings


def _resize(config: Any, image_size: int) -> None:
    """Set every size that follows from that of the images."""
    config.image_size = config.prompt_encoder_config.image_size = image_size
    config.vision_config.backbone_config.image_size = [image_size, image_size]
    config.vision_config.backbone_feature_sizes = [[image_size // stride] * 2 for stride in (4, 8, 16)]
    config.memory_attention_rope_feat_sizes = [image_size // 16] * 2


def _check_tensors(model: Any, folder: str) -> None:
    """TokenizerError unless the folder's file has every tensor of the model; it may have others."""
    from safetensors import safe_open

    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise _unusable(folder, f"there is no {WEIGHTS} in it")
    try:
        with safe_open(path, "pt") as stored:
            shapes = _with_twins({name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()})
    except Exception as error:  # damaged bytes bring out errors of every kind
        raise _unusable(folder, f"{WEIGHTS} is not readable ({type(error).__name__})") from error
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [name for name, shape in wanted.items() if shapes.get(name) != shape]
    if wrong:
        shown = ", ".join(wrong[:SHOWN]) + (", ..." if len(wrong) > SHOWN else "")
        raise _unusable(folder, f"{WEIGHTS} lacks {len(wrong)} of {len(wanted)} tensors, or has other shapes ({shown})")


def _with_twins(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors under both names where they are stored under one."""
    stored = [tensors[name] for name in TWINS if name in tensors]
    return dict.fromkeys(TWINS, stored[0]) | tensors if stored else tensors


def _unusable(folder: str, fault: str) -> TokenizerError:
    return TokenizerError(
        f"weights {folder}: {fault}: give a folder with config.json and model.safetensors of a Sam2VideoModel of"
        f" transformers, for instance a copy of hf://facebook/sam2.1-hiera-small"
    )


def _line(error: Exception) -> str:
    """An error's message in one line of moderate length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


class ClipNetwork:
    """A Sam2VideoModel at work on one clip: holds what it remembers of the objects that it follows.

    The picture of one frame is computed once, for all points and all objects. Objects that are prompted together are a
    session of transformers of their own. Of past frames only as many are remembered as the network looks back at.
    """

    def __init__(self, model: Any, frames_THWC: np.ndarray, dtype: torch.dtype) -> None:
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceCache

        self._model = model
        self._frames_THWC = frames_THWC
        self._device = next(model.parameters()).device
        self._dtype = dtype
        self._size: int = model.config.image_size
        self._features: Any = Sam2VideoInferenceCache(self._device, self._device, max_vision_features_cache_size=1)
        self._sessions: list[Any] = []

    def decode(self, t: int, points_P2: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of the objects at points (x,y) of frame t, which are shares of width and height.

        Logits (N,h,w) on the square that the network sees, and the IoU (N) that it predicts for each; several to each
        point.
        """
        model = self._model
        # The network adds half a pixel to the indices of pixels.
        points_1P12 = torch.from_numpy(points_P2).to(self._device, torch.float32)[None, :, None] * self._size - 0.5
        labels_1P1 = torch.ones(points_1P12.shape[:3], dtype=torch.int32, device=self._device)
        with torch.inference_mode():  # places in float32: bfloat16 would move points by pixels
            places = model.get_image_wide_positional_embeddings()
            sparse, dense = model.prompt_encoder(points_1P12, labels_1P1, None, None)
        with self._arithmetic():
            *fine, coarse = self._maps(t)
            logits_1Pmhw, iou_1Pm, _, _ = model.mask_decoder(
                image_embeddings=coarse,
                image_positional_embeddings=places,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
                high_resolution_features=fine,
            )
        return logits_1Pmhw.float().flatten(0, 2), iou_1Pm.float().flatten()

    def prompt(self, t: int, masks_NHW: torch.Tensor) -> None:
        """Begin to follow the objects that these boolean masks show in frame t."""
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

        devices = (self._device, self._device, self._device)
        session: Any = Sam2VideoInferenceSession(None, None, None, *devices, torch.float32)
        session.cache = self._features
        # The session asks how many frames there are, and takes their features from the cache.
        session.processed_frames = dict.fromkeys(range(len(self._frames_THWC)))
        for i, mask_HW in enumerate(masks_NHW):
            square_11SS = scaled(mask_HW[None, None].float(), self._size, self._size) >= 0.5
            session.add_mask_inputs(session.obj_id_to_idx(i), t, square_11SS)
        session.obj_with_new_inputs = list(session.obj_ids)
        self._step(session, t)
        for prompts in session.mask_inputs_per_obj.values():
            prompts.clear()
        self._sessions.append(session)

    def follow(self, t: int) -> torch.Tensor:
        """Where the objects are in frame t (N,H,W, bool), in the order of their prompts; frames come in order."""
        size = self._frames_THWC.shape[1:3]
        empty_0HW = torch.zeros((0, *size), dtype=torch.bool, device=self._device)
        return torch.cat([empty_0HW, *(at_size(self._step(session, t), *size) for session in self._sessions)])

    def forget(self) -> None:
        """Follow no object any longer, and give back what was remembered of them."""
        self._sessions.clear()

    def _step(self, session: Any, t: int) -> torch.Tensor:
        """Logits (N,h,w) of the objects of a session in frame t."""
        with self._arithmetic():
            self._maps(t)
            logits_N1hw = self._model(session, frame_idx=t).pred_masks
        self._drop_old(session, t)
        return logits_N1hw[:, 0].float()

    def _maps(self, t: int) -> list[torch.Tensor]:
        """The picture of frame t at strides of 4, 8 and 16 pixels (1,C,h,w), as frames without a past have it."""
        features = self._features.get_vision_features(t)
        if features is None:
            seen = self._model.get_image_features(self._pixels(t), return_dict=True)
            features = {"vision_feats": seen.fpn_hidden_states, "vision_pos_embeds": seen.fpn_position_encoding}
            self._features.cache_vision_features(t, features)
        maps = list(features["vision_feats"])  # each (h*w,1,C)
        maps[-1] = maps[-1] + self._model.no_memory_embedding
        sizes = self._model.backbone_feature_sizes
        return [one.permute(1, 2, 0).unflatten(2, tuple(size)) for one, size in zip(maps, sizes, strict=True)]

    def _pixels(self, t: int) -> torch.Tensor:
        """Frame t as the network sees it: (1,3,S,S), squashed to a square and normalised."""
        frame_HWC = torch.tensor(np.ascontiguousarray(self._frames_THWC[t]), device=self._device)
        square_1CSS = scaled(frame_HWC.permute(2, 0, 1)[None].float() / 255, self._size, self._size)
        mean, std = (square_1CSS.new_tensor(values)[:, None, None] for values in (COLOUR_MEAN, COLOUR_STD))
        return (square_1CSS - mean) / std

    def _drop_old(self, session: Any, t: int) -> None:
        """Drop what the session remembers and never reads again: most of it is masks at full size."""
        config = self._model.config
        horizon = max(config.num_maskmem, config.max_object_pointers_in_encoder)
        for outputs in session.output_dict_per_obj.values():
            past = outputs["non_cond_frame_outputs"]
            past.pop(t - horizon, None)
            old = past.get(t - config.num_maskmem)
            if old is not None:
                past[t - config.num_maskmem] = {"object_pointer": old["object_pointer"]}
            for output in (past.get(t), outputs["cond_frame_outputs"].get(t)):
                if output is not None:
                    output.pop("high_res_masks", None)
                    output.pop("pred_masks", None)

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The number type of the arithmetic: float32, or bfloat16 wherever torch holds that to be safe."""
        mixed = self._dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=mixed):
            yield

"""What the first layers of a vision-language model make of a frame and a query (VideoRouter, arXiv:2605.05848).

The model is an InternVL as transformers has it. Each frame goes alone before the query through a copy of the first
layers of the decoder. Its mask is causal, so only the positions of the query see the frame: features are their mean.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..schemas.digest import digest_of
from ..schemas.errors import TokenizerError
from ..schemas.relevance import Calibration, ScorerSpec
from .base import check_frames
from .router import RouterFile
from .weights import WeightsFile, fetch_folder

LAYERS = 4  # that the paper found best
MODEL_TYPE = "internvl"
DTYPES = ("float32", "bfloat16", "float16")
BATCH = 8  # frames that go through the networks together
COLOUR_MEAN, COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as all InternVL models have them


class EarlyLayers:
    """The parts of an InternVL model up to its first decoder layers; holds their weights, and no others.

    `weights` is a folder as transformers saves it: config.json, *.safetensors, tokenizer.json, and
    preprocessor_config.json, without which frames are resized to the vision tower's size and normalized by ImageNet's
    colours. Features come as float32 on `device`, and heads can be trained on them. TokenizerError where transformers
    is missing and for folders that hold no such model.
    """

    def __init__(self, weights: str, layers: int = LAYERS, device: str = "cpu", dtype: str = "float32") -> None:
        _check_transformers()
        if dtype not in DTYPES:
            raise TokenizerError(
                f"early_layers computes in {', '.join(DTYPES)}, found dtype {dtype!r}: set one of them"
            )
        folder = fetch_folder(weights)
        config = _config_in(folder, layers)
        self._model = _loaded(folder, config, getattr(torch, dtype)).to(device)
        self._tokenizer = _tokenizer_in(folder)
        self._size, mean, std = _preprocessing_in(folder, config)
        self._mean_C11, self._std_C11 = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std))
        self.sha256, self.layers, self.dim = folder.sha256, layers, int(config.text_config.hidden_size)

    def tokens(self, frames_NHWC: np.ndarray) -> torch.Tensor:
        """The visual tokens (N,K,dim) of uint8 RGB frames, row by row, as the projector gives them to the decoder."""
        return self._in_batches(self._projected, _checked(frames_NHWC))

    def pooled_tokens(self, frames_NHWC: np.ndarray, side: int = 4) -> torch.Tensor:
        """The means (N,side*side,dim, float32) of `tokens` in the fields of a grid: small enough to keep."""
        return self._in_batches(lambda part: _pooled(self._projected(part), side), _checked(frames_NHWC))

    def features(self, frames_NHWC: np.ndarray, text: str) -> torch.Tensor:
        """Features (N,dim) of uint8 RGB frames, each alone with the query; TokenizerError for a query without words."""
        words_LD = self._embedded(text)
        return self._in_batches(lambda part: self._query_mean(self._projected(part), words_LD), _checked(frames_NHWC))

    def features_of_tokens(self, tokens_NKD: torch.Tensor, text: str) -> torch.Tensor:
        """As `features`, of frames whose `tokens` or `pooled_tokens` are given."""
        words_LD = self._embedded(text)
        return self._in_batches(lambda part: self._query_mean(part, words_LD), tokens_NKD)

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Features (N,dim) of queries without a frame."""
        with torch.no_grad():
            nothing_1KD = self._projector_weight.new_zeros(1, 0, self.dim)
            means = [self._query_mean(nothing_1KD, self._embedded(text)) for text in texts]
        return torch.cat([self._projector_weight.new_zeros(0, self.dim, dtype=torch.float32), *means])

    def hidden(self, tokens_NKD: torch.Tensor, text: str) -> torch.Tensor:
        """The hidden states (N,K+L,dim) behind the last layer, of K tokens of each frame and L of the query.

        They are `hidden_states[layers]` of the whole model: no norm follows, which it has behind its own last layer.
        """
        words_LD = self._embedded(text)
        return self._in_batches(lambda part: self._hidden(part, words_LD), tokens_NKD)

    @property
    def _projector_weight(self) -> torch.Tensor:
        return self._model.multi_modal_projector.linear_2.weight

    @torch.no_grad()
    def _in_batches(self, step: Callable[[torch.Tensor], torch.Tensor], inputs_N: torch.Tensor) -> torch.Tensor:
        """What a step makes of inputs, a few at a time."""
        return torch.cat([step(part) for part in inputs_N.split(BATCH)])

    def _projected(self, frames_NHWC: torch.Tensor) -> torch.Tensor:
        # On bytes, as the model's own preprocessing: it rounds between rows and columns, which floats do not.
        x_NCHW = F.interpolate(frames_NHWC.movedim(-1, 1), self._size, mode="bicubic", antialias=True)
        pixels_NCHW = (x_NCHW.to(self._mean_C11.device) / 255 - self._mean_C11) / self._std_C11
        return self._model.get_image_features(pixel_values=pixels_NCHW).pooler_output

    def _embedded(self, text: str) -> torch.Tensor:
        """The tokens (L,dim) of a query."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise TokenizerError(f"early_layers scores frames for queries of a word or more, found {text!r}: give one")
        table = self._model.get_input_embeddings()
        return table(torch.tensor(ids, device=table.weight.device)).detach()

    def _hidden(self, tokens_NKD: torch.Tensor, words_LD: torch.Tensor) -> torch.Tensor:
        words_NLD = words_LD.expand(len(tokens_NKD), -1, -1)
        inputs_NSD = torch.cat((tokens_NKD.to(words_LD), words_NLD), dim=1)
        return self._model.language_model(inputs_embeds=inputs_NSD, use_cache=False).last_hidden_state

    def _query_mean(self, tokens_NKD: torch.Tensor, words_LD: torch.Tensor) -> torch.Tensor:
        return self._hidden(tokens_NKD, words_LD)[:, tokens_NKD.shape[1] :].float().mean(1)


def _checked(frames_NHWC: np.ndarray) -> torch.Tensor:
    frames = torch.from_numpy(frames_NHWC)
    check_frames(frames[None], "early_layers")
    return frames


def _pooled(tokens_NKD: torch.Tensor, side: int) -> torch.Tensor:
    rows = math.isqrt(tokens_NKD.shape[1])  # tiles are square
    grid_NDhw = tokens_NKD.float().unflatten(1, (rows, rows)).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(grid_NDhw, side).flatten(2).transpose(1, 2)


class EarlyLayerScorer:
    """A trained relevance head over early layers, as a FrameScorer.

    `router` is a file of `save_router`; TokenizerError unless it has such a head, trained on features of the model in
    the folder `weights`.
    """

    def __init__(self, router: str, weights: str, device: str = "cpu", dtype: str = "float32") -> None:
        file = RouterFile.read(router)
        about = file.about
        if about.features != "early" or about.layers is None:
            raise TokenizerError(
                f"weights {router}: this router takes embeddings of {about.of}, not features of early layers: give one"
                f" that was trained on early layers"
            )
        head = file.relevance()
        self._layers = EarlyLayers(weights, about.layers, device, dtype)
        if (found := self._layers.sha256) != about.of:
            raise TokenizerError(
                f"weights {router}: this router was trained on the model with the digest {about.of[:12]}, {weights} has"
                f" {found[:12]}: give the folder that it was trained on, with all of its files unchanged"
            )
        self._head = head.to(device)
        self.spec = ScorerSpec(
            name="early_layers",
            dim=None,
            weights_sha256=digest_of([found, file.file.sha256]),
            options={"layers": about.layers, "dtype": dtype},
            calibration=Calibration(rule="sigmoid", scale=1.0, bias=0.0),
        )

    def score(self, frames_NHWC: np.ndarray, text: str) -> np.ndarray:
        """Logits (N,) float32 that uint8 RGB frames matter to a query; TokenizerError for a query without tokens."""
        return self._head(self._layers.features(frames_NHWC, text)).cpu().numpy()


def _check_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise TokenizerError(
            f"early_layers needs transformers, which is not here ({error}): pip install 'tokenmill[transformers]'"
        ) from None


def _config_in(folder: WeightsFile, layers: int) -> Any:
    """The InternVLConfig in a folder, of a model with the first `layers` decoder layers alone."""
    from transformers import InternVLConfig

    settings = _json_in(folder, "config.json")
    kind = settings.get("model_type")
    if kind != MODEL_TYPE:
        raise _unusable(folder, f"config.json has model_type {kind!r}, {MODEL_TYPE!r} is wanted")
    try:
        config: Any = InternVLConfig.from_dict(settings)
        most = int(config.text_config.num_hidden_layers)
    except Exception as error:  # every part of the configuration has errors of its own
        raise _unusable(folder, f"config.json describes no network ({_line(error)})") from error
    if not 1 <= layers <= most:
        raise TokenizerError(f"weights {folder.uri}: of {most} decoder layers, found layers {layers}: take 1 to {most}")
    config.text_config.num_hidden_layers = layers
    if (kinds := getattr(config.text_config, "layer_types", None)) is not None:
        config.text_config.layer_types = kinds[:layers]
    return config


def _loaded(folder: WeightsFile, config: Any, dtype: torch.dtype) -> Any:
    """The model with its weights, whose decoder ends in its last layer's hidden states."""
    from transformers import InternVLModel

    try:
        with _silent():
            loaded: Any = InternVLModel.from_pretrained(
                folder.path, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        model, found = loaded
    except Exception as error:  # damaged bytes bring out errors of every kind
        raise _unusable(folder, f"its weights are not readable ({_line(error)})") from error
    if missing := sorted(found["missing_keys"]):
        raise _unusable(folder, f"its weights lack {len(missing)} tensors ({', '.join(missing[:3])})")
    model.language_model.norm = nn.Identity()
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps transformers from listing the layers that are left out."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _tokenizer_in(folder: WeightsFile) -> Any:
    from transformers import AutoTokenizer

    if not (Path(folder.path) / "tokenizer.json").is_file():
        raise _unusable(folder, "there is no tokenizer.json in it")
    try:
        return AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except Exception as error:  # of the library that reads it
        raise _unusable(folder, f"its tokenizer is not readable ({_line(error)})") from error


def _preprocessing_in(folder: WeightsFile, config: Any) -> tuple[tuple[int, int], list[float], list[float]]:
    """The (height, width) of a tile, and the mean and the deviation of its colours."""
    name = "preprocessor_config.json"
    settings = _json_in(folder, name) if (Path(folder.path) / name).is_file() else {}
    try:
        rows, columns = config.vision_config.image_size
        size = settings.get("size", {"height": rows, "width": columns})
        mean, std = settings.get("image_mean", COLOUR_MEAN), settings.get("image_std", COLOUR_STD)
        mean, std = ([float(value) for value in values] for values in (mean, std))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"image_mean {mean}, image_std {std}")
        if size["height"] != size["width"]:
            raise ValueError(f"size {size} is no square")
        return (int(size["height"]), int(size["width"])), mean, std
    except (KeyError, TypeError, ValueError) as error:
        raise _unusable(folder, f"{name} describes no tiles ({_line(error)})") from None


def _json_in(folder: WeightsFile, name: str) -> dict[str, Any]:
    try:
        settings = json.loads((Path(folder.path) / name).read_text())
    except FileNotFoundError:
        raise _unusable(folder, f"there is no {name} in it") from None
    except (OSError, ValueError) as error:
        raise _unusable(folder, f"{name} is no JSON ({_line(error)})") from None
    if not isinstance(settings, dict):
        raise _unusable(folder, f"{name} holds no object")
    return settings


def _unusable(folder: WeightsFile, fault: str) -> TokenizerError:
    return TokenizerError(
        f"weights {folder.uri}: {fault}: give a folder with config.json, *.safetensors, tokenizer.json and"
        f" preprocessor_config.json of an InternVL model of transformers, for instance hf://OpenGVLab/InternVL3-1B-hf"
    )


def _line(error: Exception) -> str:
    """An error's kind and message in one line of moderate length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else f"{text[:157]}..."

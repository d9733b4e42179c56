"""The recipe: a job's whole configuration, checked before any work."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .clip import Interpolation, ResizeMode, Sampling, Tail
from .errors import RecipeError, did_you_mean

VIDEO_EXTENSIONS = (
    "3gp", "avi", "flv", "gif", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "ts", "webm", "wmv",
)  # fmt: skip
NumberType = Literal["float32", "float16", "bfloat16"]
PRODUCT_NAME = re.compile(r"[a-z][a-z0-9_]*")
Values = TypeVar("Values", bound="Section")


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class FilesSource(Section):
    """A folder (searched in full), a glob, or one file, by fsspec URL."""

    kind: Literal["files"] = "files"
    path: str = Field(min_length=1, description="folder, glob or file; any fsspec URL")
    extensions: tuple[str, ...] = Field(default=VIDEO_EXTENSIONS, description="what counts as a video inside a folder")


class TableSource(Section):
    """A CSV, JSON lines or Parquet table with one video per row.

    The columns sha256, size_bytes, num_frames, fps, width and height, where present, spare the probing; every
    other column travels to the cache as metadata.
    """

    kind: Literal["table"]
    path: str = Field(min_length=1, description="one .csv, .jsonl or .parquet file, or a glob of them")
    uri_column: str = "uri"
    caption_column: str = "caption"
    identity: Literal["content", "uri"] = Field(
        default="content", description="uri: a URI never changes its content, so files are not read to be named"
    )


class BytesSource(Section):
    """Parquet files that hold whole videos in a binary column."""

    kind: Literal["bytes"]
    path: str = Field(min_length=1, description="one .parquet file, a folder or a glob")
    video_column: str = "video"
    caption_column: str = "caption"


class WebDatasetSource(Section):
    """Uncompressed tar shards of videos, with .json and .txt sidecars of the same key."""

    kind: Literal["webdataset"]
    path: str = Field(min_length=1, description="one .tar file, a folder or a glob")
    extensions: tuple[str, ...] = Field(default=VIDEO_EXTENSIONS, description="which members are videos")


def _expand_path(value: Any) -> Any:
    return {"kind": "files", "path": value} if isinstance(value, str) else (
        {"kind": "files", **value} if isinstance(value, Mapping) and "kind" not in value else value
    )  # fmt: skip


AnySource = FilesSource | TableSource | BytesSource | WebDatasetSource
Source = Annotated[AnySource, Field(discriminator="kind"), BeforeValidator(_expand_path)]


class ClipsSection(Section):
    """How videos are cut into clips, and what size clips have."""

    cut: Literal["windows", "whole"] = Field(
        default="windows", description="windows of num_frames every stride frames, or the whole video as num_frames"
    )
    num_frames: int = Field(default=16, ge=1, le=65536)
    stride: int | None = Field(default=None, ge=1, description="frames from window to window; num_frames by default")
    fps: Literal["native"] | Annotated[float, Field(gt=0, le=1000)] = "native"
    tail: Tail = Field(default="pad", description="pad the last window of a video, or drop and count it")
    height: int = Field(default=256, ge=1, le=8192)
    width: int = Field(default=256, ge=1, le=8192)
    resize: ResizeMode = "center_crop"
    interpolation: Interpolation = "bilinear"

    @property
    def sampling(self) -> Sampling:
        """These settings as the value that travels with every clip."""
        return Sampling(
            fps=None if self.fps == "native" else self.fps,
            num_frames=self.num_frames,
            height=self.height,
            width=self.width,
            resize=f"{self.resize}/{self.interpolation}",
            tail=self.tail,
        )


class TokensSection(Section):
    """One product of tokens: which tokenizer, and with what weights and arithmetic."""

    tokenizer: str = Field(min_length=1, description="family/variant, for instance dct_fsq/488_262144")
    weights: str | None = Field(
        default=None, description="path or fsspec URL of the weights, where the tokenizer has any"
    )
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    dtype: NumberType = Field(default="float32", description="number type of the arithmetic; float32 is canonical")
    stored_dtype: NumberType | None = Field(
        default=None, description="number type of stored latents; null is that of the arithmetic"
    )
    logvar: bool = Field(default=False, description="store the logarithm of the variance after the mean (KL alone)")
    compiled: bool = Field(default=False, description="run the networks through torch.compile (needs a C++ compiler)")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=8,
        description="clips in one model call, part of the product's fingerprint; auto: as many as memory holds",
    )
    options: dict[str, Any] = Field(default={}, description="what the tokenizer's family alone knows")


class MasksSection(Section):
    """One product of masks: which segmenter, and with what weights and arithmetic."""

    segmenter: str = Field(min_length=1, description="slic3d, sam2, trajtok or sidecars")
    weights: str | None = Field(default=None, description="path or fsspec URL, where the segmenter has any")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    dtype: NumberType = Field(default="float32", description="number type of the arithmetic")
    max_trajectories: int = Field(default=128, ge=1, le=65535, description="the largest are kept")
    options: dict[str, Any] = Field(default={}, description="what the segmenter alone knows")


class CalibrationSection(Section):
    """How raw scores become p in (0,1), in place of the encoder's own way; no product is made anew for it."""

    rule: Literal["sigmoid", "standardized"] = Field(
        default="standardized", description="of the raw score, or of how far it is from those of its video"
    )
    scale: float = Field(default=2.0, allow_inf_nan=False)
    bias: float = Field(default=-1.0, allow_inf_nan=False)


class EncoderSection(Section):
    """One product of embeddings of frames: which encoder, and with what weights and arithmetic."""

    encoder: str = Field(min_length=1, description="look, transformers, open_clip or trajtok")
    weights: str | None = Field(default=None, description="path or fsspec URL, where the encoder has any")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    dtype: NumberType = Field(default="float32", description="number type of the arithmetic")
    batch_size: int = Field(default=16, ge=1, description="frames in one model call, part of the fingerprint")
    options: dict[str, Any] = Field(default={}, description="what the encoder alone knows")
    calibration: CalibrationSection | None = Field(default=None, description="null: the encoder's own")


class FramesSection(Section):
    """Which frames of a clip can be asked for, and what they are embedded by: queries that come later are scored
    without video.
    """

    fps: Literal["all"] | Annotated[float, Field(gt=0, le=1000)] = Field(
        default=1.0, description="candidate frames a second, of those that are sampled; or all of these"
    )
    encoders: dict[str, EncoderSection] = Field(default={}, description="products of embeddings, by name")


class DecodeSection(Section):
    """Which library reads the frames (auto is decord, and PyAV where decord cannot or errs), and where.

    Decoders run in processes of their own, which may die without harm to anything else.
    """

    decoder: Literal["auto", "decord", "pyav"] = "auto"
    processes: int = Field(default=1, ge=1, description="decoder processes for each worker")
    run_in: Literal["process", "actor"] = Field(
        default="process", description="beside the worker, or in Ray actors wherever the cluster has CPUs"
    )
    timeout_s: float = Field(
        default=300, gt=0, description="a decoder that works longer on one video is killed; long videos get more"
    )
    memory_mb: int = Field(default=4096, ge=512, description="a decoder that grows larger is killed")


class ShardsSection(Section):
    """How large a shard is (the unit of work, of restart and of files), and in which files its tokens are kept."""

    frames: int = Field(default=16384, ge=1, description="sampled frames per shard, about; shards are balanced by cost")
    format: Literal["parquet", "webdataset", "both"] = Field(
        default="parquet", description="tokens as Parquet, as one WebDataset tar per shard, or both"
    )


class ExecutorSection(Section):
    """Where the work runs."""

    kind: Literal["local", "ray"] = "local"
    workers: int = Field(default=1, ge=1, description="Ray token workers; local has one")
    address: str = Field(default="local", description="local, auto, or the address of a Ray cluster")
    threads: int = Field(default=1, ge=1, description="arithmetic threads per worker")
    cpus_per_worker: float = Field(default=1, ge=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    memory_mb: int | None = Field(default=None, ge=256, description="a Ray worker above it is replaced after its shard")
    grace_s: float = Field(default=60, ge=0, description="time for shards to finish once the job is asked to stop")
    wait_s: float = Field(default=300, ge=0, description="time for a Ray cluster to have room for one worker")


class Recipe(Section):
    """A job: what to read, how to cut it, what to make of it, and where to keep it."""

    cache: str = Field(min_length=1, description="folder of the cache; any fsspec URL")
    sources: tuple[Source, ...] = Field(min_length=1)
    clips: ClipsSection = ClipsSection()
    tokens: dict[str, TokensSection] = Field(default={}, description="products of tokens, by name")
    masks: dict[str, MasksSection] = Field(default={}, description="products of masks, by name")
    frames: FramesSection | None = Field(default=None, description="candidate frames, their scores and embeddings")
    decode: DecodeSection = DecodeSection()
    shards: ShardsSection = ShardsSection()
    executor: ExecutorSection = ExecutorSection()
    storage: dict[str, dict[str, Any]] = Field(
        default={}, description="fsspec options by protocol, such as s3: {endpoint_url: ...}; never stored in the cache"
    )


def parse_recipe(data: object) -> Recipe:
    """The recipe in `data` (as YAML gives it); RecipeError names every wrong key, what was found and accepted."""
    recipe = checked(Recipe, data)
    if not recipe.tokens and not recipe.masks and not recipe.frames:
        raise RecipeError("tokens: missing; every recipe needs tokens, masks or frames")
    encoders = recipe.frames.encoders if recipe.frames else {}
    named = {"tokens": recipe.tokens, "masks": recipe.masks, "frames.encoders": encoders}
    for section, name in ((section, name) for section, products in named.items() for name in products):
        if not PRODUCT_NAME.fullmatch(name):
            raise RecipeError(
                f"{section}.{name}: {name!r} cannot name a product: accepted are small letters, digits and _,"
                f" beginning with a letter"
            )
    return recipe


def checked(model: type[Values], data: object) -> Values:
    """The `model` in `data` (as YAML gives it); RecipeError names every wrong key, what was found and accepted."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"a recipe is a mapping of keys, found {type(data).__name__}: {_shown(data)}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        wrong = error.errors()
        # A list is also "too short" when its items are wrong: the items say why.
        inner = [one for one in wrong if one["type"] != "too_short"] or wrong
        raise RecipeError("; ".join(dict.fromkeys(_explain(one, model) for one in inner))) from None


def parse_options(model: type[Values], values: Mapping[str, Any]) -> Values:
    """The `options` of a section; RecipeError names every wrong key below ``options``."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        wrong = error.errors()
        raise RecipeError("; ".join(dict.fromkeys(_explain(one, model, ("options",)) for one in wrong))) from None


def _explain(error: Any, model: type[BaseModel], above: tuple[str, ...] = ()) -> str:
    """One wrong key of a `model`, which stands below the keys `above`, in one phrase."""
    path = [*above, *(str(part) for part in error["loc"])]
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        accepted = sorted(_keys_at(path[len(above) : -1], model))
        return f"{_dotted(path)}: unknown key{did_you_mean(path[-1], accepted)}; accepted are {', '.join(accepted)}"
    if kind == "missing":
        return f"{_dotted(path)}: missing; every recipe needs it"
    if kind == "union_tag_invalid":
        tags = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
        return (
            f"{_dotted(path)}.kind: found {context['tag']!r}{did_you_mean(str(context['tag']), tags)};"
            f" accepted are {', '.join(tags)}"
        )
    accepted_text = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    near = ""
    if kind == "literal_error" and isinstance(error["input"], str):
        near = did_you_mean(error["input"], re.findall(r"'([^']*)'", context["expected"]))
    return f"{_dotted(path)}: found {_shown(error['input'])}{near}; accepted: {accepted_text}"


def _dotted(path: list[str]) -> str:
    """`sources.0.path` as the user wrote it: pydantic's own names of union members are left out."""
    inner = {"files", "table", "bytes", "webdataset", "literal['native']", "constrained-float", "float"}
    return ".".join(part for i, part in enumerate(path) if not (i and part in inner))


def _keys_at(path: list[str], model: type[BaseModel]) -> list[str]:
    """The keys that `model` accepts below `path`."""
    sources = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(AnySource)}
    for part in path:
        if part in sources and "sources" in model.model_fields:
            model = sources[part]
        elif part in model.model_fields:
            annotation = model.model_fields[part].annotation
            nested = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
            model = next((a for a in nested if issubclass(a, BaseModel)), model)
    return list(model.model_fields)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

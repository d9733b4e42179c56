"""Weights: fetched once to this machine, named by their SHA-256, and loaded only where every tensor fits."""

import contextlib
import itertools
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import nn

from ..schemas.digest import digest_of, digest_of_stream
from ..schemas.errors import TokenizerError

SHOWN = 3  # differences of each kind that an error names
STAMP_KEYS = ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys of a checkpoint under which its tensors are
FOLDER_FILES = (".json", ".safetensors")
COMPILED, PARALLEL = "_orig_mod.", "module."  # what torch.compile and data-parallel training put into keys


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """A file of weights on this machine: `uri` is where it came from."""

    uri: str
    path: str
    sha256: str


def fetch_weights(uri: str) -> WeightsFile:
    """The file at a path or fsspec URL, downloaded unless it was before, and its SHA-256; TokenizerError without it.

    Downloads are kept in $TOKENMILL_HOME/weights, by default ~/.cache/tokenmill/weights; a file that changed at its URL
    is downloaded again.
    """
    with _weights_errors(uri):
        filesystem, remote = fsspec.core.url_to_fs(os.path.expanduser(uri))
        local = remote if isinstance(filesystem, LocalFileSystem) else _downloaded(filesystem, remote, uri)
        return WeightsFile(uri=uri, path=local, sha256=_sha256(local))


def fetch_folder(uri: str) -> WeightsFile:
    """The folder of a model at a path or fsspec URL (its .json and .safetensors files), as `fetch_weights`.

    `sha256` digests the names and the SHA-256 of all of these files.
    """
    with _weights_errors(uri):
        filesystem, root = fsspec.core.url_to_fs(os.path.expanduser(uri))
        found = sorted(path for path in filesystem.ls(root, detail=False) if path.endswith(FOLDER_FILES))
        if not found or not filesystem.isdir(root):
            raise ValueError(f"not a folder with {' and '.join(FOLDER_FILES)} files")
        if isinstance(filesystem, LocalFileSystem):
            paths = found
        else:
            folder = _home("folders", digest_of([uri, [_stamp(filesystem.info(path)) for path in found]]))
            paths = [_fetched(filesystem, path, folder) for path in found]
        digest = digest_of([(os.path.basename(path), _sha256(path)) for path in paths])
        return WeightsFile(uri=uri, path=os.path.dirname(paths[0]), sha256=digest)


@contextlib.contextmanager
def _weights_errors(uri: str) -> Iterator[None]:
    """TokenizerError for whatever keeps weights from being fetched."""
    try:
        yield
    except ImportError as error:
        need = "pip install huggingface_hub" if uri.startswith("hf://") else "install it"
        raise TokenizerError(f"weights {uri}: {error}: {need}, or download the file and give its path") from None
    except Exception as error:  # every store has errors of its own
        said = "it does not exist" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise TokenizerError(f"weights {uri}: {said or type(error).__name__}: check the path or URL") from error


def _sha256(path: str) -> str:
    with open(path, "rb") as stream:
        return digest_of_stream(stream)[0]


def _downloaded(filesystem: Any, remote: str, uri: str) -> str:
    info = filesystem.info(remote)
    return _fetched(filesystem, remote, _home("weights", digest_of([uri, info.get("size"), _stamp(info)])))


def _home(kind: str, digest: str) -> str:
    """Where downloads are kept."""
    home = os.environ.get("TOKENMILL_HOME") or os.path.expanduser("~/.cache/tokenmill")
    return os.path.join(home, kind, digest[:16])


def _stamp(info: Mapping[str, Any]) -> list[str]:
    """What a store says of a file without reading it."""
    return [str(info[key]) for key in STAMP_KEYS if info.get(key)]


def _fetched(filesystem: Any, remote: str, folder: str) -> str:
    """The path of a file in a local folder, downloaded unless it is there."""
    local = os.path.join(folder, os.path.basename(remote.partition("?")[0]))
    if not os.path.exists(local):
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:  # several workers may download at once: one stays
            part = os.path.join(aside, "part")
            filesystem.get_file(remote, part)
            os.replace(part, local)
    return local


def read_tensors(weights: WeightsFile) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file or of a checkpoint saved by torch, by name, on the CPU and not yet read.

    Checkpoints are read without running code from them. What wraps the tensors (`state_dict`, `model`) is taken off,
    and the names that torch.compile and data-parallel training add. TokenizerError for anything else.
    """
    try:
        if weights.path.endswith(".safetensors"):
            from safetensors.torch import load_file

            loaded = load_file(weights.path)
        else:
            loaded = torch.load(
                weights.path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(weights.path)
            )
    except Exception as error:  # damaged bytes bring out errors of every kind
        raise TokenizerError(
            f"weights {weights.uri}: not a readable checkpoint ({type(error).__name__}): accepted are .safetensors"
            f" files, and checkpoints of tensors alone, as torch.save writes them: download it again"
        ) from error
    tensors = None
    if isinstance(loaded, Mapping):
        tensors = next((loaded[key] for key in WRAPPERS if key in loaded), loaded)
    if not isinstance(tensors, Mapping):
        raise TokenizerError(
            f"weights {weights.uri}: it holds {type(tensors or loaded).__name__}, a state dict is wanted"
        )
    return {str(name).replace(COMPILED, "").removeprefix(PARALLEL): value for name, value in tensors.items()}


def check_tensors(
    tensors: Mapping[str, Any], expected: Mapping[str, torch.Tensor], weights: WeightsFile, of: str
) -> None:
    """TokenizerError with the first differences unless `tensors` are exactly those that `of` takes."""
    shapes = {
        name: tuple(value.shape) if isinstance(value, torch.Tensor) and value.is_floating_point() else None
        for name, value in tensors.items()
    }
    wanted = {name: tuple(value.shape) for name, value in expected.items()}
    others = [
        f"{name} is {'no numbers' if shapes[name] is None else shapes[name]}, not {shape}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    differences = {
        "missing": [name for name in wanted if name not in shapes],
        "not known": [name for name in shapes if name not in wanted],
        "of another shape": others,
    }
    said = [f"{len(names)} {what} ({_first(names)})" for what, names in differences.items() if names]
    if said:
        raise TokenizerError(
            f"weights {weights.uri}: they are not those of {of}: of {len(wanted)} tensors {', '.join(said)}:"
            f" name the variant that the file holds"
        )


def save_described(path: str, tensors: Mapping[str, torch.Tensor], key: str, said: Mapping[str, Any]) -> None:
    """Write a .safetensors file with what is `said` of the tensors in its metadata; the same gives the same bytes."""
    from safetensors.torch import save_file

    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # One entry alone: safetensors writes several in any order.
    save_file(stored, path, metadata={key: json.dumps(said, sort_keys=True)})


def description_of(file: WeightsFile, key: str, of: str, remedy: str) -> dict[str, Any]:
    """What `save_described` was told of the tensors in a file; TokenizerError where that was nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file.path, framework="pt") as opened:
            said = json.loads((opened.metadata() or {})[key])
        if not isinstance(said, dict):
            raise ValueError("no object")
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise TokenizerError(
            f"weights {file.uri}: they are not those of {of}, a .safetensors file with {key} in its metadata"
            f" ({type(error).__name__}: {error}): {remedy}"
        ) from None
    return said


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy checked tensors into the model, whatever number type they are stored in."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(tensors[name])


def _first(names: Iterable[str]) -> str:
    shown = list(itertools.islice(names, SHOWN + 1))
    return ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")

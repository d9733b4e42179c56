"""The output folder of a training: whose it is, the last whole checkpoint, and the metrics that led to it."""

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError

from ..pipeline.storage import STAGING, Folder, storage_errors
from ..schemas.errors import CacheError, RecipeError, StorageError
from ..schemas.plan import PLAN_FOLDER
from ..schemas.training import AnyTraining, changed_keys

CLAIM, CHECKPOINT, METRICS, MODEL, LOCK = (
    "training.json", "checkpoint.pt", "metrics.jsonl", "model.safetensors", ".lock",
)  # fmt: skip


def output_folder(recipe: AnyTraining) -> Folder:
    """The folder that the recipe names; RecipeError where it is not on this machine."""
    folder = Folder(recipe.output)
    if not folder.is_local:
        raise RecipeError(f"output: found {recipe.output!r}; accepted: a local folder, to copy from when all is done")
    return folder


@contextlib.contextmanager
def alone_in(folder: Folder) -> Iterator[None]:
    """Nobody else trains in the folder meanwhile; CacheError where somebody does. What a killed one left is removed."""
    with storage_errors(folder.url):
        os.makedirs(folder.root, exist_ok=True)
        lock = open(folder.path(LOCK), "ab")
    with lock:  # the system takes the lock from whoever dies
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(
                f"{folder.url}: another process trains there: wait for it, or give another output"
            ) from None
        shutil.rmtree(folder.path(STAGING), ignore_errors=True)
        yield


def claim(folder: Folder, recipe: AnyTraining, parse: Callable[[object], AnyTraining]) -> None:
    """Make the folder this recipe's output; CacheError where it is another's. `parse` reads recipes of its kind.

    What another recipe began there and left without a checkpoint binds nothing, and is removed.
    """
    if not folder.exists(CLAIM):
        foreign = [name for name in folder.list("") if not name.startswith(".")]
        if foreign:
            raise CacheError(
                f"{folder.url}: not empty ({foreign[0]} is there) and no output of a training: give an empty or new"
                f" folder"
            )
    else:
        changed = changed_keys(_claimed(folder, parse), recipe)
        if changed and folder.exists(CHECKPOINT):
            raise CacheError(
                f"{folder.url}: this training was begun by another recipe, with {', '.join(changed)}:"
                f" give output: another folder, or set the values back"
            )
        for name in folder.list(PLAN_FOLDER) if changed else []:
            folder.remove(name)
    data = json.dumps(recipe.model_dump(mode="json", exclude={"storage"}), indent=1).encode() + b"\n"
    if not folder.exists(CLAIM) or folder.read(CLAIM) != data:
        folder.replace(CLAIM, data)


def _claimed(folder: Folder, parse: Callable[[object], AnyTraining]) -> AnyTraining:
    try:
        return parse(json.loads(folder.read(CLAIM)))
    except ValueError as error:
        raise CacheError(f"{folder.uri(CLAIM)}: damaged ({error}): give output: another folder") from None
    except RecipeError as error:
        raise CacheError(
            f"{folder.uri(CLAIM)}: that of another kind of training, or damaged ({error}): give output: another folder"
        ) from None


def write_checkpoint(folder: Folder, values: Mapping[str, Any]) -> None:
    """Keep `values` in place of the last checkpoint, which stays until these are whole on the disk."""
    write_whole(folder, CHECKPOINT, lambda path: torch.save(dict(values), path))


def read_checkpoint(folder: Folder) -> dict[str, Any] | None:
    """The last checkpoint, on the CPU; None where there is none, CacheError where it is damaged."""
    if not folder.exists(CHECKPOINT):
        return None
    try:
        return torch.load(folder.path(CHECKPOINT), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes bring out errors of every kind
        said = " ".join(str(error).split())[:200]
        raise CacheError(
            f"{folder.uri(CHECKPOINT)}: damaged ({type(error).__name__}: {said}): remove it to begin anew"
        ) from None


def write_whole(folder: Folder, name: str, save: Callable[[str], object]) -> None:
    """Put what `save` writes to a path into the folder as `name`, whole."""
    with folder.staging() as staging:
        path = f"{staging}/{os.path.basename(name)}"
        try:
            with storage_errors(folder.uri(name)):
                save(path)
                shutil.copymode(folder.path(CLAIM), path)  # safetensors lets nobody else read its files
        except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
            raise StorageError(
                f"{folder.uri(name)}: it could not be written ({' '.join(str(error).split())[:200]}): free some space"
                f" and run again, the last checkpoint is kept"
            ) from None
        folder.put(path, name)


def cut_metrics(folder: Folder, step: int) -> None:
    """Keep the lines of the steps before `step`: later ones, and what a kill has torn, are made again."""
    lines = folder.read(METRICS).splitlines(keepends=True) if folder.exists(METRICS) else []
    folder.replace(METRICS, b"".join(line for line in lines if _step_of(line) < step))


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def add_metrics(folder: Folder, line: Mapping[str, Any]) -> None:
    """Append a line, which is on the disk before any later checkpoint."""
    with storage_errors(folder.uri(METRICS)), open(folder.path(METRICS), "ab") as stream:
        stream.write(json.dumps(line).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())

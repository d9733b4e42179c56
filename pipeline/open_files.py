"""The files of a cache that were read last, open."""

import mmap
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .mask_file import MaskFile
from .storage import Folder, storage_errors
from .token_file import TokenFile
from .trajectory_file import TrajectoryFile

MOST_OPEN = 64

File = TypeVar("File", TokenFile, TrajectoryFile, MaskFile)


class OpenFiles(Generic[File]):
    """The files of one kind that were read last, open.

    It does not know its cache: a cycle would leave the cache's connection to the garbage collector, which may then
    close it in a forked loader process.
    """

    def __init__(self, kind: Callable[[Any, str], File], folder: Folder) -> None:
        self._kind, self._folder = kind, folder
        self._files: OrderedDict[str, File] = OrderedDict()

    def get(self, name: str) -> File:
        """The file of this name inside the cache, opened if it is not."""
        file = self._files.get(name)
        if file is None:
            file = self._kind(_buffer(self._folder, name), self._folder.uri(name))
            self._files[name] = file
            if len(self._files) > MOST_OPEN:
                self._files.popitem(last=False)
        self._files.move_to_end(name)
        return file


def _buffer(folder: Folder, name: str) -> Any:
    """The bytes of a file: mapped where it is local, fetched where it is not."""
    if not folder.is_local:
        return folder.read(name)
    with storage_errors(folder.uri(name)), open(folder.path(name), "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

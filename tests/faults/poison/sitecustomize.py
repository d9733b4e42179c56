"""Imported by Python at its start where this folder is on PYTHONPATH: makes decoders heed poison (see poison.py)."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

import poison

PATCHES = {"tokenmill.pipeline.decode": poison.poison_decode, "tokenmill.pipeline.videos": poison.poison_probe}


class Patching(importlib.abc.MetaPathFinder):
    """Patches a module when it has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_patch(module: ModuleType) -> None:
            load(module)
            PATCHES[fullname](module)

        spec.loader.exec_module = load_and_patch  # pyright: ignore[reportAttributeAccessIssue]
        return spec


sys.meta_path.insert(0, Patching())

"""Files of lines, such as JSON lines."""

import fsspec

from ..pipeline.storage import storage_errors
from ..schemas.errors import RecipeError, StorageError


def read_lines(path: str) -> list[str]:
    """The lines of the UTF-8 text at a path or fsspec URL; StorageError or RecipeError where it cannot be read."""
    try:
        with storage_errors(path), fsspec.open(path, "rb") as stream:
            data: bytes = stream.read()  # pyright: ignore[reportAttributeAccessIssue]
        return data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}): JSON lines in UTF-8 are accepted"
        ) from None
    except StorageError:
        raise
    except (ValueError, ImportError) as error:
        raise RecipeError(f"{path}: {error}: accepted are local paths and URLs such as s3://bucket/key") from None

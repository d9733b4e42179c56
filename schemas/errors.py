"""Errors that a user can act on.

    TokenmillError
    ├── RecipeError        the recipe asks for something that does not exist or cannot be
    ├── SourceError        a source cannot be listed, or holds no video
    ├── DecodeError        a video or clip cannot be decoded; becomes a failure row, never ends a job
    ├── TokenizerError     an unknown tokenizer, absent weights, or frames that it does not take
    ├── CacheError         a cache is absent, was made by another recipe, or is damaged
    ├── StorageError       a place cannot be read or written: permission, disk full, read-only
    └── UnclearError       a judge said what cannot be understood; others may be asked, and the same one later

Each message says what was asked, what was found, what would be accepted, and what to do, in one line.
The command line prints it and exits; a traceback is a bug of ours.
"""

import difflib

# What to do about a damaged file that a manifest names.
REPAIR_REMEDY = "tokenmill verify CACHE --deep --repair makes it again"


class TokenmillError(Exception):
    """Base of every error that a user can act on."""


class RecipeError(TokenmillError):
    """The recipe is wrong."""


class SourceError(TokenmillError):
    """A source of videos cannot be used."""


class DecodeError(TokenmillError):
    """A video or a clip of it cannot be decoded."""


class TokenizerError(TokenmillError):
    """A tokenizer is unknown, lacks its weights, or refuses its input."""


class CacheError(TokenmillError):
    """A cache cannot be used as asked."""


class StorageError(TokenmillError):
    """A place cannot be read or written."""


class UnclearError(TokenmillError):
    """A judge said what cannot be understood."""


def did_you_mean(found: str, accepted: list[str]) -> str:
    """`` (did you mean 'x'?)`` for a near miss, or an empty string."""
    near = difflib.get_close_matches(found, accepted, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""

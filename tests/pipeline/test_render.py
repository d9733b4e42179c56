"""What is written for people to look at."""

import os
import subprocess
import sys
from pathlib import Path

WRITE = """
import hashlib, sys
import numpy as np
from tokenmill.pipeline.render import write_video
noise = np.random.default_rng(0).integers(0, 40, (16, 242, 322, 3), np.uint8)
frames_THWC = noise + np.linspace(0, 200, 16).astype(np.uint8)[:, None, None, None]
for t in range(16):
    frames_THWC[t, 20:90, 8 * t : 8 * t + 60] = 255
write_video(sys.argv[1], frames_THWC, 30)
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())
"""


def test_a_video_has_the_same_bytes_whatever_memory_held_before(tmp_path: Path) -> None:
    found = set()
    for filled_with in ("0", "1", "128", "200"):
        environment = os.environ | {"MALLOC_PERTURB_": filled_with}  # glibc fills what it hands out with it
        command = [sys.executable, "-c", WRITE, f"{tmp_path}/a.mp4"]
        found.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(found) == 1

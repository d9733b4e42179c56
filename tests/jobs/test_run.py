"""The main job, end to end, through the command line."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from .conftest import Command

WriteRecipe = Callable[..., str]


def files_in(folder: Path) -> dict[str, str]:
    """Every file of a folder and the digest of its bytes; the index is derived and not compared."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "index.duckdb"
    }


FRAMES = {"fps": 2, "encoders": {"seen": {"encoder": "look"}, "colours": {"encoder": "fake", "batch_size": 3}}}


def data_in(folder: Path) -> dict[str, str]:
    """The files whose bytes must not depend on who made them: all but manifests, which name host and times."""
    return {name: digest for name, digest in files_in(folder).items() if not name.startswith("manifests/")}


@pytest.fixture
def videos(tmp_path: Path, footage: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("bikes.mp4", "carphone_pristine.mp4"):
        shutil.copy(footage / name, folder)
    return folder


def test_a_job_makes_a_cache_that_sql_answers(tokenmill: Command, write_recipe: WriteRecipe, videos: Path) -> None:
    recipe = write_recipe([videos])
    done = tokenmill("run", recipe)
    assert done.code == 0, done.err
    answer = tokenmill("sql", "cache", "select count(*) as n, sum(num_valid) as frames from clips", "--format", "csv")
    assert answer.out == "n,frames\n47,370\n"
    usage = tokenmill("sql", "cache", "select sum(uses) as n from code_usage('fake')", "--format", "csv")
    assert usage.out == f"n\n{47 * 2 * 4 * 6}\n"
    assert tokenmill("verify", "cache").code == 0
    assert tokenmill("status", "cache").out.count("47") >= 2


def test_the_same_job_twice_changes_no_byte(tokenmill: Command, write_recipe: WriteRecipe, videos: Path) -> None:
    (videos / "broken.mp4").write_bytes(b"not a video")
    recipe, cache = write_recipe([videos]), videos.parent / "cache"
    assert tokenmill("run", recipe).code == 3
    before = files_in(cache)
    again = tokenmill("run", recipe)
    assert again.code == 3
    assert "unchanged=2" in again.err
    assert "clips=0 shards=0" in again.err
    assert files_in(cache) == before


@pytest.mark.ray
@pytest.mark.slow
def test_local_and_ray_executors_write_the_same_files(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, tmp_path: Path
) -> None:
    recipe = write_recipe([videos], executor={"workers": 2}, frames=FRAMES)
    assert tokenmill("run", recipe, "--set", f"cache={tmp_path / 'local'}").code == 0
    done = tokenmill("run", recipe, "--executor", "ray", "--set", f"cache={tmp_path / 'ray'}")
    assert done.code == 0, done.err
    local, ray = data_in(tmp_path / "local"), data_in(tmp_path / "ray")
    assert {n: d for n, d in local.items() if n != "cache.json"} == {n: d for n, d in ray.items() if n != "cache.json"}
    assert len(local) > 6
    assert len([name for name in local if name.startswith("frames/")]) >= 3


def test_an_interrupted_job_resumes_and_ends_with_the_same_files(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, tmp_path: Path
) -> None:
    recipe = write_recipe([videos], frames=FRAMES)
    tokenmill("run", recipe)
    whole = data_in(tmp_path / "cache")
    manifests = sorted((tmp_path / "cache" / "manifests").rglob("*.json"))
    for manifest in manifests[::2]:
        entry = json.loads(manifest.read_text())
        manifest.unlink()
        for file in entry["files"]:
            (tmp_path / "cache" / file["name"]).unlink()
    resumed = tokenmill("run", recipe)
    assert resumed.code == 0
    assert data_in(tmp_path / "cache") == whole
    assert len(sorted((tmp_path / "cache" / "manifests").rglob("*.json"))) == len(manifests)


def test_adding_a_product_makes_only_its_files(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, tmp_path: Path
) -> None:
    tokenmill("run", write_recipe([videos]))
    before = data_in(tmp_path / "cache")
    both = write_recipe(
        [videos], tokens={"fake": {"tokenizer": "fake", "batch_size": 4}, "dct": {"tokenizer": "dct_fsq/488_32768"}}
    )
    done = tokenmill("run", both)
    assert done.code == 0, done.err
    added = set(data_in(tmp_path / "cache")) - set(before)
    assert added
    assert all("tokens/dct/" in name for name in added)
    kept = {name: digest for name, digest in data_in(tmp_path / "cache").items() if name in before}
    assert {n: d for n, d in kept.items() if n != "cache.json"} == {
        n: d for n, d in before.items() if n != "cache.json"
    }


def test_new_videos_give_new_shards_and_leave_the_old_ones(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, footage: Path, tmp_path: Path
) -> None:
    recipe = write_recipe([videos])
    tokenmill("run", recipe)
    before = files_in(tmp_path / "cache")
    shutil.copy(footage / "carphone_distorted.mp4", videos)
    done = tokenmill("run", recipe)
    assert done.code == 0, done.err
    after = files_in(tmp_path / "cache")
    assert {name: after[name] for name in before if name != "plan/stamps.parquet"} == {
        name: digest for name, digest in before.items() if name != "plan/stamps.parquet"
    }
    counts = tokenmill(
        "sql", "cache", "select count(*) as n, count(distinct clip_id) as d from clips", "--format", "csv"
    )
    assert counts.out == "n,d\n62,62\n"


def test_a_broken_video_is_a_row_and_the_rest_completes(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path
) -> None:
    (videos / "broken.mp4").write_bytes(b"<html>404</html>" * 100)
    (videos / "empty.mp4").write_bytes(b"")
    shutil.copy(videos / "bikes.mp4", videos / "zz-copy.mp4")
    done = tokenmill("run", write_recipe([videos]))
    assert done.code == 3
    rows = tokenmill("sql", "cache", "select step, uri, reason from failures order by uri", "--format", "json").out
    failures = [json.loads(line) for line in rows.splitlines()]
    assert [Path(row["uri"]).name for row in failures] == ["broken.mp4", "empty.mp4"]
    assert all(row["step"] == "probe" and row["reason"] for row in failures)
    status = tokenmill(
        "sql", "cache", "select status, count(*) as n from videos group by 1 order by 1", "--format", "csv"
    )
    assert status.out == "status,n\nfailed,2\nplanned,2\n"
    copies = tokenmill(
        "sql", "cache", "select parse_filename(uri) as f, reason from duplicates", "--format", "json"
    ).out
    assert json.loads(copies)["f"] == "zz-copy.mp4"
    assert json.loads(copies)["reason"].startswith("same content as ")
    assert "2 planned, 2 failed, 1 duplicate" in tokenmill("status", "cache").out


def test_a_video_that_changed_after_the_plan_fails_and_is_planned_anew(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, footage: Path, tmp_path: Path
) -> None:
    recipe = write_recipe([videos])
    assert tokenmill("plan", recipe).code == 0
    shutil.copy(footage / "carphone_distorted.mp4", videos / "carphone_pristine.mp4")
    done = tokenmill("run", recipe)
    assert done.code == 3
    reasons = tokenmill("sql", "cache", "select distinct reason from failures", "--format", "csv").out
    assert "the file has changed since it was planned" in reasons
    committed = tokenmill("sql", "cache", "select count(*) as n from clips", "--format", "csv")
    assert committed.out == "n\n47\n"


def test_progress_as_json_lines_ends_with_the_account(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path
) -> None:
    done = tokenmill("run", write_recipe([videos]), "--log-json")
    events = [json.loads(line) for line in done.out.splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == ["sources", "plan", "work", "status"]
    last = [event for event in events if event["event"] == "progress"][-1]
    assert (last["done"], last["total"], last["frames"]) == (47, 47, 370)
    assert events[-1]["exit_code"] == 0
    assert {product["product"]: product["committed"] for product in events[-1]["products"]} == {
        "clips": 47,
        "tokens/fake": 47,
    }


def test_captions_and_metadata_of_a_table_reach_sql(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path
) -> None:
    (videos / "list.csv").write_text("uri,caption,lang\nbikes.mp4,two bikes,en\ncarphone_pristine.mp4,a man,de\n")
    done = tokenmill("run", write_recipe([{"kind": "table", "path": str(videos / "list.csv")}]))
    assert done.code == 0, done.err
    query = "select caption, metadata->>'lang' as lang from videos order by caption"
    assert tokenmill("sql", "cache", query, "--format", "csv").out == "caption,lang\na man,de\ntwo bikes,en\n"


def test_another_recipe_at_the_same_place_is_refused(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path
) -> None:
    recipe = write_recipe([videos])
    tokenmill("run", recipe)
    done = tokenmill("run", recipe, "--set", "clips.height=64")
    assert done.code == 1
    assert "made by another recipe, with clips.height=32 (this recipe: 64): give cache: another folder" in done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["tokens.fake.tokenizer=dctfsq/488_32768"], "tokens.fake: unknown tokenizer family 'dctfsq'"),
        (["tokens.fake.weights=w.pt"], "fake has no weights, found 'w.pt': remove weights"),
        (["clips.height=33"], "takes clips whose height is a multiple of 8, found 33: set clips.height=32"),
        (["clips.hight=33"], "clips.hight: unknown key (did you mean 'height'?)"),
        (["sources.0=/no/such/folder"], "/no/such/folder: it does not exist: check the path"),
        (["sources.7.path=x"], "--set sources.7.path: accepted is a number from 0 to 0, found '7'"),
        (["nonsense"], "--set 'nonsense': accepted is key=value"),
        (["cache=/proc/cache"], "/proc/cache"),
        (["cache=foo://bar"], "foo://bar"),
        (["cache=memory://c", "executor.kind=ray"], "lives in one process and executor.kind=ray has several"),
    ],
)
def test_a_users_mistake_is_one_line_with_a_remedy(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, changes: list[str], message: str
) -> None:
    overrides = [part for change in changes for part in ("--set", change)]
    done = tokenmill("run", write_recipe([videos]), *overrides)
    assert done.code in (1, 2)
    assert message in done.err
    assert done.err.splitlines()[-1].startswith("tokenmill: ")


def test_an_empty_folder_and_an_absent_recipe_are_said(
    tokenmill: Command, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    (tmp_path / "nothing").mkdir()
    empty = tokenmill("run", write_recipe([tmp_path / "nothing"]))
    assert (empty.code, "an empty folder" in empty.err) == (1, True)
    assert not list((tmp_path / "cache").glob("plan/*"))
    absent = tokenmill("run", "no.yaml")
    assert (absent.code, "recipe no.yaml: no such file" in absent.err) == (2, True)
    (tmp_path / "bad.yaml").write_text("cache: [")
    assert "recipe bad.yaml: not YAML" in tokenmill("run", "bad.yaml").err


def test_a_folder_with_other_files_is_not_taken_for_a_cache(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path
) -> None:
    done = tokenmill("run", write_recipe([videos]), "--set", f"cache={videos}")
    assert done.code == 1
    assert "not empty (bikes.mp4 is there) and no token cache: give an empty or new folder" in done.err
    assert len(list(videos.iterdir())) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 100 KiB; it can be remounted larger, or read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_said_leaves_no_torn_file_and_the_job_resumes(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, small_disk: Path
) -> None:
    recipe = write_recipe([videos], cache=str(small_disk / "cache"), clips={"num_frames": 8})
    full = tokenmill("run", recipe)
    assert full.code == 1
    assert full.err.splitlines()[-1].endswith(
        "the disk is full: free some space and run again, what was committed is kept"
    )
    assert not list(small_disk.rglob(".staging/*"))
    for file in (small_disk / "cache").rglob("*.parquet"):
        pq.read_table(file)
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert tokenmill("run", recipe).code == 0
    assert tokenmill("verify", str(small_disk / "cache")).code == 0


def test_a_read_only_target_is_said_and_a_read_only_cache_still_answers(
    tokenmill: Command,
    write_recipe: WriteRecipe,
    videos: Path,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    recipe = write_recipe([videos], cache=str(small_disk / "cache"))
    assert tokenmill("run", recipe).code == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    other = tokenmill("run", recipe, "--set", f"cache={small_disk / 'other'}")
    assert (other.code, "the file system is read-only: choose another place" in other.err) == (1, True)
    answer = tokenmill("sql", str(small_disk / "cache"), "select count(*) as n from clips", "--format", "csv")
    assert answer.out == "n\n47\n"


def test_a_clip_shorter_than_one_frame_is_a_row(tokenmill: Command, write_recipe: WriteRecipe, videos: Path) -> None:
    sampling = {"num_frames": 400, "height": 32, "width": 48, "tail": "drop"}
    done = tokenmill("run", write_recipe([videos], clips=sampling))
    assert done.code == 0, done.err
    rows = tokenmill("sql", "cache", "select status, num_dropped_frames from videos order by 2", "--format", "csv").out
    assert rows == "status,num_dropped_frames\nempty,120\nempty,250\n"


def test_the_recipes_schema_is_printed_as_json(tokenmill: Command) -> None:
    schema = json.loads(tokenmill("run", "--schema").out)
    assert set(schema["required"]) == {"cache", "sources"}


def test_a_job_that_is_killed_anywhere_resumes_to_the_same_files(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path, tmp_path: Path
) -> None:
    recipe = write_recipe([footage / "bigbuckbunny.mp4"], shards={"frames": 8})
    command = [sys.executable, "-c", "from tokenmill.jobs.main import main; main()", "run", recipe]
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while job.poll() is None and len(list((tmp_path / "cache").glob("manifests/clips/*"))) < 3:
        time.sleep(0.01)
    job.kill()
    assert job.wait(60) == -signal.SIGKILL
    for name in files_in(tmp_path / "cache"):
        if name.endswith(".parquet") and not name.startswith(".staging"):
            pq.read_table(tmp_path / "cache" / name)
    resumed = tokenmill("run", recipe)
    assert resumed.code == 0
    assert "clips=0 shards=0" not in resumed.err
    assert tokenmill("run", recipe, "--set", "cache=whole").code == 0
    left = {name: digest for name, digest in data_in(tmp_path / "cache").items() if not name.startswith(".staging")}
    whole = data_in(tmp_path / "whole")
    assert {n: d for n, d in left.items() if n != "cache.json"} == {n: d for n, d in whole.items() if n != "cache.json"}


def test_a_repaired_video_leaves_no_failure_behind(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, footage: Path
) -> None:
    whole = (footage / "carphone_distorted.mp4").read_bytes()
    (videos / "late.mp4").write_bytes(whole[:3000])
    recipe = write_recipe([videos])
    assert tokenmill("run", recipe).code == 3
    (videos / "late.mp4").write_bytes(whole)
    done = tokenmill("run", recipe)
    assert (done.code, "3 planned" in done.out) == (0, True), done.out


def test_a_video_that_is_gone_is_a_row_and_the_rest_completes(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path
) -> None:
    recipe = write_recipe([videos])
    assert tokenmill("plan", recipe).code == 0
    (videos / "carphone_pristine.mp4").unlink()
    assert tokenmill("run", recipe).code == 3
    steps = tokenmill("sql", "cache", "select distinct step, product from failures order by 2", "--format", "csv").out
    assert steps == "step,product\nfetch,clips\nfetch,tokens/fake\n"
    assert tokenmill("sql", "cache", "select count(*) as n from clips", "--format", "csv").out == "n\n32\n"


def test_the_exit_code_is_about_the_products_of_the_recipe(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path
) -> None:
    assert tokenmill("plan", write_recipe([videos])).code == 0
    other = write_recipe([videos], tokens={"other": {"tokenizer": "fake"}})
    done = tokenmill("run", other)
    assert done.code == 0
    assert "tokens/fake: 47 clips are not made yet: run a recipe that asks for it to resume" in done.out


def test_a_first_run_that_found_nothing_binds_no_one(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path
) -> None:
    recipe = write_recipe([videos])
    assert tokenmill("run", recipe, "--set", "sources.0=/no/such/place").code == 1
    assert tokenmill("run", recipe, "--set", "clips.height=64").code == 0


def test_frames_that_outlast_a_clip_make_clips_of_their_own(
    tokenmill: Command, write_recipe: WriteRecipe, make_video: Callable[..., str]
) -> None:
    slides = make_video("h264", num_frames=4, fps=1)
    sampling = {"num_frames": 8, "fps": 32, "height": 32, "width": 48}
    done = tokenmill("run", write_recipe([slides], clips=sampling))
    assert done.code == 0, done.err + done.out
    counts = tokenmill(
        "sql", "cache", "select count(*) as n, count(distinct clip_id) as d from clips", "--format", "csv"
    )
    assert counts.out == "n,d\n16,16\n"


def test_a_damaged_plan_is_said_and_stamps_do_not_matter(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, tmp_path: Path
) -> None:
    recipe = write_recipe([videos])
    tokenmill("run", recipe)
    (tmp_path / "cache" / "plan" / "stamps.parquet").write_bytes(b"torn")
    again = tokenmill("run", recipe)
    assert (again.code, "clips=0 shards=0" in again.err) == (0, True)
    (victim,) = (tmp_path / "cache" / "plan").glob("videos-*")
    data = bytearray(victim.read_bytes())
    data[50] ^= 1
    victim.write_bytes(data)
    verified = tokenmill("verify", "cache", "--deep")
    assert verified.code == 1
    assert f"problem: plan/{victim.name}: damaged, SHA-256 " in verified.out
    (victim,) = (tmp_path / "cache" / "plan").glob("clips-*")
    victim.write_bytes(b"torn")
    done = tokenmill("run", recipe)
    assert done.code == 1
    assert "delete the plan folder and run the recipe again" in done.err
    shutil.rmtree(tmp_path / "cache" / "plan")
    assert tokenmill("run", recipe).code == 0
    assert tokenmill("verify", "cache").code == 0


def test_a_pipe_and_a_tiny_video_end_no_job(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, make_video: Callable[..., str]
) -> None:
    os.mkfifo(videos / "pipe.mp4")
    shutil.copy(make_video("h264", num_frames=8, width=4, height=4), videos / "tiny.mp4")
    done = tokenmill("run", write_recipe([videos]))
    assert done.code == 3
    failures = tokenmill("sql", "cache", "select reason from failures", "--format", "csv").out
    assert failures.count("not a regular file: name a video file") == 1
    assert len(failures.splitlines()) == 2
    assert tokenmill("sql", "cache", "select count(*) as n from clips", "--format", "csv").out == "n\n48\n"


def test_a_lost_or_damaged_head_is_written_anew_by_its_recipe_only(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, tmp_path: Path
) -> None:
    recipe, head = write_recipe([videos]), tmp_path / "cache" / "cache.json"
    tokenmill("run", recipe)
    whole = head.read_bytes()
    for damage in (lambda: head.write_bytes(b"{"), head.unlink):
        damage()
        other = tokenmill("run", recipe, "--set", "clips.height=64")
        assert (other.code, "run the recipe that made it" in other.err or "not empty" in other.err) == (1, True)
        done = tokenmill("run", recipe)
        assert (done.code, "clips=0 shards=0" in done.err) == (0, True)
        assert head.read_bytes() == whole


def test_a_place_that_cannot_be_a_cache_is_said(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, tmp_path: Path
) -> None:
    recipe = write_recipe([videos])
    (tmp_path / "file").write_text("x")
    assert "it is a file, a folder is wanted" in tokenmill("run", recipe, "--set", "cache=file").err
    assert "would be read as a pattern" in tokenmill("run", recipe, "--set", "cache=what?").err
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / ".cache.json.1234abcd").write_text("")
    assert tokenmill("run", recipe, "--set", "cache=started").code == 0


def test_a_token_file_that_is_gone_is_said(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Path, tmp_path: Path
) -> None:
    tokenmill("run", write_recipe([videos]))
    shutil.rmtree(tmp_path / "cache" / "tokens")
    assert tokenmill("sql", "cache", "select count(*) from clips").code == 0  # which needs no tokens
    done = tokenmill("sql", "cache", "select count(*) from tokens")
    assert done.code == 1
    assert "tokenmill verify names what is damaged" in done.err


def test_an_unknown_protocol_of_a_recipe_is_one_line(tokenmill: Command) -> None:
    done = tokenmill("run", "foo://recipe.yaml")
    assert (done.code, done.err.startswith("tokenmill: recipe foo://recipe.yaml: ")) == (2, True)

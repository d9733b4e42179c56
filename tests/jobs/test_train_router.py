"""Training a router on labels that follow a rule: what its heads learn, how it resumes, and what it refuses."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch

from tokenmill.jobs import router_feature_makers, train_router
from tokenmill.jobs.interruption import heed_interrupts
from tokenmill.jobs.router_features import held_out
from tokenmill.jobs.train_router import auroc
from tokenmill.pipeline.cache import open_cache
from tokenmill.pipeline.labels import import_frame_labels
from tokenmill.pipeline.relevance import COLOURS, FakeEncoder, check_same_encoder, encoders_of
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.cache_info import CacheInfo, ProductInfo
from tokenmill.schemas.errors import CacheError, DecodeError, RecipeError, TokenizerError
from tokenmill.schemas.router_training import parse_router_training
from tokenmill.schemas.tables import LABEL_SCHEMA, POLICY_SCHEMA, QUERY_EMBEDDING_SCHEMA, QUERY_SCHEMA
from tokenmill.tokenizers.router import RouterFile, pair_features

from ..conftest import MakeVideo
from .conftest import Command

VIDEOS, FRAMES, SIDE = 12, 10, 4
NAMES = ["red", "green", "blue"]
TRAINING: dict[str, Any] = {"batch_size": 16, "hidden": 32, "held_out": 0.25, "policy_learning_rate": 0.01}
LONG = {**TRAINING, "relevance_epochs": 5, "policy_epochs": 150}
QUICK = {**TRAINING, "relevance_epochs": 1, "policy_epochs": 3, "checkpoint_every": 3, "log_every": 2}


class LabelledCache:
    """What a training needs of a cache: frames of one colour each, labelled 1 for queries that name it; queries that
    name one colour ask for a fragment, those that name two for the whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Folder(str(folder))
        spec = json.loads(json.dumps(asdict(FakeEncoder.spec)))
        self.info = CacheInfo(
            recipe={},
            products={
                "frames/fake": ProductInfo(fingerprint="f1", section={"encoder": "fake"}, encoder=spec, shape=(3,)),
                "frames/mute": ProductInfo(fingerprint="f2", encoder={**spec, "takes_texts": False}, shape=(3,)),
            },
        )
        self.connection = duckdb.connect()
        self.frames: dict[str, np.ndarray] = {}
        random, frames = np.random.default_rng(0), []
        for clip in range(VIDEOS):
            shown = random.integers(len(NAMES), size=FRAMES)
            noise = random.normal(0, 25, (FRAMES, SIDE, SIDE, 3))
            colours_N113 = np.array([COLOURS[NAMES[one]] for one in shown])[:, None, None]
            frames_NHWC = np.clip(colours_N113 + noise, 0, 255).astype(np.uint8)
            self.frames[f"clip{clip}"] = frames_NHWC
            embedded = FakeEncoder().embed_frames(frames_NHWC)
            for n in range(FRAMES):
                frames.append({"clip_id": f"clip{clip}", "video_id": f"video{clip}", "frame": n, "pts_s": n / 2.0})
                frames[-1] |= {"embedding": embedded[n], "shown": NAMES[shown[n]]}
        shown = [one.pop("shown") for one in frames]
        self.add("frames_fake", frames, pa.schema({"clip_id": pa.string(), "video_id": pa.string(), "frame": pa.int32()}
                 | {"pts_s": pa.float64(), "embedding": pa.list_(pa.float32(), 3)}))  # fmt: skip
        texts = {f"q{a}{b}{n}": " ".join(("see", *{NAMES[a]: 0, NAMES[b]: 0}, str(n)))
                 for n in range(5) for a in range(3) for b in range(3)}  # fmt: skip
        queries = [{"query_id": one, "text": text} for one, text in texts.items()]
        self.add("queries", [*queries, {"query_id": "like", "example": "clip0"}], QUERY_SCHEMA)
        labels = [
            {
                **{name: one[name] for name in ("clip_id", "video_id", "frame")},
                "query_id": f"q{a}{a}0",
                "source": "rule",
            }
            | {"label": int(shown[n] == NAMES[a])}
            for n, one in enumerate(frames)
            for a in range(len(NAMES))
        ]
        self.add("labels", [*labels, {**labels[0], "query_id": "like"}, {**labels[0], "frame": 99}], LABEL_SCHEMA)
        policies = [
            {
                "query_id": one,
                "source": "rule",
                "p_fragment": 1.0,
                "policy": "fragment" if one[1] == one[2] else "global",
            }
            for one in texts
        ]
        self.add("policies", policies, POLICY_SCHEMA)
        self.add("query_embeddings", [], QUERY_EMBEDDING_SCHEMA)

    def add(self, name: str, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
        """Make a table of these rows."""
        rows_table = pa.Table.from_pylist(list(rows), schema=pa.schema([one.with_nullable(True) for one in schema]))
        self.connection.execute(f"create or replace table {name} as from rows_table")
        del rows_table

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> pa.Table:
        """As a cache's."""
        return self.connection.sql(query, params=list(parameters)).to_arrow_table()

    def answer(self, query: str, parameters: Sequence[Any], **tables: pa.Table) -> pa.Table:
        """As a cache's."""
        for name, table in tables.items():
            self.connection.register(name, table)
        return self.sql(query, parameters)

    def encoder(self, name: str) -> FakeEncoder:
        """As a cache's."""
        encoder = FakeEncoder()
        check_same_encoder(encoder, encoders_of(self.info)[name], self.folder.url)
        return encoder


class Said:
    """A display that keeps what it is told, and ends the job when it has been told `most` things."""

    def __init__(self, most: float = float("inf"), ended_by: int | None = None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._left, self._ended_by = most, ended_by

    def event(self, name: str, **values: Any) -> None:
        self.events.append((name, values))
        self._count()

    def progress(self, phase: str, done: int, total: int, counts: dict[str, float]) -> None:
        self._count()

    def close(self) -> None:
        pass

    def of(self, name: str) -> list[dict[str, Any]]:
        """The events of this name."""
        return [values for event, values in self.events if event == name]

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0 and self._ended_by:
            os.kill(os.getpid(), self._ended_by)
        elif self._left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabelledCache:
    """The cache that every recipe of a test finds."""
    made = LabelledCache(tmp_path / "cache")
    monkeypatch.setattr(train_router, "open_cache", lambda uri, snapshot: made)
    for name, at_once in {"FRAMES": 30, "PAIRS": 100, "TEXTS": 30}.items():
        monkeypatch.setattr(router_feature_makers, f"{name}_AT_ONCE", at_once)
    return made


def train(folder: Path, said: Said | None = None, *, training: dict[str, Any] = QUICK, **keys: Any) -> Said:
    """Train into `folder`, and what was said."""
    recipe = {"output": str(folder), "cache": "cache", "features": "fake", "training": training, **keys}
    said = said or Said()
    train_router.train_router(parse_router_training(recipe), said)
    return said


def kept(folder: Path) -> list[str]:
    """Digests of all that a training leaves, apart from the recipe."""
    paths = [folder / "router.safetensors", folder / "metrics.jsonl", *sorted(folder.glob("features/*.npy"))]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_heads_learn_the_rule_and_the_file_says_how_well(cache: LabelledCache, tmp_path: Path) -> None:
    said = train(tmp_path / "out", training=LONG)
    (figures,) = said.of("held_out")
    assert figures["relevance_auroc"] > 0.9
    assert figures["relevance_accuracy"] > 0.9
    assert figures["policy_accuracy"] > 0.9
    assert (figures["paper_relevance_accuracy"], figures["paper_policy_accuracy"]) == (0.834, 0.982)
    begun = {one["head"]: (one["learned_from"], one["held_out"], one["by"]) for one in said.of("training")}
    assert begun == {"relevance": (270, 90, "video"), "policy": (34, 11, "query")}
    assert [(one["of"], one["used"], one["total"]) for one in said.of("left_out")] == [("labels", 360, 362)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == {"step": 5 * 17 + 150 * 3, **figures}
    assert {line["head"] for line in lines[:-1]} == {"relevance", "policy"}
    file = RouterFile.read(str(tmp_path / "out" / "router.safetensors"))
    assert float(file.extra["relevance_auroc"]) == figures["relevance_auroc"]
    assert (file.about.features, file.about.of, file.about.hidden) == ("pair", "fake", 32)
    encoder, frames_NHWC = FakeEncoder(), cache.frames["clip3"]
    frames_ND, red_1D = encoder.embed_frames(frames_NHWC), encoder.embed_texts(["something red"])
    texts_ND = torch.from_numpy(red_1D).expand(len(frames_ND), -1)
    found_N = file.relevance()(pair_features(torch.from_numpy(frames_ND), texts_ND)) > 0
    assert found_N.tolist() == [frame[..., 0].mean() > 180 > 90 > frame[..., 1].mean() for frame in frames_NHWC]
    assert file.policy()(torch.from_numpy(encoder.embed_texts(["blue", "red blue"]))).argmax(1).tolist() == [1, 0]


def test_no_video_is_on_both_sides(cache: LabelledCache, tmp_path: Path) -> None:
    groups = pa.chunked_array([[f"video{n % 7}" for n in range(70)]])
    is_out_N = held_out(groups, 0.3)
    sides = [{one for one, is_out in zip(groups.to_pylist(), is_out_N, strict=True) if is_out == s} for s in (0, 1)]
    assert (len(sides[0]), len(sides[1]), sides[0] & sides[1]) == (5, 2, set())
    assert held_out(groups, 0.01).sum() == 10
    assert held_out(groups, 0).sum() == 0
    assert held_out(pa.chunked_array([["a", "a"]]), 0.5).sum() == 0
    cache.connection.execute("delete from labels where video_id != 'video0'")
    (relevance, _) = train(tmp_path / "out").of("training")
    assert (relevance["by"], relevance["held_out"]) == ("query", 10)


@pytest.mark.parametrize("most", [9, 14, 31])
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bytes(
    cache: LabelledCache, tmp_path: Path, most: int
) -> None:
    train(tmp_path / "undisturbed")
    kills = 0
    while kills < 100:
        try:
            train(tmp_path / "out", Said(most))
            break
        except KeyboardInterrupt:
            kills += 1
    assert 1 <= kills < 100
    assert kept(tmp_path / "out") == kept(tmp_path / "undisturbed")
    assert not list((tmp_path / "out").glob("features/chunks/*"))


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals as a command heeds them, and as they were at the end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    heed_interrupts()
    yield
    heed_interrupts()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_training_that_is_asked_to_stop_keeps_its_steps(cache: LabelledCache, tmp_path: Path) -> None:
    train(tmp_path / "undisturbed")
    heed_interrupts()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", Said(21, ended_by=signal.SIGTERM), training={**QUICK, "checkpoint_every": 1000})
    heed_interrupts()
    done = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["relevance"]["step"]
    assert 0 < done < 17
    said = train(tmp_path / "out")
    assert said.of("training")[0]["step"] == done
    assert kept(tmp_path / "out") == kept(tmp_path / "undisturbed")


def test_a_finished_training_says_so_and_more_epochs_go_on(cache: LabelledCache, tmp_path: Path) -> None:
    more = {**QUICK, "relevance_epochs": 2}
    train(tmp_path / "long", training=more)
    train(tmp_path / "out")
    before = kept(tmp_path / "out")
    assert train(tmp_path / "out").events == [
        ("left_out", train(tmp_path / "out").of("left_out")[0]),
        ("finished", {"router": f"{tmp_path}/out/router.safetensors", "steps": 17 + 9}),
    ]
    assert kept(tmp_path / "out") == before
    train(tmp_path / "out", training=more)
    assert kept(tmp_path / "out")[0] == kept(tmp_path / "long")[0]
    with pytest.raises(RecipeError, match=r"training\.relevance_epochs: found 1; accepted: 2, begun already, or more"):
        train(tmp_path / "out")


def test_a_router_that_was_lost_or_torn_is_written_again(cache: LabelledCache, tmp_path: Path) -> None:
    train(tmp_path / "out")
    before, path = kept(tmp_path / "out"), tmp_path / "out" / "router.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    train(tmp_path / "out")
    assert kept(tmp_path / "out") == before


def test_labels_that_come_later_change_nothing_of_a_training_that_has_begun(
    cache: LabelledCache, tmp_path: Path
) -> None:
    train(tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", Said(20))
    cache.connection.execute("update labels set label = 1 - label")
    said = train(tmp_path / "out")
    assert said.of("labels_changed")[0]["remedy"].startswith("give output: another folder")
    assert kept(tmp_path / "out") == kept(tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "new", Said(5))  # in its features
    cache.connection.execute("update labels set label = 1 - label")
    train(tmp_path / "new")
    assert kept(tmp_path / "new") == kept(tmp_path / "undisturbed")


def test_the_order_of_labels_in_the_cache_does_not_matter(cache: LabelledCache, tmp_path: Path) -> None:
    train(tmp_path / "out")
    cache.connection.execute("create or replace table labels as from labels order by hash(clip_id, frame, query_id)")
    assert not train(tmp_path / "out").of("labels_changed")
    train(tmp_path / "new")
    assert kept(tmp_path / "new") == kept(tmp_path / "out")


def test_many_labels_of_few_frames_take_ten_bytes_each(cache: LabelledCache, tmp_path: Path) -> None:
    cache.connection.execute("""create or replace table labels as
        select q.query_id, 'rule' as source, video_id, clip_id, frame, (frame % 2)::tinyint as label
        from frames_fake, queries q where q.text is not null""")
    said = train(tmp_path / "out", training={**QUICK, "batch_size": 1000})
    num_labels = sum(said.of("training")[0][side] for side in ("learned_from", "held_out"))
    assert num_labels == VIDEOS * FRAMES * 45
    features = tmp_path / "out" / "features"
    embeddings = {name: np.load(features / f"{name}.npy") for name in ("frames", "texts")}
    assert embeddings["frames"].shape == (VIDEOS * FRAMES, 3)
    assert embeddings["frames"].dtype == np.float16
    assert embeddings["texts"].shape == (45, 3)
    num_bytes = sum(path.stat().st_size for path in features.rglob("*") if path.is_file())
    assert num_bytes < 10 * num_labels + sum(one.nbytes for one in embeddings.values()) + 2000


def test_texts_that_the_cache_has_embedded_are_not_embedded_again_and_others_one_by_one(
    cache: LabelledCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = {"f1": [0.6, 0.8, 0.0], "f0": [0.0, 0.0, 1.0]}
    rows = [{"query_id": "q000", "scorer": "fake", "version": one, "embedding": vectors[one]} for one in vectors]
    cache.add("query_embeddings", [*rows, {**rows[1], "scorer": "mute"}], QUERY_EMBEDDING_SCHEMA)
    asked, embed_texts = [], FakeEncoder.embed_texts
    monkeypatch.setattr(
        FakeEncoder, "embed_texts", lambda self, texts: (asked.append(texts), embed_texts(self, texts))[1]
    )
    train(tmp_path / "out")
    texts_ND = np.load(tmp_path / "out" / "features" / "texts.npy")
    assert texts_ND[0].tolist() == pytest.approx(vectors["f1"])
    assert [len(texts) for texts in asked] == [1] * 44
    assert texts_ND[1:] == pytest.approx(embed_texts(FakeEncoder(), [texts[0] for texts in asked]))


@pytest.mark.parametrize(("table", "head"), [("labels", "relevance"), ("policies", "policy")])
def test_a_head_without_labels_is_left_out(cache: LabelledCache, tmp_path: Path, table: str, head: str) -> None:
    cache.connection.execute(f"delete from {table}")
    said = train(tmp_path / "out")
    assert [one["head"] for one in said.of("left_out") if not one["used"]] == [head]
    file = RouterFile.read(str(tmp_path / "out" / "router.safetensors"))
    assert (file.about.relevance_dim, file.about.policy_dim) == ((None, 3) if head == "relevance" else (12, None))


class Layers:
    """Stands for the early layers of a model: mean colours, and how they agree with the query's."""

    dim, sha256 = 9, "abc"

    def __init__(self, weights: str, layers: int, device: str, dtype: str) -> None:
        self.said = (weights, layers, device, dtype)

    def features(self, frames_NHWC: np.ndarray, text: str) -> torch.Tensor:
        frames_N3 = torch.from_numpy(FakeEncoder().embed_frames(frames_NHWC))
        text_N3 = torch.from_numpy(FakeEncoder().embed_texts([text])).expand(len(frames_N3), -1)
        return torch.cat((frames_N3, text_N3, frames_N3 * text_N3), 1) * (torch.nan if text == "broken" else 1)

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(FakeEncoder().embed_texts(texts)).repeat(1, 3)


@pytest.fixture
def early(cache: LabelledCache, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The keys of a recipe that takes early layers; the source of clip5 is gone."""

    def source_of(_: LabelledCache, clip_id: str) -> tuple[None, np.ndarray]:
        if clip_id == "clip5":
            raise DecodeError("clip5.mp4: it is gone")
        return None, cache.frames[clip_id]

    monkeypatch.setattr(router_feature_makers, "EarlyLayers", Layers)
    monkeypatch.setattr(router_feature_makers, "source_of", source_of)
    cache.connection.execute("delete from labels where frame = 99")
    return {"features": None, "early_layers": {"weights": "model"}}


def test_early_layers_see_frames_again_and_those_that_are_gone_are_named(early: dict[str, Any], tmp_path: Path) -> None:
    said = train(tmp_path / "out", training=LONG, **early)
    assert said.of("failed") == [{"clip": "clip5", "frames": 30, "reason": "clip5.mp4: it is gone"}]
    assert said.of("training")[0]["learned_from"] + said.of("training")[0]["held_out"] == 330
    assert said.of("held_out")[0]["relevance_auroc"] > 0.9
    about = RouterFile.read(str(tmp_path / "out" / "router.safetensors")).about
    assert (about.features, about.of, about.layers, about.relevance_dim, about.policy_dim) == ("early", "abc", 4, 9, 9)


def test_early_layers_see_a_frame_with_its_query_once_whoever_labels_it(
    early: dict[str, Any], cache: LabelledCache, tmp_path: Path
) -> None:
    cache.connection.execute("insert into labels by name select * replace ('other' as source) from labels")
    said = train(tmp_path / "out", **early)
    assert said.of("failed") == [{"clip": "clip5", "frames": 30, "reason": "clip5.mp4: it is gone"}]
    features = tmp_path / "out" / "features"
    assert [len(np.load(features / f"{name}.npy")) for name in ("pairs", "relevance")] == [360, 660]


def test_early_features_of_a_killed_run_are_kept(
    early: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "undisturbed", **early)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", Said(5), **early)
    assert len(list((tmp_path / "out").glob("features/chunks/*.npy"))) == 2
    decoded, source_of = [], router_feature_makers.source_of
    monkeypatch.setattr(
        router_feature_makers, "source_of", lambda c, clip: (decoded.append(clip), source_of(c, clip))[1]
    )
    train(tmp_path / "out", **early)
    assert len(decoded) == VIDEOS - 2 * 100 // (3 * FRAMES)
    assert kept(tmp_path / "out") == kept(tmp_path / "undisturbed")


def test_features_that_are_no_numbers_are_refused(early: dict[str, Any], cache: LabelledCache, tmp_path: Path) -> None:
    cache.connection.execute("update queries set text = 'broken' where query_id = 'q000'")
    with pytest.raises(RecipeError, match="early_layers: their features are not numbers: set dtype to float32"):
        train(tmp_path / "out", **early)


def test_a_router_learns_from_a_cache_and_its_sources(
    tokenmill: Command, write_recipe: Any, make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = {"fps": 8, "encoders": {"fake": {"encoder": "fake"}}}
    videos = [Path(make_video(num_frames=n, width=48, height=32)) for n in (16, 24)]
    assert tokenmill("run", write_recipe(videos, tokens={}, frames=frames)).code == 0
    opened = open_cache(str(tmp_path / "cache"))
    labels = [json.dumps({"video": str(one), "query": "red", "times_s": [0.0]}) for one in videos]
    assert import_frame_labels(opened, labels, "labels.jsonl", "hand").num_labels > 4
    monkeypatch.setattr(router_feature_makers, "EarlyLayers", Layers)
    for name, keys in {"pair": {}, "early": {"features": None, "early_layers": {"weights": "model"}}}.items():
        said = train(tmp_path / name, cache=str(tmp_path / "cache"), training={"relevance_epochs": 1}, **keys)
        assert said.of("training")[0]["by"] == "video"
        assert not said.of("failed")
        assert RouterFile.read(str(tmp_path / name / "router.safetensors")).about.features == name


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (
            "delete from labels; delete from policies",
            {},
            r"cache: .*cache has neither labels of frames nor policies of queries that can be learned from: add some:"
            r" tokenmill labels import CACHE FILE\.jsonl",
        ),
        ("", {"features": "fak"}, r"features: found 'fak' \(did you mean 'fake'\?\); accepted: encoders of frames and"),
        ("", {"features": "mute"}, r"features: found 'mute', which takes no texts,.*accepted: encoders .*cache: fake"),
        ("", {"labels": "ruler"}, r"labels: found 'ruler' \(did you mean 'rule'\?\); accepted: rule"),
        ("delete from policies", {"policies": "rule"}, r"policies: found 'rule'; accepted: null: the cache has no pol"),
        ("update labels set label = 1", {}, r"labels: all 270 that are learned from are 1; accepted: both 0 and 1"),
        (
            "update policies set policy = 'global'",
            {},
            r"policies: all 34 that are learned from are global; accepted: both global and fragment",
        ),
        ("", {"output": "s3://bucket/out"}, r"output: found 's3://bucket/out'; accepted: a local folder"),
        ("", {"features": None, "early_layers": {"weights": "nowhere"}}, r"early_layers: .*nowhere.*: check the path"),
        (
            "",
            {"features": None, "early_layers": {"weights": "x", "device": "cuda:99"}},
            r"early_layers: device 'cuda:99' was asked for",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    cache: LabelledCache, tmp_path: Path, change: str, keys: dict[str, Any], message: str
) -> None:
    if change:
        cache.connection.execute(change)
    with pytest.raises(RecipeError, match=message):
        train(tmp_path / "out", **keys)


def test_frames_of_another_encoder_than_is_here_are_refused(cache: LabelledCache, tmp_path: Path) -> None:
    spec = cache.info.products["frames/fake"].encoder
    assert isinstance(spec, dict)
    spec["weights_sha256"] = "other"
    with pytest.raises(
        RecipeError, match=r"made by another encoder than is here .weights_sha256 other there, None here.: put its"
    ):
        train(tmp_path / "out")


def test_what_decides_the_weights_may_not_change_once_steps_are_kept(cache: LabelledCache, tmp_path: Path) -> None:
    train(tmp_path / "out")
    with pytest.raises(
        CacheError, match=r"begun by another recipe, with training\.seed=0 \(this recipe: 1\): give output"
    ):
        train(tmp_path / "out", training={**QUICK, "seed": 1})
    (tmp_path / "out" / "checkpoint.pt").unlink()
    train(tmp_path / "out", training={**QUICK, "seed": 1, "held_out": 0.5})
    train(tmp_path / "new", training={**QUICK, "seed": 1, "held_out": 0.5})
    assert kept(tmp_path / "out") == kept(tmp_path / "new")


def test_a_folder_of_something_else_is_refused(cache: LabelledCache, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"not empty \(notes\.txt is there\) and no output of a training"):
        train(tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "training.json").write_text('{"output": "other", "sources": ["videos/"]}')
    with pytest.raises(CacheError, match=r"training\.json: that of another kind of training, or damaged \(.*sources"):
        train(tmp_path / "other")


def test_a_checkpoint_without_its_features_is_refused(cache: LabelledCache, tmp_path: Path) -> None:
    train(tmp_path / "out")
    frames = tmp_path / "out" / "features" / "frames.npy"
    np.save(frames, np.load(frames)[:-1])
    with pytest.raises(CacheError, match=r"relevance\.npy: damaged \(shapes .*'texts'. .119, 45.\): remove .*about"):
        train(tmp_path / "out")
    frames.write_bytes(b"torn")
    with pytest.raises(CacheError, match=r"frames\.npy: damaged \(.*\): remove .*about\.json and checkpoint\.pt"):
        train(tmp_path / "out")
    (tmp_path / "out" / "features" / "about.json").unlink()
    cache.connection.execute("update labels set label = 1 - label")
    with pytest.raises(CacheError, match=r"checkpoint\.pt: it does not fit \(its features are not those that are here"):
        train(tmp_path / "out")


def test_a_loss_that_is_no_number_ends_the_training_and_says_what_to_change(
    cache: LabelledCache, tmp_path: Path
) -> None:
    train(tmp_path / "out")
    path = tmp_path / "out" / "features" / "frames.npy"
    np.save(path, np.full_like(np.load(path), np.nan))
    (tmp_path / "out" / "checkpoint.pt").unlink()
    with pytest.raises(TokenizerError, match=r"relevance head, step 0: the loss is nan: give a smaller"):
        train(tmp_path / "out")


def test_auroc_counts_pairs_in_order() -> None:
    scores, is_true = np.array([0.1, 0.4, 0.4, 0.8, 0.3]), np.array([False, True, False, True, False])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[is_true] for b in scores[~is_true]]
    assert auroc(scores, is_true) == pytest.approx(np.mean(pairs))
    assert auroc(scores, np.ones(5, bool)) is None
    assert auroc(np.zeros(0), np.zeros(0, bool)) is None

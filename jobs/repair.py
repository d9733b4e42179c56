"""tokenmill verify --repair: what is damaged or absent is made again from its sources, by the cache's own recipe.

A manifest is deleted, and then its damaged files, once the sources of its clips are known to be there unchanged: files
that are absent, or by a listing or reading not what was committed. Where one cannot be read, nothing is deleted. From
then on the shard lacks the product as if it had never been made, so whatever ends this job, the next repair or run of
the recipe goes on with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ..pipeline.fetch import local_file
from ..pipeline.index import remove_indexes
from ..pipeline.manifests import committed_names, read_named
from ..pipeline.places import stored_file
from ..pipeline.plan_file import Plan, plans_of, read_stamps
from ..pipeline.storage import Folder
from ..pipeline.work import missing_work
from ..pipeline.worker import Worker
from ..schemas.cache_info import CacheInfo
from ..schemas.clip import Video
from ..schemas.digest import digest_of_stream
from ..schemas.errors import CacheError, StorageError, TokenmillError
from ..schemas.recipe import Recipe
from ..schemas.shard import ShardManifest, manifest_name
from .build import build_driver_worker, check_executor, settled
from .display import Display
from .retry import recipe_of_cache, refuse_other_versions
from .run import make_missing
from .verify import READ_THREADS, NamedFile, asked_products, damaged_files, missing_files, repair_remedy

SHOWN_FILES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One product of one shard of a plan, in its current version."""

    plan: Plan
    index: int
    product: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A manifest that names damaged files; `manifest` is None where it cannot be read itself."""

    name: str
    place: Place
    manifest: ShardManifest | None
    files: tuple[str, ...]

    def videos(self) -> dict[str, Video]:
        """By digest, the videos that it had clips of."""
        clips = self.place.plan.shard(self.place.index).clips
        committed = self.manifest.clips_per_video if self.manifest else {clip.video.digest for clip in clips}
        return {clip.video.digest: clip.video for clip in clips if clip.video.digest in committed}


def repair_cache(cache: str, overrides: Sequence[str], display: Display, *, deep: bool) -> int:
    """Make again what current manifests name and is damaged, and what is missing, as a run of the cache's own recipe
    with `overrides`.

    Damage is what a listing shows, or with `deep` what reading every file shows. What has no source any more, or one
    that changed, is left as it is. Returns how many clips were committed before and failed this time. Before anything
    is deleted: CacheError where what would be made is another version, StorageError where a file cannot be read.
    """
    recipe, info = recipe_of_cache(cache, list(overrides))
    folder = Folder(cache)
    plans = plans_of(folder)
    found = _broken(folder, plans, info, deep=deep)
    _show(found, display)
    broken = list(_with_sources(folder, found, display))
    asked = {product: info.fingerprints[product] for product in asked_products(info)}
    missing = {product for work in missing_work(folder, plans, asked) for product in work.products}
    products = missing | {one.place.product for one in broken}
    if not products:
        display.event("nothing_to_repair", cache=folder.url, left_damaged=len(found))
        return 0
    check_executor(recipe)
    recipe = settled(recipe)
    worker = _worker_for(products, recipe, info)
    if broken:
        remove_indexes(folder)  # they may say of damaged files where tokens lie; the run makes a new one
    for one in broken:
        folder.remove(one.name)
        for name in one.files:
            folder.remove(name)
    display.event("repair", manifests=len(broken), files=sum(len(one.files) for one in broken))
    make_missing(recipe, worker, display)
    return _compare(folder, broken, display)


def _broken(folder: Folder, plans: Sequence[Plan], info: CacheInfo, *, deep: bool) -> list[Broken]:
    """The manifests of current versions that are damaged or name damaged files, by name; StorageError where a file
    cannot be read.
    """
    places = {
        manifest_name(shard_id, product, version): Place(plan=plan, index=index, product=product)
        for plan in plans
        for product, version in info.fingerprints.items()
        if plan.covers(product, version)
        for index, (shard_id, _) in enumerate(plan.shards())
    }
    manifests = _read(folder, sorted(committed_names(folder) & places.keys()))
    named = {
        file.name: (NamedFile(file=file, remedy=repair_remedy(manifest)), name)
        for name, manifest in manifests.items()
        if manifest
        for file in manifest.files
    }
    found = (damaged_files if deep else missing_files)(folder, [one for one, _ in named.values()])
    damaged: dict[str, list[str]] = {name: [] for name, manifest in manifests.items() if manifest is None}
    for one, what in found:
        if isinstance(what, StorageError):
            raise StorageError(f"{what}; nothing was deleted: repair when it can be read") from what
        damaged.setdefault(named[one.file.name][1], []).append(one.file.name)
    return [
        Broken(name=name, place=places[name], manifest=manifests[name], files=tuple(files))
        for name, files in sorted(damaged.items())
    ]


def _read(folder: Folder, names: Sequence[str]) -> dict[str, ShardManifest | None]:
    """The manifests called `names`; None for those that are damaged."""
    try:
        return dict(zip(names, read_named(folder, names), strict=True))
    except CacheError:
        pass

    def read(name: str) -> ShardManifest | None:
        try:
            return read_named(folder, [name])[0]
        except CacheError:
            return None

    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="repair") as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def _show(broken: Sequence[Broken], display: Display) -> None:
    names = [name for one in broken for name in (one.files or (one.name,))]
    for name in names[:SHOWN_FILES]:
        display.event("damaged", file=name)
    if len(names) > SHOWN_FILES:
        display.event("damaged", more_files=len(names) - SHOWN_FILES)


def _with_sources(folder: Folder, broken: Sequence[Broken], display: Display) -> Iterator[Broken]:
    """Those whose videos are all there, unchanged; the others are shown."""
    of = [one.videos() for one in broken]
    videos = {digest: video for some in of for digest, video in some.items()}
    stamps = read_stamps(folder) if videos else None
    known = {row["uri"]: (row["stamp"], row["video_id"]) for row in stamps.to_pylist()} if stamps else {}
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="repair") as pool:
        found = pool.map(lambda video: _source_problem(video, known), videos.values())
        problems = dict(zip(videos, found, strict=True))
    for one, some in zip(broken, of, strict=True):
        bad = [problems[digest] for digest in some if problems[digest]]
        if bad:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            display.event(
                "not_repaired", file=(*one.files, one.name)[0], reason=f"{bad[0]}{more}: bring the source back"
            )
        else:
            yield one


def _source_problem(video: Video, known: Mapping[str, tuple[str, str]]) -> str | None:
    """Why clips of `video` cannot be made again; one whose stamp is that of the plan is not read."""
    stamp = stored_file(video.uri).stamp
    if stamp and known.get(video.uri) == (stamp, video.digest):
        return None
    try:
        with local_file(video.uri) as path, open(path, "rb") as stream:
            if not video.has_content_digest or digest_of_stream(stream)[0] == video.digest:
                return None
    except (TokenmillError, OSError) as error:
        return str(error)
    return f"{video.uri}: it has changed since it was planned"


def _worker_for(products: set[str], recipe: Recipe, info: CacheInfo) -> Worker:
    """The worker that makes these products and no others; CacheError where it would make another version."""
    worker = build_driver_worker(recipe)
    if others := sorted(products - worker.fingerprints.keys()):
        raise CacheError(
            f"{worker.folder.url}: {others[0]} cannot be made together with the cache's other products: nothing was"
            f" deleted; delete what verify names, and run the recipe that made it"
        )
    worker = replace(worker, fingerprints={p: of for p, of in worker.fingerprints.items() if p in products})
    refuse_other_versions(worker, info)
    return worker


def _compare(folder: Folder, broken: Sequence[Broken], display: Display) -> int:
    """Show which of the files came out as they were; returns how many clips failed that were committed before."""
    names = sorted(committed_names(folder) & {one.name for one in broken})
    now = dict(zip(names, read_named(folder, names), strict=True))
    num_same = num_lost = 0
    for one in broken:
        if one.name not in now:
            continue  # its shard was given up: verify says so
        files = {file.name for file in now[one.name].files}
        num_same += len(files.intersection(one.files))
        num_lost += max(0, one.manifest.num_rows - now[one.name].num_rows) if one.manifest else 0
        for name in set(one.files) - files:
            display.event("other_bytes", file=name, reason="its shard came out otherwise: snapshots of it stay damaged")
    display.event("repaired", files=num_same, manifests=len(names), clips_failed=num_lost)
    return num_lost

"""tokenmill verify: is what the plans, manifests and snapshots say really there?"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ..pipeline.account import accounts_of
from ..pipeline.cache import TokenCache, open_cache
from ..pipeline.manifests import read_all
from ..pipeline.relevance_views import RELEVANCE
from ..pipeline.retries import answer_of
from ..pipeline.snapshots import CacheState, live_state, pinned_manifests, read_snapshot, snapshot_numbers
from ..pipeline.storage import Folder
from ..schemas.cache_info import CacheInfo
from ..schemas.digest import digest_of_stream
from ..schemas.errors import CacheError, StorageError
from ..schemas.plan import PLAN_REMEDY
from ..schemas.shard import (
    CLIPS,
    EMBEDDINGS,
    FRAMES,
    SHORT_DIGEST,
    TOKENS,
    WEBDATASET,
    FileEntry,
    ShardManifest,
    is_of_frames,
)
from .display import showing
from .mask_quality import measure_masks
from .quality import measure_quality
from .retokenize import retokenize_sample

READ_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedFile:
    """A file that something names, and what to do if it is not what was named."""

    file: FileEntry
    remedy: str


def verify_cache(
    cache: str,
    *,
    deep: bool,
    retokenize: float | None,
    quality: float | None = None,
    lpips: str | None = None,
    truth: str | None = None,
) -> list[str]:
    """Check files, account and snapshots; print what was found and return the problems, one line each.

    Sizes are checked by one listing; with `deep` every file is read against its SHA-256 and row count. `retokenize` is
    the fraction of clips to make again from their sources; `quality` that of clips whose tokens to decode and compare
    with sources, also by the LPIPS networks in the checkpoint `lpips`, and whose masks to compare with those of the
    product `truth`. Files and account are checked from plans and manifests alone: the index is derived from what is
    checked here.
    """
    opened = open_cache(cache)
    state = live_state(opened.folder)
    problems: list[str] = []
    files = list(named_files(opened.folder, state, problems))
    bad = damaged_files(opened.folder, files) if deep else missing_files(opened.folder, files)
    problems += [
        f"{named.file.name}: {found}" + ("" if isinstance(found, StorageError) else f"; {named.remedy}")
        for named, found in bad
    ]
    how = "read against their SHA-256 and row counts" if deep else "looked up by name and size"
    print(f"files: {len(files)} {how}, {len(problems)} problems")
    problems += relevance_problems(opened.folder, deep=deep)
    problems += account_problems(state)
    if deep and not problems:
        problems += doubled_clips(opened)
    if retokenize is not None and problems:
        print("no clip was made again: mend the files first")
    elif retokenize is not None:
        problems += retokenize_sample(opened, retokenize)
    if quality is not None and problems:
        print("no tokens were decoded: mend the problems first")
    elif quality is not None:
        if not opened.grid_products and not truth:
            raise CacheError(f"{opened.folder.url}: no tokens that decode to frames: compare masks by --truth NAME")
        if opened.grid_products:
            problems += measure_quality(opened, quality, lpips)
        if truth:
            measure_masks(opened, quality, truth)
    for problem in problems:
        print(f"problem: {problem}")
    return problems


def verify_as_json(verify: Callable[[], list[str]]) -> list[str]:
    """The problems that `verify` returns, each also as a JSON line; what it prints goes to standard error."""
    with showing(log_json=True) as display:
        problems = verify()
        for problem in problems:
            display.event("problem", problem=problem)
        display.event("verified", problems=len(problems))
    return problems


def named_files(folder: Folder, state: CacheState, problems: list[str]) -> Iterator[NamedFile]:
    """Every file that a plan, a manifest of any version, or a snapshot names, once; snapshots that cannot be read are
    added to `problems`.
    """
    for plan in state.plans:
        yield NamedFile(file=plan.record.clips, remedy=PLAN_REMEDY)
        yield NamedFile(file=plan.record.videos, remedy=PLAN_REMEDY)
    live = read_all(folder)
    current, there = {manifest.name for manifest in state.manifests}, {manifest.name for manifest in live}
    seen: set[str] = set()
    for manifest in live:
        seen |= {file.name for file in manifest.files}
        remedy = repair_remedy(manifest) if manifest.name in current else _old_remedy(manifest, state.info, there)
        yield from (NamedFile(file=file, remedy=remedy) for file in manifest.files)
    for manifest in _pinned(folder, problems):
        files = [file for file in manifest.files if file.name not in seen]
        seen |= {file.name for file in files}
        yield from (NamedFile(file=file, remedy=_old_remedy(manifest, state.info, there)) for file in files)


def _pinned(folder: Folder, problems: list[str]) -> Iterator[ShardManifest]:
    """The manifests of all snapshots; those that cannot be read are added to `problems`."""
    for number in snapshot_numbers(folder):
        try:
            yield from pinned_manifests(folder, read_snapshot(folder, number))
        except (CacheError, StorageError) as error:
            problems.append(str(error))


def repair_remedy(manifest: ShardManifest) -> str:
    """What to do about a damaged file of a shard that is committed in its product's current version."""
    return f"--repair makes it again, or delete it and {manifest.name}, and run the recipe"


def _old_remedy(manifest: ShardManifest, info: CacheInfo, there: set[str]) -> str:
    """The same for a manifest that is not what is read now; `there` are those that are."""
    if info.fingerprints.get(manifest.product) != manifest.fingerprint:
        return f"{manifest.product} has another version now: only old snapshots need it"
    if manifest.name in there:
        return "its shard is made of other files now: only old snapshots need it"
    return "its shard is not made now: --repair makes it, as running the recipe does"


def missing_files(folder: Folder, files: Iterable[NamedFile]) -> Iterator[tuple[NamedFile, str]]:
    """Every file that is absent or has another size, and what was found, from one listing."""
    sizes = {found.name: found.size_bytes for found in folder.find("")}
    for named in files:
        file, size_bytes = named.file, sizes.get(named.file.name)
        if size_bytes is None:
            yield named, "no such file"
        elif size_bytes != file.size_bytes:
            yield named, f"{size_bytes} bytes, committed {file.size_bytes}"


def damaged_files(folder: Folder, files: Iterable[NamedFile]) -> Iterator[tuple[NamedFile, str | StorageError]]:
    """Every file that is absent or not what was committed, and what was found, having read them all; a StorageError
    where a file could not be read, so that nobody knows what is in it.
    """
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="verify") as pool:
        for named, problem in pool.map(lambda named: (named, _check_file(folder, named.file)), files):
            if problem:
                yield named, problem


def _check_file(folder: Folder, file: FileEntry) -> str | StorageError | None:
    try:
        with folder.open(file.name) as stream:
            sha256, size_bytes = digest_of_stream(stream)
            if sha256 != file.sha256:
                found, wanted = sha256[:SHORT_DIGEST], file.sha256[:SHORT_DIGEST]
                return f"damaged, SHA-256 {found} of {size_bytes} bytes, committed {wanted} of {file.size_bytes}"
            if not file.num_rows or not file.name.endswith(".parquet"):
                return None
            stream.seek(0)
            num_rows = pq.read_metadata(stream).num_rows
    except StorageError as error:
        return str(error) if _is_absent(error) else error
    except pa.ArrowException as error:  # of the bytes that were committed
        return StorageError(f"{folder.uri(file.name)}: {' '.join(str(error).split())}: run this again")
    return None if num_rows == file.num_rows else f"{num_rows} rows, committed {file.num_rows}"


def _is_absent(error: StorageError) -> bool:
    """Whether a store said that it has no such file; one that has no such bucket says nothing of files."""
    cause = error.__cause__
    return isinstance(cause, FileNotFoundError) and answer_of(cause)[1] != "NoSuchBucket"


def relevance_problems(folder: Folder, *, deep: bool) -> Iterator[str]:
    """One line for every file of queries, scores and labels that cannot be read: their footers, or `deep` all pages
    against their checksums.
    """
    for name in folder.list(RELEVANCE):
        if name.endswith(".parquet"):
            try:
                with folder.open(name) as stream:
                    pq.read_table(stream, page_checksum_verification=True) if deep else pq.read_metadata(stream)
            except (StorageError, pa.ArrowException, OSError) as error:
                said = " ".join(str(error).split())
                yield f"{name}: damaged ({said}): restore it, or delete it: scores can be made again, labels imported"


def account_problems(state: CacheState) -> Iterator[str]:
    """One line for every product whose account does not close: planned = committed + failed + quarantined."""
    for account in accounts_of(state.plans, state.manifests, state.info.fingerprints):
        quarantined = account.num_quarantined
        counts = (
            f"{account.product}: planned {account.num_planned}, committed {account.num_committed},"
            f" failed {len(account.failed) - quarantined}, quarantined {quarantined}"
        )
        if account.num_missing < 0:
            yield f"{counts}: {-account.num_missing} clips too many: some were committed twice"
        elif account.num_missing and account.product in asked_products(state.info):
            yield f"{counts}: {account.num_missing} clips are missing; run the recipe again"


def asked_products(info: CacheInfo) -> set[str]:
    """The products that the last recipe makes: those of older recipes may lag behind."""
    recipe, asked = info.recipe, {CLIPS}
    format = recipe["shards"]["format"]
    for product, entry in info.products.items():
        kind, _, name = product.partition("/")
        if is_of_frames(product):
            frames = recipe.get(FRAMES) or {"encoders": {}}
            wanted = {"fps": frames.get("fps"), **(frames["encoders"].get(name, {}) if name else {})}
            asked |= {product} if entry.section == wanted else set()
            continue
        sections = recipe.get(TOKENS[:-1] if kind == EMBEDDINGS[:-1] else kind, {})
        if name and format != "webdataset" and entry.section == sections.get(name):
            asked.add(product)
    return asked | ({WEBDATASET} if format != "parquet" else set())


def doubled_clips(cache: TokenCache) -> Iterator[str]:
    """One line for every product of which a clip has more than one row."""
    rows = cache.sql("""
        select product, count(*) as n, min(clip_id) as clip_id from (
            select 'clips' as product, clip_id from clips group by all having count(*) > 1
            union all select product, clip_id::varchar from locations group by all having count(*) > 1)
        group by product order by product""")
    for row in rows.to_pylist():
        yield f"{row['product']}: {row['n']} clips are in more than one file, for instance {row['clip_id']}"

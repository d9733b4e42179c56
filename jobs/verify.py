"""tokenmill verify: is what the manifests say really there, and would it be made again the same?"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..pipeline.cache import TokenCache, open_cache
from ..pipeline.manifests import read_manifests
from ..pipeline.plan_file import Plan, plans_of
from ..pipeline.storage import Folder
from ..schemas.clip import FrameBatch
from ..schemas.digest import digest_of_stream
from ..schemas.errors import StorageError, TokenmillError
from ..schemas.shard import CLIPS, FileEntry, ShardManifest, tokens_product
from .build import build_worker, recipe_of
from .reconstruct import source_of


def verify_cache(cache: str, sample: int) -> list[str]:
    """Check every file, the account, and `sample` clips made again; prints what was found, returns the problems.

    Files and account are checked from plans and manifests alone: the index is derived from what is checked here.
    """
    opened = open_cache(cache)
    versions = {product: info.fingerprint for product, info in opened.info.products.items()}
    manifests = read_manifests(opened.folder, versions)
    num_files = sum(len(manifest.files) for manifest in manifests)
    plans = plans_of(opened.folder)
    problems = [problem for plan in plans for problem in plan.problems()]
    problems += damaged_files(opened.folder, manifests)
    print(f"files: {num_files + 2 * len(plans)} checked against their SHA-256 and row counts, {len(problems)} problems")
    asked = [CLIPS, *map(tokens_product, opened.info.recipe["tokens"])]  # products of older recipes may lag behind
    problems += missing_clips(plans, asked, manifests)
    if sample and problems:
        print("the sample was not made again: mend the files first")
    elif sample:
        num_same, differences = remade_sample(opened, sample)
        print(f"sample: {num_same} clips made again from their sources are the same, {len(differences)} differ")
        problems += differences
    for problem in problems:
        print(f"problem: {problem}")
    return problems


def damaged_files(folder: Folder, manifests: Sequence[ShardManifest]) -> Iterator[str]:
    """One line for every file that is absent or not what its manifest says."""
    for manifest in manifests:
        for file in manifest.files:
            problem = _check_file(folder, file)
            if problem:
                yield f"{file.name}: {problem}; to make it again, delete it and {manifest.name}, and run the recipe"


def _check_file(folder: Folder, file: FileEntry) -> str | None:

    try:
        with folder.open(file.name) as stream:
            sha256, size_bytes = digest_of_stream(stream)
            if sha256 != file.sha256:
                return f"SHA-256 {sha256[:12]} of {size_bytes} bytes, committed {file.sha256[:12]} of {file.size_bytes}"
            stream.seek(0)
            num_rows = pq.read_metadata(stream).num_rows
    except (StorageError, pa.ArrowException) as error:
        return str(error)
    return None if num_rows == file.num_rows else f"{num_rows} rows, committed {file.num_rows}"


def missing_clips(plans: Sequence[Plan], products: Sequence[str], manifests: Sequence[ShardManifest]) -> Iterator[str]:
    """One line for every product whose account does not close: planned = committed + failed."""
    planned = sum(plan.num_clips for plan in plans)
    for product in products:
        own = [manifest for manifest in manifests if manifest.product == product]
        committed, failed = sum(m.num_rows for m in own), sum(len(m.failures) for m in own)
        if planned != committed + failed:
            yield (
                f"{product}: planned {planned}, committed {committed}, failed {failed}:"
                f" {planned - committed - failed} clips are missing; run the recipe again"
            )


def remade_sample(cache: TokenCache, sample: int) -> tuple[int, list[str]]:
    """How many of the sampled clips came out the same for every product, and a line for each that did not."""

    worker = build_worker(recipe_of(cache.info), cache.folder.url)
    outdated = [p for p, info in cache.info.products.items() if worker.fingerprints[p] != info.fingerprint]
    if outdated:
        return 0, [f"{p}: made by another version of its tokenizer, weights or decoder than is here" for p in outdated]
    # The order of clip ids is the order of digests, so the first ones are a fair sample.
    clip_ids = cache.sql("select clip_id from clips order by clip_id limit ?", [sample])["clip_id"].to_pylist()
    num_same, differences = 0, []
    for clip_id in clip_ids:
        try:
            clip, frames_THWC = source_of(cache, clip_id)
        except TokenmillError as error:
            differences.append(f"clip {clip_id}: {error}")
            continue
        batch = FrameBatch(clips=(clip,), frames_BTHWC=frames_THWC[None], num_valid_B=(clip.num_valid,))
        compared = {p: (cache.read(p, [clip_id]), encoder.encode(batch)) for p, encoder in worker.encoders.items()}
        different = {
            p: int((stored != made).sum()) for p, (stored, made) in compared.items() if not torch.equal(stored, made)
        }
        num_same += not different
        differences += [f"clip {clip_id}: {n} values of {p} differ" for p, n in different.items()]
    return num_same, differences

"""tokenmill export: the tokens of a cache in another format, for trainers that do not read the cache itself."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..pipeline.cache import TokenCache
from ..pipeline.decoding import layout_of
from ..pipeline.encode import bits_of
from ..pipeline.shard_tar import trajectory_arrays
from ..pipeline.storage import Folder, storage_errors
from ..pipeline.views import CLIPS_WITH_VIDEOS
from ..pipeline.webdataset_output import Sample, TarProduct, index_path, tars_fingerprint, write_tar
from ..schemas.cache_info import ProductInfo
from ..schemas.digest import digest_of_stream
from ..schemas.errors import CacheError, StorageError
from ..schemas.shard import EMBEDDINGS, MASKS, VideoText
from ..schemas.tables import FORMAT_VERSION

EXPORT_MANIFEST = "manifest.json"
READ_CLIPS = 512


def export_webdataset(cache: TokenCache, output: str, names: Sequence[str], where: str, clips_per_tar: int) -> None:
    """Write the clips that the SQL condition `where` holds for, with their tokens of the products `names` (none: all),
    to tars in the empty folder `output`. The manifest is written last: with it the export is complete.
    """
    folder, products = empty_folder(output), _products(cache, names)
    clip_ids, num_left_out = choose_clips(cache, list(products), where)
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": tars_fingerprint({product: entry.fingerprint for product, entry in products.items()}),
        "products": {
            name: {**described, "fingerprint": products[product].fingerprint}
            for (product, name), described in _described(products).items()
        },
        "where": where,
        "num_clips": len(clip_ids),
        "num_left_out": num_left_out,
        "tars": list(_write_tars(cache, folder, products, clip_ids, clips_per_tar)),
    }
    folder.replace(EXPORT_MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")
    left_out = f", {num_left_out} left out for want of a product" if num_left_out else ""
    print(f"{folder.uri(EXPORT_MANIFEST)}: {len(clip_ids)} clips with {', '.join(map(_short, products))}{left_out}")


def choose_clips(cache: TokenCache, products: Sequence[str], where: str) -> tuple[list[str], int]:
    """The clips that `where` holds for and that every product has, in the order of the first one's files, so that each
    file is read once; and how many others `where` holds for.
    """
    places = cache.sql(
        f"""select c.clip_id, count(distinct l.product) = len(?::varchar[]) as is_complete
            from (from {CLIPS_WITH_VIDEOS} where {where}) c
            left join (from locations where list_contains(?::varchar[], product)) l on l.clip_id = c.clip_id::uuid
            group by c.clip_id order by min(l.name) filter (where l.product = ?), c.clip_id""",
        [list(products), list(products), products[0]],
    )
    clip_ids = places.filter(places["is_complete"])["clip_id"].to_pylist()
    if not clip_ids:
        raise CacheError(
            f"{cache.folder.url}: no clip has {', '.join(products)} where {where}:"
            f' tokenmill sql CACHE "from clips" lists clips'
        )
    return clip_ids, places.num_rows - len(clip_ids)


def _products(cache: TokenCache, names: Sequence[str]) -> dict[str, ProductInfo]:
    """The products asked for, by product; all tokens of the cache where none is named."""
    chosen = {_product(cache, name) for name in names} or {
        p for p, entry in cache.info.products.items() if entry.tokenizer
    }
    if not chosen:
        raise CacheError(
            f"{cache.folder.url}: it has no tokens as Parquet to export: tars can be read as they are, and"
            f" --product masks/NAME exports masks"
        )
    return {product: cache.info.products[product] for product in sorted(chosen)}


def _product(cache: TokenCache, name: str) -> str:
    """The product called `name`: of tokens, unless it says ``masks/`` or ``embeddings/``."""
    if name.startswith(EMBEDDINGS) and name in cache.info.products:
        return name
    return cache.masks_product(name) if name.startswith(MASKS) else cache.product(name)


def _described(products: Mapping[str, ProductInfo]) -> dict[tuple[str, str], dict[str, Any]]:
    """What every sample says of each product, by product and the name of its member."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for product, entry in products.items():
        name = product.partition("/")[2]
        if entry.tokenizer:
            found[product, name] = _tar_product(product, entry).to_json()
        elif entry.segmenter:
            found[product, f"{name}.masks"] = {"segmenter": dict(entry.segmenter)}
        else:
            found[product, f"{name}.embedding"] = {"dim": entry.shape[0]}
    return found


def _tar_product(product: str, entry: ProductInfo) -> TarProduct:
    return TarProduct(tokenizer=(entry.tokenizer or {})["name"], layout=layout_of(product, entry))


def empty_folder(output: str) -> Folder:
    folder = Folder(output)
    found = folder.list("")
    if found:
        raise StorageError(f"{folder.url}: not empty ({found[0]} is there): give an empty or new folder")
    return folder


def _write_tars(
    cache: TokenCache, folder: Folder, products: Mapping[str, ProductInfo], clip_ids: list[str], clips_per_tar: int
) -> Iterator[dict[str, Any]]:
    """Write and put in place one tar after the other; yields what the manifest says of each."""
    described = {name: values for (_, name), values in _described(products).items()}
    version = tars_fingerprint({product: entry.fingerprint for product, entry in products.items()})
    with folder.staging() as staging:
        for number, start in enumerate(range(0, len(clip_ids), clips_per_tar)):
            path, chosen = f"{staging}/{number:05d}.tar", clip_ids[start : start + clips_per_tar]
            with storage_errors(staging):
                write_tar(path, _samples(cache, products, chosen), described, version)
            index, tar = _put(folder, index_path(path)), _put(folder, path)
            print(f"{folder.uri(tar['name'])}: {len(chosen)} clips, {tar['size_bytes']} bytes")
            yield {**tar, "index": index["name"], "num_clips": len(chosen)}


def _samples(cache: TokenCache, products: Mapping[str, ProductInfo], clip_ids: Sequence[str]) -> Iterator[Sample]:
    """The samples of these clips, in their order, a few at a time in memory."""
    for start in range(0, len(clip_ids), READ_CLIPS):
        chosen = clip_ids[start : start + READ_CLIPS]
        query = f"from {CLIPS_WITH_VIDEOS} where list_contains(?::varchar[], clip_id)"
        rows = {row["clip_id"]: row for row in cache.sql(query, [chosen]).to_pylist()}
        names = {product: name for product, name in _described(products)}
        arrays = {names[product]: _arrays(cache, product, entry, chosen) for product, entry in products.items()}
        for i, clip_id in enumerate(chosen):
            row = rows[clip_id]
            yield Sample(
                clip=row,
                text=VideoText(caption=row["caption"], metadata=row["metadata"]),
                arrays={name: array[i] for name, array in arrays.items()},
            )


def _arrays(
    cache: TokenCache, product: str, entry: ProductInfo, clip_ids: Sequence[str]
) -> Sequence[np.ndarray | Mapping[str, np.ndarray]]:
    """What the tars hold of a product for each of these clips."""
    if entry.segmenter:
        ids = trajectory_ids_of(cache, product, clip_ids)
        return [
            {"masks": one.masks_THW, "graph": one.graph_MT, "trajectory_ids": np.array(ids[clip_id], np.str_)}
            for clip_id, one in zip(clip_ids, cache.read_masks(product, clip_ids), strict=True)
        ]
    if not entry.tokenizer:
        return list(cache.read(product, clip_ids).numpy())
    if cache.has_trajectories(product):
        tar = _tar_product(product, entry)
        return [trajectory_arrays(one, tar) for one in cache.read_trajectories(product, clip_ids)]
    return list(_tar_product(product, entry).arrays(bits_of(cache.read(product, clip_ids))))


def trajectory_ids_of(cache: TokenCache, product: str, clip_ids: Sequence[str]) -> dict[str, list[str]]:
    """The ids of the trajectories of these clips in a product of masks, by clip, in the order of their rows."""
    rows = cache.sql(
        """select clip_id, list_transform(trajectories, lambda one: one.trajectory_id) as ids from masks
           where product = ? and list_contains(?::varchar[], clip_id)""",
        [product.removeprefix(MASKS), list(clip_ids)],
    ).to_pylist()
    return {row["clip_id"]: row["ids"] for row in rows}


def _put(folder: Folder, path: str) -> dict[str, Any]:
    """Put a finished local file in place whole; returns its name and what its bytes are."""
    name = os.path.basename(path)
    with open(path, "rb") as stream:
        sha256, size_bytes = digest_of_stream(stream)
    folder.put(path, name)
    return {"name": name, "size_bytes": size_bytes, "sha256": sha256}


def _short(product: str) -> str:
    return product.removeprefix("tokens/")

"""SQL macros that find clips with the same codes, or nearly: by digests, sampled positions, and MinHash.

Nothing is drawn: positions and hash functions are the same in every process, so the same clips give the same pairs.
"""

import functools
import hashlib
import math
from collections.abc import Callable

import duckdb
import numpy as np
import pyarrow as pa
from duckdb.func import ARROW
from duckdb.sqltypes import BLOB, DOUBLE, INTEGER, UBIGINT, VARCHAR

from ..schemas.cache_info import CacheInfo
from ..schemas.shard import tokens_product

BANDS = 32  # keys of a clip: clips that share one are compared
WANTED = 0.95  # of the pairs that are just alike enough, so many are to be found, or more
LOWEST = (
    0.5  # share or Jaccard index that can be asked for: below, bands would be of so few places that most clips meet
)
MOST_POSITIONS, MOST_HASHES = 1024, 16  # in a band
CROWD = 16  # clips of a bucket that are compared with each other
FIRST_POSITIONS, FIRST_HASHES = 1 << 40, 1 << 41  # of the numbers that are mixed for places, and for hash functions

DUPLICATE_MACRO = """
create temp macro duplicate_clips(name) as table
    select row_number() over (order by count(*) desc, min(clip_id)) as group_id,
           list(clip_id order by clip_id) as clip_ids, count(*) as num_clips
    from (select clip_id, code_digest(codes) as digest from query_table('tokens_' || name))
    group by digest having count(*) > 1 order by group_id;
"""

# Clips with equal codes are one, by the first of them. A bucket has the clips with one key of one band; it is cut into
# parts of CROWD by clip_id, since a thousand clips that are nearly alike would make half a million pairs in it.
PAIR_MACRO = """
create temp macro {macro}(name, {least}) as table
    with hashed as materialized (
        select clip_id, code_digest(codes) as digest, {keys} as keys from query_table('tokens_' || name)
        where if({least} between {lowest} and 1, true,
                 error('{macro}(name, {least}): {least} is from {lowest} to 1, found ' || {least}))
    ), distinct_clips as materialized (
        select row_number() over (order by min(clip_id)) as number, min(clip_id) as clip_id,
               arg_min(keys, clip_id) as keys, count(*) as num_same
        from hashed group by digest
    ), keyed as (
        select number, generate_subscripts(keys, 1) as band, unnest(keys) as key from distinct_clips
    ), buckets as materialized (
        select band, key, number, num_in_bucket,
               (row_number() over (partition by band, key order by number) - 1) // {crowd} as part
        from keyed join (select band, key, count(*) as num_in_bucket from keyed group by band, key having count(*) > 1)
             using (band, key)
    ), crowded as (
        select distinct number from buckets where num_in_bucket > {crowd}
    ), candidates as materialized (
        select distinct a.number as a, b.number as b from buckets a join buckets b using (band, key, part)
        where a.number < b.number
    ), compared as materialized (
        select a, b, {score} as score
        from candidates join distinct_clips x on x.number = a join distinct_clips y on y.number = b
        join query_table('tokens_' || name) p on p.clip_id = x.clip_id
        join query_table('tokens_' || name) q on q.clip_id = y.clip_id
    )
    select x.clip_id, y.clip_id as other_id, score as {column}, x.num_same, y.num_same as other_num_same,
           a in (from crowded) or b in (from crowded) as is_crowded
    from compared join distinct_clips x on x.number = a join distinct_clips y on y.number = b
    where score >= {least} order by score desc, x.clip_id, other_id;
"""


def create_duplicate_macros(connection: duckdb.DuckDBPyConnection, info: CacheInfo) -> None:
    """Temporary macros over products of codes, with all levels together, and the functions that they need.

    duplicate_clips(name): groups of clips with the same codes, by the BLAKE2b-128 digest of them: that two of 10^9
    clips with other codes share one has odds of 10^-21, so groups are not compared again.
    near_duplicates(name, min_share): pairs of clips with equal codes in `min_share` of all places or more.
    similar_code_sets(name, min_jaccard): pairs whose sets of codes, wherever they lie, have such a Jaccard index.

    Pairs are looked for where two clips share one of 32 keys, and compared exactly: none is wrong, and of those that
    are s alike a share of ``share_found(s, k)`` is found, with k = ``band_size(least)``: 95% of those just alike
    enough, and more of others. (For keys of sampled positions that is over the choice of positions.) Clips with the
    same codes are one clip: the first id stands for all `num_same`. Where more than 16 clips share a key, they are
    compared in parts of 16 alone: `is_crowded` says that such clips have more pairs than are listed.
    """
    integers, keys = connection.list_type(INTEGER), connection.list_type(UBIGINT)
    functions: dict[str, tuple[Callable[..., pa.Array], list, object]] = {
        "code_digest": (_digests, [integers], BLOB),
        "num_same_codes": (_num_same, [integers, integers], INTEGER),
        "position_keys": (_position_keys, [integers, DOUBLE], keys),
        "code_set_keys": (functools.partial(_set_keys, info), [integers, DOUBLE, VARCHAR], keys),
        "code_set_jaccard": (functools.partial(_jaccard, info), [integers, integers, VARCHAR], DOUBLE),
    }
    for name, (function, parameters, result) in functions.items():
        connection.create_function(name, function, parameters, result, type=ARROW)  # pyright: ignore
    near = PAIR_MACRO.format(
        macro="near_duplicates", least="min_share", column="share", lowest=LOWEST, crowd=CROWD,
        keys="position_keys(codes, min_share::double)", score="num_same_codes(p.codes, q.codes) / len(p.codes)",
    )  # fmt: skip
    similar = PAIR_MACRO.format(
        macro="similar_code_sets", least="min_jaccard", column="jaccard", lowest=LOWEST, crowd=CROWD,
        keys="code_set_keys(codes, min_jaccard::double, name)", score="code_set_jaccard(p.codes, q.codes, name)",
    )  # fmt: skip
    connection.execute(DUPLICATE_MACRO + near + similar)


def band_size(least: float, most: int) -> int:
    """How many places of a clip make one key, where pairs that are `least` alike are wanted; `most` at most.

    The largest k with 1 - (1 - least^k)^BANDS >= WANTED: larger keys bring fewer clips together that are not alike.
    """
    if least >= 1:
        return most
    return min(most, max(1, math.floor(math.log(1 - (1 - WANTED) ** (1 / BANDS)) / math.log(least))))


def share_found(alike: float, size: int) -> float:
    """The share of pairs that are found, of those that are `alike`: 1 - (1 - s^k)^BANDS with keys of k places."""
    return 1 - (1 - alike**size) ** BANDS


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """uint64 hashes of numbers, by the finalizer of SplitMix64: the same with every version of everything."""
    with np.errstate(over="ignore"):
        z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@functools.cache
def _position_weights(num_codes: int, size: int) -> np.ndarray:
    """uint64 weights (n, BANDS): the sum of weighted codes is a key of `size` positions, drawn with replacement."""
    drawn = _mixed(np.arange(FIRST_POSITIONS, FIRST_POSITIONS + 2 * BANDS * size)).reshape(2, BANDS, size)
    positions_Bk, multipliers_Bk = drawn[0] % np.uint64(num_codes), drawn[1]
    weights_nB = np.zeros((num_codes, BANDS), np.uint64)
    np.add.at(weights_nB, (positions_Bk.astype(np.int64), np.arange(BANDS)[:, None]), multipliers_Bk)
    return weights_nB


def _position_keys(lists: pa.Array, least: pa.Array) -> pa.Array:
    """BANDS keys of each clip: hashes of its codes at the same sampled positions in every clip."""
    codes_Nn = _codes(lists).astype(np.uint64)
    size = band_size(least[0].as_py(), MOST_POSITIONS)
    return _lists_of(codes_Nn @ _position_weights(codes_Nn.shape[1], size))


def _set_keys(info: CacheInfo, lists: pa.Array, least: pa.Array, name: pa.Array) -> pa.Array:
    """BANDS keys of each clip: each of a few hash functions, and of what is smallest by them among its codes."""
    elements_Nn = _mixed(_elements(info, lists, name)).astype(np.uint32)
    size = band_size(least[0].as_py(), MOST_HASHES)
    drawn = _mixed(np.arange(FIRST_HASHES, FIRST_HASHES + 3 * BANDS * size)).reshape(3, BANDS, size)
    odd_Bk, added_Bk = (drawn[0] | np.uint64(1)).astype(np.uint32), drawn[1].astype(np.uint32)
    hashes_Nn, keys_NB = np.empty_like(elements_Nn), np.zeros((len(elements_Nn), BANDS), np.uint64)
    for band, place in np.ndindex(BANDS, size):
        np.add(elements_Nn, added_Bk[band, place], out=hashes_Nn)
        np.multiply(hashes_Nn, odd_Bk[band, place], out=hashes_Nn)
        keys_NB[:, band] += hashes_Nn.min(1) * drawn[2, band, place]
    return _lists_of(keys_NB)


def _elements(info: CacheInfo, lists: pa.Array, name: pa.Array) -> np.ndarray:
    """int32 (N,n): codes as elements of sets, where the same code of another level is another element."""
    codes_Nn, entry = _codes(lists), info.products[tokens_product(name[0].as_py())]
    num_levels = len(entry.levels)
    if not num_levels:
        return codes_Nn
    if len(entry.shape) == 4:  # on one grid, with levels innermost
        levels_n = np.tile(np.arange(num_levels, dtype=np.int32), math.prod(entry.shape[:3]))
    else:
        sizes = [math.prod(grid) for grid in entry.levels]
        levels_n = np.repeat(np.arange(num_levels, dtype=np.int32), sizes)
    return codes_Nn + (levels_n << 16)  # levels are of up to 65,536 codes


def _jaccard(info: CacheInfo, lists: pa.Array, others: pa.Array, name: pa.Array) -> pa.Array:
    """The Jaccard index of the sets of codes of two clips, in every row."""
    sets = _elements(info, lists, name), _elements(info, others, name)
    num_N, num_others_N, num_both_N = (_num_distinct(one) for one in (*sets, np.concatenate(sets, axis=1)))
    return pa.array((num_N + num_others_N - num_both_N) / num_both_N)


def _num_distinct(values_Nn: np.ndarray) -> np.ndarray:
    return 1 + np.count_nonzero(np.diff(np.sort(values_Nn, axis=1), axis=1), axis=1)


def _digests(lists: pa.Array) -> pa.Array:
    """BLAKE2b-128 of the codes of every row, as int32."""
    return pa.array([hashlib.blake2b(row, digest_size=16).digest() for row in _codes(lists)], pa.binary())


def _num_same(lists: pa.Array, others: pa.Array) -> pa.Array:
    """How many codes are the same at the same place, of two lists of one length in every row."""
    joined, other = _joined(lists), _joined(others)
    same = joined.flatten().to_numpy() == other.flatten().to_numpy()
    counts = np.concatenate([[0], np.cumsum(same, dtype=np.int32)])
    ends = np.cumsum([0, *joined.value_lengths().to_numpy()])
    return pa.array(np.diff(counts[ends]), pa.int32())


def _codes(lists: pa.Array) -> np.ndarray:
    """int32 (N,n) of lists that are all of one length."""
    joined = _joined(lists)
    return np.ascontiguousarray(joined.flatten().to_numpy()).reshape(len(joined), -1)


def _lists_of(keys_NB: np.ndarray) -> pa.Array:
    offsets = np.arange(len(keys_NB) + 1, dtype=np.int32) * keys_NB.shape[1]
    return pa.ListArray.from_arrays(offsets, keys_NB.reshape(-1))


def _joined(lists: pa.Array | pa.ChunkedArray) -> pa.Array:
    return lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists

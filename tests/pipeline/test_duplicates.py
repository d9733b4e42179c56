"""Pairs of clips that are alike are found without comparing all, as often as the formula says."""

from itertools import combinations

import duckdb
import numpy as np
import pytest

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.duplicates import (
    CROWD,
    LOWEST,
    MOST_HASHES,
    MOST_POSITIONS,
    WANTED,
    _mixed,
    band_size,
    share_found,
)

from .test_cache import make_cache
from .test_code_statistics import clip_ids, connected

NUM_PAIRS, NUM_CODES = 400, 100


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    url = str(tmp_path_factory.mktemp("duplicates") / "cache")
    make_cache(url)
    return open_cache(url)


def pairs_of(connection: duckdb.DuckDBPyConnection, query: str) -> dict[tuple[int, int], float]:
    """What two clips (by their numbers) are alike, of the pairs in the answer."""
    rows = connection.sql(query).fetchall()
    assert all(row[0] < row[1] for row in rows)
    found = {(int(row[0], 16), int(row[1], 16)): row[2] for row in rows}
    assert len(found) == len(rows)
    return found


def planted(num_same: int) -> np.ndarray:
    """Codes (2N,n): clip N+i has `num_same` codes of clip i at their places; all others are found nowhere else."""
    rng = np.random.default_rng(num_same)
    firsts = np.arange(NUM_PAIRS * NUM_CODES).reshape(NUM_PAIRS, NUM_CODES)
    seconds = firsts + NUM_PAIRS * NUM_CODES
    for first, second in zip(firsts, seconds, strict=True):
        places = rng.permutation(NUM_CODES)[:num_same]
        second[places] = first[places]
    return np.concatenate([firsts, seconds])


def similar(num_shared: int) -> np.ndarray:
    """As `planted`, with the codes that clips share anywhere: a Jaccard index of m / (2n - m)."""
    rng = np.random.default_rng(num_shared)
    made = planted(0)
    made[NUM_PAIRS:, :num_shared] = made[:NUM_PAIRS, :num_shared]
    return rng.permuted(made, axis=1)


@pytest.mark.parametrize(("num_same", "least"), [(80, 0.8), (90, 0.9), (88, 0.8), (95, 0.95), (99, 0.9)])
def test_near_duplicates_are_found_as_often_as_the_formula_says(num_same: int, least: float) -> None:
    found = pairs_of(connected(planted(num_same), (1, 10, 10)), f"from near_duplicates('made', {least})")
    assert set(found) <= {(i, NUM_PAIRS + i) for i in range(NUM_PAIRS)}
    assert set(found.values()) == {num_same / NUM_CODES}
    expected = share_found(num_same / NUM_CODES, band_size(least, MOST_POSITIONS))
    assert expected >= WANTED
    assert len(found) / NUM_PAIRS == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("num_shared", "least"), [(67, 0.5), (80, 0.66), (89, 0.8), (95, 0.9)])
def test_similar_sets_are_found_as_often_as_the_formula_says(num_shared: int, least: float) -> None:
    found = pairs_of(connected(similar(num_shared), (1, 10, 10)), f"from similar_code_sets('made', {least})")
    jaccard = num_shared / (2 * NUM_CODES - num_shared)
    assert set(found) <= {(i, NUM_PAIRS + i) for i in range(NUM_PAIRS)}
    assert set(found.values()) == {jaccard}
    expected = share_found(jaccard, band_size(least, MOST_HASHES))
    assert expected >= WANTED
    assert len(found) / NUM_PAIRS == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("least", [0.5, 0.7, 0.9])
def test_pairs_are_those_of_brute_force_but_for_a_few(least: float) -> None:
    rng = np.random.default_rng(5)
    codes_Nn = rng.integers(0, 2000, (40, 48)).repeat(5, axis=0)  # families of clips that differ in 0 to 24 places
    for codes in codes_Nn:
        places = rng.permutation(48)[: rng.integers(0, 25)]
        codes[places] = rng.integers(0, 2000, len(places))
    made = connected(codes_Nn, (3, 4, 4))
    pairs = [(i, j) for i, j in combinations(range(200), 2) if (codes_Nn[i] != codes_Nn[j]).any()]
    sets = [set(codes) for codes in codes_Nn.tolist()]
    alike = {
        "near_duplicates": [float((codes_Nn[i] == codes_Nn[j]).mean()) for i, j in pairs],
        "similar_code_sets": [len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in pairs],
    }
    for macro, values in alike.items():
        wanted = {pair: value for pair, value in zip(pairs, values, strict=True) if value >= least}
        found = pairs_of(made, f"from {macro}('made', {least})")
        assert found.items() <= wanted.items()
        assert len(found) >= WANTED * len(wanted) > 0


def test_the_size_of_a_key_finds_enough_of_the_pairs_just_alike_enough() -> None:
    for least in np.linspace(LOWEST, 0.995, 50):
        for most in (MOST_POSITIONS, MOST_HASHES):
            size = band_size(least, most)
            assert share_found(least, size) >= WANTED
            assert size == most or share_found(least, size + 1) < WANTED
    assert band_size(1, MOST_POSITIONS) == MOST_POSITIONS


def test_clips_with_the_same_codes_are_groups_and_one_clip_in_pairs() -> None:
    base = np.arange(NUM_CODES)
    near = np.where(base == 7, 1000, base)
    made = connected(np.stack([base, near, base + 2000, near, base, base]), (1, 10, 10))
    ids = clip_ids(6)
    assert made.sql("from duplicate_clips('made')").fetchall() == [
        (1, [ids[0], ids[4], ids[5]], 3),
        (2, [ids[1], ids[3]], 2),
    ]
    assert made.sql("from near_duplicates('made', 0.9)").fetchall() == [(ids[0], ids[1], 0.99, 3, 2, False)]
    assert made.sql("from similar_code_sets('made', 0.9)").fetchall() == [(ids[0], ids[1], 99 / 101, 3, 2, False)]


@pytest.mark.parametrize("macro", ["near_duplicates", "similar_code_sets"])
def test_a_crowd_of_clips_that_are_nearly_alike_gives_few_pairs_and_says_so(macro: str) -> None:
    rng = np.random.default_rng(3)
    codes_Nn = np.arange(NUM_CODES)[None].repeat(500, axis=0)
    codes_Nn[np.arange(500), rng.integers(0, NUM_CODES, 500)] = 1000 + np.arange(500)
    codes_Nn[498:] = np.arange(NUM_CODES) + 5000  # two clips far from the crowd
    codes_Nn[499, 0] = 1
    rows = connected(codes_Nn, (1, 10, 10)).sql(f"from {macro}('made', 0.9)").fetchall()
    crowded = [row for row in rows if row[-1]]
    assert 498 <= len(crowded) <= 498 * 32 * (CROWD - 1) / 2
    assert len(crowded) < 498 * 497 / 2 / 5
    assert {clip_id for row in crowded for clip_id in row[:2]} == set(clip_ids(498))
    assert [row[:2] for row in rows if not row[-1]] == [tuple(clip_ids(500)[498:])]


def test_shifted_clips_have_the_same_set_and_few_places_alike() -> None:
    base = np.arange(NUM_CODES)
    made = connected(np.stack([base, np.roll(base, 9), base[::-1]]), (1, 10, 10))
    assert pairs_of(made, "from similar_code_sets('made', 1)") == {(0, 1): 1, (0, 2): 1, (1, 2): 1}
    assert pairs_of(made, "from near_duplicates('made', 0.5)") == {}


@pytest.mark.parametrize(
    ("shape", "levels", "is_pair"),
    [((8,), [(1, 2, 2), (1, 2, 2)], False), ((1, 2, 2, 2), [(1, 2, 2), (1, 2, 2)], True), ((2, 2, 2), [], True)],
)
def test_a_code_of_another_level_is_another_code(shape: tuple[int, ...], levels: list, *, is_pair: bool) -> None:
    codes_2n = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 1, 2, 3, 4]])  # halves change places, or pairs do
    found = pairs_of(connected(codes_2n, shape, levels), "from similar_code_sets('made', 0.5)")
    assert found == ({(0, 1): 1.0} if is_pair else {})


@pytest.mark.parametrize(("macro", "least"), [("near_duplicates", "min_share"), ("similar_code_sets", "min_jaccard")])
@pytest.mark.parametrize("value", [0.49, 1.01])
def test_what_is_not_alike_is_refused(macro: str, least: str, value: float) -> None:
    made = connected(np.zeros((2, 4)), (1, 2, 2))
    with pytest.raises(duckdb.Error, match=rf"{macro}\(name, {least}\): {least} is from 0.5 to 1, found {value}"):
        made.sql(f"from {macro}('made', {value})").fetchall()


def test_hashes_are_those_of_splitmix64() -> None:
    """As published with seed 0: what is found is the same on every machine, with every version of numpy."""
    assert _mixed(np.arange(3)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("product", ["fake", "dct", "levels", "native"])
def test_duplicates_of_a_cache_have_the_same_codes(cache: TokenCache, product: str) -> None:
    ids = cache.sql("select clip_id from clips order by clip_id")["clip_id"].to_pylist()
    codes = dict(zip(ids, cache.read(product, ids).flatten(1).numpy(), strict=True))
    groups: dict[bytes, list[str]] = {}
    for clip_id, one in codes.items():
        groups.setdefault(one.tobytes(), []).append(clip_id)
    rows = cache.sql(f"from duplicate_clips('{product}')").to_pylist()
    assert sorted(row["clip_ids"] for row in rows) == sorted(one for one in groups.values() if len(one) > 1)
    pairs = cache.sql(f"from near_duplicates('{product}', 0.6)").to_pylist()
    assert all(row["share"] == (codes[row["clip_id"]] == codes[row["other_id"]]).mean() >= 0.6 for row in pairs)

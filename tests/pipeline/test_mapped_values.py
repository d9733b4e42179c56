"""Values at places of an address range, in runs and one by one."""

import os
from pathlib import Path

import numpy as np
import pytest

from tokenmill.pipeline.address_range import PAGE, AddressRange
from tokenmill.pipeline.mapped_values import LONG_RUN, MappedColumn


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[AddressRange, np.ndarray]:
    """A file of a megabyte of random bytes, mapped, and its bytes."""
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    addresses = AddressRange(data.size + PAGE)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    addresses.map(0, descriptor, data.size)
    os.close(descriptor)
    return addresses, data


@pytest.mark.parametrize("width", [1, 7, 1000, LONG_RUN + 1])
@pytest.mark.parametrize("order", ["in sequence", "from width - 1 on", "runs", "shuffled"])
def test_every_part_has_the_bytes_at_its_places(
    mapped: tuple[AddressRange, np.ndarray], width: int, order: str
) -> None:
    addresses, data = mapped
    places = np.arange(40) * width + (width - 1 if order == "from width - 1 on" else 5)
    if order == "runs":
        places[10:] += 3
        places[25:] -= 3 * width
    if order == "shuffled":
        places = np.random.default_rng(1).permutation(places)
    column = MappedColumn(addresses, width, places)
    for begin, end in [(0, 40), (0, 1), (39, 40), (9, 11), (10, 25), (3, 30), (25, 40), (7, 7), (0, 0), (40, 40)]:
        found = column.gather(begin, end).view(np.dtype((np.uint8, width)))
        wanted = [data[place : place + width] for place in places[begin:end]]
        np.testing.assert_array_equal(found, np.array(wanted, np.uint8).reshape(-1, width))


def test_a_batch_keeps_its_values_while_others_are_gathered(mapped: tuple[AddressRange, np.ndarray]) -> None:
    addresses, data = mapped
    column = MappedColumn(addresses, LONG_RUN, np.arange(40) * LONG_RUN)
    kept = [column.gather(i, i + 1) for i in range(40)]
    assert b"".join(one.tobytes() for one in kept) == data[: 40 * LONG_RUN].tobytes()


def test_no_values_are_no_values(mapped: tuple[AddressRange, np.ndarray]) -> None:
    assert MappedColumn(mapped[0], 4, np.zeros(0, np.int64)).gather(0, 0).size == 0

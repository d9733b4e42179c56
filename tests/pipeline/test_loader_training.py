"""Loaders inside training loops: distributed ranks, stateful DataLoaders, loops that set the epoch."""

import json
import subprocess
import sys

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.loader import TokenLoader
from tokenmill.schemas.errors import CacheError

from .loader_kit import flat, ids_of, make_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(str(tmp_path_factory.mktemp("training") / "cache"), 300, names=["short", "tracks"])


@pytest.fixture
def cache(made: str) -> TokenCache:
    return open_cache(made)


RANKS = """
import json, multiprocessing, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from tokenmill.pipeline.cache import open_cache
from tokenmill.pipeline.loader import TokenLoader

def train(rank, world_size, url, meeting):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    loader = TokenLoader(open_cache(url), ["tracks", "short"], 8, token_budget=20, seed=1)
    model = DistributedDataParallel(torch.nn.Linear(6, 1))
    for _ in range(2):
        for batch in loader:  # a step more or less on one rank would wait for ever
            model(batch["tracks"].values.float()).mean().backward()
            parts = [None] * world_size
            torch.distributed.all_gather_object(parts, list(batch["clip_id"]))
            if rank == 0:
                print(json.dumps(parts), flush=True)
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    world_size, url, meeting = int(sys.argv[1]), *sys.argv[2:]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=train, args=(i, world_size, url, meeting)) for i in range(world_size)]
    [rank.start() for rank in ranks]
    [rank.join() for rank in ranks]
    sys.exit(any(rank.exitcode for rank in ranks))
"""


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_distributed_ranks_take_their_shares_and_stay_together(
    made: str, cache: TokenCache, tmp_path_factory: pytest.TempPathFactory, world_size: int
) -> None:
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    script = meeting.with_name("ranks.py")
    script.write_text(RANKS)
    command = [sys.executable, str(script), str(world_size), made, str(meeting)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    alone = TokenLoader(cache, ["tracks", "short"], 8, token_budget=20, seed=1)
    wanted = [sorted(ids) for _ in range(2) for ids in ids_of(alone)]
    assert [sorted(flat(parts)) for parts in steps] == wanted
    assert all(len(parts) == world_size for parts in steps)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("num_workers", "num_given"), [(0, 5), (2, 5), (3, 0), (3, 1), (3, 2), (3, 4)])
@pytest.mark.parametrize("settings", [{"shuffle": "global"}, {"token_budget": 12}], ids=str)
def test_a_stateful_dataloader_resumes_in_the_middle_of_an_epoch(
    cache: TokenCache, num_workers: int, num_given: int, settings: dict
) -> None:
    def loader() -> StatefulDataLoader:
        source = TokenLoader(cache, ["tracks", "short"], 8, seed=1, **settings)
        source.set_epoch(3)
        context = "fork" if num_workers else None
        return StatefulDataLoader(source, batch_size=None, num_workers=num_workers, multiprocessing_context=context)

    whole = ids_of(loader())
    begun = loader()
    batches = iter(begun)
    first = [next(batches)["clip_id"] for _ in range(num_given)]
    state = begun.state_dict()
    again = loader()
    again.load_state_dict(state)
    assert first + ids_of(again) == whole


def test_a_loop_that_sets_the_epoch_reads_each_in_its_own_order(cache: TokenCache) -> None:
    source = TokenLoader(cache, "short", 50, seed=1)
    alone = [ids_of(source) for _ in range(3)]
    source = TokenLoader(cache, "short", 50, seed=1)
    loader = DataLoader(source, batch_size=None, num_workers=2, multiprocessing_context="fork", persistent_workers=True)
    for epoch in range(3):
        source.set_epoch(epoch)
        assert ids_of(loader) == alone[epoch]
    assert len(loader) == len(alone[0])


def test_a_loop_may_stop_and_save_at_any_step(cache: TokenCache) -> None:
    source = TokenLoader(cache, "short", 16, seed=1)
    seen, step = [], 0
    while step < 50:  # epochs and checkpoints as a trainer has them
        for batch in source:
            seen.append(batch["clip_id"])
            step += 1
            if step % 13 == 0:
                state = source.state_dict()
                source = TokenLoader(cache, "short", 16, seed=1)
                source.load_state_dict(state)
                break
    undisturbed = TokenLoader(cache, "short", 16, seed=1)
    wanted = [ids for _ in range(3) for ids in ids_of(undisturbed)]
    assert seen == wanted[: len(seen)]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_workers_that_resumed_and_stopped_begin_the_next_epoch_apart(cache: TokenCache) -> None:
    source = TokenLoader(cache, "short", 16, seed=1)
    wanted = [ids_of(source) for _ in range(3)]
    source = TokenLoader(cache, "short", 16, seed=1)
    workers = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True}
    begun = StatefulDataLoader(source, **workers)
    batches = iter(begun)
    next(batches)
    next(batches)
    begun.load_state_dict(begun.state_dict())
    assert next(iter(begun))["clip_id"] == wanted[0][2]
    source.set_epoch(2)
    assert ids_of(begun) == wanted[2]


def test_a_loader_does_not_guess_where_its_workers_are(cache: TokenCache) -> None:
    source = TokenLoader(cache, "short", 16)
    list(DataLoader(source, batch_size=None, num_workers=1, multiprocessing_context="fork"))
    with pytest.raises(
        CacheError, match=r"read by worker processes of a DataLoader.* use torchdata's StatefulDataLoader"
    ):
        source.state_dict()
    next(iter(source))
    assert source.state_dict()["step"] == 1


RANKS_APART = """
import sys
import torch
from tokenmill.pipeline.cache import open_cache
from tokenmill.pipeline.loader import TokenLoader
rank, url, meeting = int(sys.argv[1]), *sys.argv[2:]
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
TokenLoader(open_cache(url), "short", 8, where=f"start_s > {rank}")
"""


@pytest.mark.slow
def test_ranks_with_other_clips_are_refused(made: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    meeting = str(tmp_path_factory.mktemp("apart") / "meeting")
    commands = [[sys.executable, "-c", RANKS_APART, str(rank), made, meeting] for rank in (0, 1)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert all("ranks 1 read other clips than rank 0: open the cache at one snapshot" in one for one in said)

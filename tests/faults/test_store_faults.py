"""The same job to any store, by any number of workers, and through a store that fails: the same files."""

import random
from collections.abc import Callable, Iterator

import pytest
from harness import Contents, MakeJob, asked_of, assert_same, contents_of
from proxy import FaultProxy

from tokenmill.pipeline.retries import apply_storage_options
from tokenmill.pipeline.storage import Folder

RAY = {"kind": "ray"}
ToStore = Callable[[str], dict[str, dict]]


@pytest.fixture
def to_store() -> Iterator[Callable[[str], dict[str, dict]]]:
    """to_store(endpoint): the recipe's storage section for an S3 server, which this process heeds too."""

    def options(endpoint: str) -> dict[str, dict]:
        found = {"s3": {"endpoint_url": endpoint, "key": "testing", "secret": "testing"}}
        apply_storage_options(found)
        return found

    yield options
    apply_storage_options({})


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_cache_in_an_object_store_has_the_files_of_a_local_one(
    make_job: MakeJob, whole: Contents, seaweedfs: str, s3_url: str, to_store: ToStore, *, killed: bool
) -> None:
    job = make_job(cache=s3_url, storage=to_store(seaweedfs))
    if killed:
        job.kill_drivers(8, random.Random(8))
    assert job.finish() == 0
    assert b"secret" not in Folder(s3_url).read("cache.json")
    assert_same(job, whole)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("run_in", ["process", "actor"])
def test_any_number_of_workers_makes_the_same_files(
    make_job: MakeJob, whole: Contents, workers: int, run_in: str
) -> None:
    job = make_job(
        executor=RAY | {"workers": workers, "cpus_per_worker": 0.5}, decode={"run_in": run_in, "processes": 2}
    )
    assert job.finish(most_runs=1) == 0
    assert contents_of(job.cache) == asked_of(job, whole)


@pytest.mark.s3
@pytest.mark.slow
def test_a_store_that_fails_now_and_then_loses_nothing(
    make_job: MakeJob, whole: Contents, fault_proxy: FaultProxy, s3_url: str, to_store: ToStore
) -> None:
    for harm, method in [("status", ""), ("refuse", ""), ("lose_answer", "PUT"), ("cut_upload", "PUT")]:
        fault_proxy.inject(harm, method=method, probability=0.03)
    fault_proxy.inject("status", probability=0.03, status=503, code="SlowDown")
    fault_proxy.inject("cut_download", method="GET", probability=0.03)
    fault_proxy.inject("delay", probability=0.02, delay_s=1)
    job = make_job(cache=s3_url, storage=to_store(fault_proxy.url))
    job.kill_drivers(3, random.Random(3))
    assert job.finish() == 0
    assert fault_proxy.harmed
    fault_proxy.clear()
    assert_same(job, whole)


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("any_s3", ["s3_server"], indirect=True)  # a proxy cannot take a header out of a signature
def test_a_store_without_conditions_is_committed_to_by_one_process(
    make_job: MakeJob, whole: Contents, fault_proxy: FaultProxy, s3_url: str, to_store: ToStore
) -> None:
    fault_proxy.inject("drop_conditions")
    job = make_job(cache=s3_url, storage=to_store(fault_proxy.url))
    assert job.finish(most_runs=1) == 0
    assert "the store has no create-if-absent: this process commits; run one job at a time" in job.said()
    assert_same(job, whole)

"""S3 whose every request is retried by our policy, and by nothing else."""

import asyncio
import contextlib
import io
import math
import os
from typing import Any

from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from .retries import POLICY, Attempts

CONNECTIONS = 32
PART_BYTES = 16 << 20
MAX_PARTS = 10_000


class RetriedS3(S3FileSystem):
    """S3 as s3fs has it, with one loop of retries around each request, and around the body of its answer.

    botocore and s3fs have loops of their own, one inside the other: both are off, or attempts would multiply.
    """

    retries = 1
    policy = POLICY

    def __init__(self, *args: Any, config_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        config = {"max_pool_connections": CONNECTIONS, **(config_kwargs or {}), "retries": {"total_max_attempts": 1}}
        super().__init__(*args, config_kwargs=config, **kwargs)

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        attempts = Attempts(f"{method} s3://{kwargs.get('Bucket', '')}/{kwargs.get('Key', '')}", self.policy)
        while True:
            try:
                answer = await super()._call_s3(method, *akwarglist, **kwargs)
                if method == "get_object" and ("Range" in kwargs or self._is_small(answer)):
                    with contextlib.closing(answer["Body"]) as body:
                        answer["Body"] = _ReadBody(await body.read())
                return answer
            except Exception as error:
                wait_s = attempts.wait_after(error)
            await asyncio.sleep(wait_s)

    call_s3 = sync_wrapper(_call_s3)

    def _is_small(self, answer: Any) -> bool:
        """Whether s3fs reads this body as it comes: it closes larger ones, and asks for their ranges."""
        return answer.get("ContentLength", 0) <= self.default_block_size

    async def _put_file(self, lpath: str, rpath: str, *args: Any, chunksize: int | None = None, **kwargs: Any) -> None:
        # s3fs sends up to 100 MB in one request, and holds 500 MB of a larger file in memory.
        chunksize = chunksize or max(PART_BYTES, math.ceil(os.path.getsize(lpath) / MAX_PARTS))
        await super()._put_file(lpath, rpath, *args, chunksize=chunksize, **kwargs)


RetriedS3._cache = S3FileSystem._cache  # whoever forgets s3fs's instances forgets these


class _ReadBody:
    """The body of an answer, read already: a download that breaks off is then part of the request that is retried."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    async def read(self, num_bytes: int = -1) -> bytes:
        return self._stream.read(num_bytes)

    def close(self) -> None:
        self._stream.close()

"""Samples as Arrow columns, and batches out of them without a step for every value: for lance and datasets."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from .samples import Batch, Packed, Samples, SetSpec, cu_seqlens_of

CHUNK = 256


def column_type(spec: SetSpec) -> pa.DataType:
    """Lists of a fixed size, or lists of the numbers of all tokens of a sample."""
    value = pa.from_numpy_dtype(np.dtype(spec.dtype))
    return pa.list_(value) if spec.lengths else pa.list_(value, spec.width)


def tables(spec: SetSpec, samples: Samples) -> Iterator[pa.Table]:
    """All samples as tables of one column, ``tokens``, of a few rows each."""
    for start in range(0, spec.num_samples, CHUNK):
        arrays = [samples.sample(i).reshape(-1) for i in range(start, min(start + CHUNK, spec.num_samples))]
        values = pa.array(np.concatenate(arrays))
        if spec.lengths:
            offsets = np.append(0, np.cumsum([len(array) for array in arrays])).astype(np.int32)
            column = pa.ListArray.from_arrays(offsets, values, type=column_type(spec))
        else:
            column = pa.FixedSizeListArray.from_arrays(values, type=column_type(spec))
        yield pa.table({"tokens": column})


def batch_of(column: pa.Array | pa.ChunkedArray, spec: SetSpec) -> Batch:
    """A batch of the rows of a column, copied once."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [chunk.flatten().to_numpy() for chunk in chunks]
    values = torch.from_numpy(np.concatenate(parts).reshape(-1, *spec.shape))
    if not spec.lengths:
        return values
    return Packed(values, cu_seqlens_of(np.concatenate([np.diff(chunk.offsets) for chunk in chunks]) // spec.width))

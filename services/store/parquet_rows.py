"""A Parquet file from standard input as lines of JSON: run as a process of its own, because the file is a stranger's.

A few kilobytes of it may name a text that stands in every row, claim sizes that are not so, or crash a reader. Here it
may have so much memory and so much time, and takes nobody along.
"""

import json
import resource
import sys

MEMORY_BYTES = 3 << 30  # of address space; Arrow reserves much more than it uses
CPU_SECONDS = 60
BATCH_ROWS = 100
SMALL_BYTES = 1 << 24  # a larger batch is turned into rows one by one


def main() -> int:
    """Exit status 1 with a sentence on standard error for what is no Parquet file, or too large a one."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        file = pq.ParquetFile(pa.BufferReader(sys.stdin.buffer.read()))
        print(json.dumps(file.schema_arrow.names), flush=True)
        for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
            pieces = [batch] if batch.nbytes < SMALL_BYTES else (batch.slice(at, 1) for at in range(batch.num_rows))
            for piece in pieces:
                for row in piece.to_pylist():
                    print(json.dumps(row, default=_told))
    except (pa.ArrowException, OSError, ValueError, MemoryError, RecursionError) as error:
        print(str(error)[:200] or type(error).__name__, file=sys.stderr)
        return 1
    return 0


def _told(value: object) -> object:
    """Moments and numbers of other kinds as text; bytes are no text, and nothing is imported from them."""
    return {"bytes": len(value)} if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    sys.exit(main())

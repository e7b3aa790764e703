"""Score a file of candidates of any size; started again after a kill, it goes on where it was.

python large_file.py ARTIFACT candidates.jsonl scores.jsonl

A line of candidates is {"id": …, "query": …, "document": …}; with m0kit[parquet] both files may be Parquet.
"""

import sys

from m0kit.jobs.job import score_file

artifact, source, output = sys.argv[1:]
done = score_file(artifact, source, output, load={"cache_bytes": 1 << 30})  # documents that come again are kept
print(f"{done.rows} rows, {done.resumed} of them scored by an earlier run, {done.errors} could not be scored")
if done.error_file:
    print(f"why not: {done.error_file}")

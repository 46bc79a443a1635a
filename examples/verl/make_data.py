"""Rows of data for verl: which episodes to play. `python examples/verl/make_data.py OUT [--rows N]`

verl reads a table with a row per prompt. The environment draws its task from the row's `size` (such
as the number of questions) and `seed`. The column `prompt` is not used, but verl wants one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes OUT/train.parquet and OUT/val.parquet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2])
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, count, first in (("train", options.rows, 0), ("val", 64, 10**6)):
        chance = random.Random(name)
        rows = [
            {
                "data_source": "mem1",
                "prompt": [{"role": "user", "content": "see extra_info"}],
                "reward_model": {"style": "rule", "ground_truth": ""},
                "extra_info": {
                    "index": first + number,
                    "size": chance.choice(options.sizes),
                    "seed": first + number,
                },
            }
            for number in range(count)
        ]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), options.out / f"{name}.parquet"
        )


if __name__ == "__main__":
    main()

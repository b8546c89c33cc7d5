"""Carve a dataset: what `ray job submit -- python jobs/carve_dataset.py --config ...` runs.

The same command again carves what is new and does nothing where all is done. Exit codes: 0 done,
2 configuration, 3 some shards failed, 4 nothing committed, 75 interrupted and resumable.
"""

import typer

from pipeline.run_command import run

if __name__ == "__main__":
    typer.run(run)

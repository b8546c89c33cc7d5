"""Measure what carving costs: `ray job submit -- python jobs/evaluate_fidelity.py --config ...`.

The images are spread over the actors of the cluster; results are written where this script runs.
Exit codes: 0 done, 2 configuration or input.
"""

import typer

from pipeline.cli import evaluate_fidelity

if __name__ == "__main__":
    typer.run(evaluate_fidelity)

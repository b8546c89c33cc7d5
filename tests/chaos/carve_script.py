"""`jobs/carve_dataset.py` itself, with one more encoder to choose from."""

import runpy
from pathlib import Path

from tests.chaos import plugin_path

if __name__ == "__main__":
    plugin_path.install()
    script = Path(__file__).parents[2] / "jobs" / "carve_dataset.py"
    runpy.run_path(str(script), run_name="__main__")

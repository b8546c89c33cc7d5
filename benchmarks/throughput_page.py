"""The page that `throughput.py` writes: every figure on it comes from the results of one run."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from hardware import processor

_PACKAGES = ("torch", "torchvision", "transformers", "ray", "pyarrow", "pillow", "numpy")
_TARGETS = {"bound": 0.9, "ray_data": 1.3, "ray_data_no_op": 2.0, "bare": 0.9, "growth": 0.05}
_FORMS = {
    "ray_data": "Ray Data, the usual way",
    "ray_data_encoder": "Ray Data, with this project's encoder",
    "ray_data_lean": "Ray Data, with this project's encoder and preprocessing",
}
_NO_OP_FORMS = {
    "ray_data": _FORMS["ray_data"],
    "ray_data_lean": "Ray Data, with this project's preprocessing",
}
_STAGES_WHAT = {
    "read": "shard to samples, with all checks of the archive",
    "hash": "SHA-256 of the image file",
    "decode": "JPEG to RGB",
    "preprocess": "resize and crop, in uint8",
    "tower": "normalise, tower, signals",
    "carve": "the carver",
    "pack": "order by rank, int8",
    "write": "checksums, Parquet, index, digest, commit",
}


def machine(device: str) -> dict[str, str]:
    """Return what this runs on."""
    info = {
        "CPU": f"{processor()}, {os.cpu_count()} logical cores",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(
            # torchvision is there only where its image processors are compared with.
            f"{name} {importlib.metadata.version(name)}"
            for name in _PACKAGES
            if name != "torchvision" or find_spec(name)
        ),
    }
    if device == "cuda":
        count = torch.cuda.device_count()
        info["GPU"] = f"{count} x {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    return info


def round_line(measured: Mapping[str, Any]) -> str:
    """Return one round in a line."""
    bare = f"bare tower {measured['bare_tower']:.1f}, " if "bare_tower" in measured else ""
    return (
        f"{bare}bound {measured['bound_alone']:.1f} alone and {measured['bound_together']:.1f} "
        f"together, pipeline {measured['pipeline']['steady']:.1f}, "
        + ", ".join(
            f"{label} {measured[form]['steady']:.1f}"
            for form, label in _FORMS.items()
            if form in measured
        )
        + " images/s"
    )


def render(results: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    parts = [
        "# Throughput: the pipeline, Ray Data, the bare tower, and the bound",
        _intro(results),
        "## Targets",
        _targets(results),
        *_why_missed(results),
        "## With the tower",
        _rates(results["tower"]),
        _stages(results["tower"]),
        "## Without the tower: the ceiling of the pipeline itself",
        "The encoder returns the same tokens for every image; the carver is `uniform_grid`.",
        _rates(results["no_op"]),
        _stages(results["no_op"]),
        "## Memory of an actor",
        _memory(results["memory"]),
        "## Ray Data's settings",
        _tuning(results),
        "## How it is measured",
        _METHOD,
    ]
    return "\n\n".join(parts) + "\n"


def _intro(results: Mapping[str, Any]) -> str:
    options, where = results["options"], results["machine"]
    images = options["num_shards"] * options["images_per_shard"]
    flags = " ".join(
        f"--{name.replace('_', '-')} {options[name]}"
        for name in (
            *("encoder", "device", "cores", "num_shards", "images_per_shard"),
            *("repeats", "batch_size"),
        )
    )
    lines = [
        "Written by this command, nothing on it by hand:",
        f"\n    python benchmarks/throughput.py --work-dir DIR --write-page {flags}\n",
        *[f"- {name}: {value}" for name, value in where.items()],
        f"- {options['num_shards']} shards of {options['images_per_shard']} JPEG photographs, "
        f"640 x 480 at quality 90, {results['shard_bytes'] / images / 1000:.0f} kB each, on a "
        f"local disk; of {results['no_tower_images_per_shard']} where no tower runs",
        f"- {results['date']}, {results['minutes']:.1f} minutes; load average "
        f"{results['load_at_start']:.1f} at the start, {results['load_at_end']:.1f} at the end",
    ]
    return "\n".join(lines)


def _ratios(rounds: Sequence[Mapping[str, Any]], other: str) -> list[float]:
    def value(r: Mapping[str, Any]) -> float:
        return float(r[other]["steady"] if other.startswith("ray_data") else r[other])

    return [r["pipeline"]["steady"] / value(r) for r in rounds]


def _efficiency(rounds: Sequence[Mapping[str, Any]]) -> list[float]:
    return [sum(r["stages_alone"].values()) / r["pipeline"]["cpu_seconds"] for r in rounds]


def _targets(results: Mapping[str, Any]) -> str:
    tower, no_op = results["tower"]["rounds"], results["no_op"]["rounds"]
    rows = [
        _target("pipeline / bound", _ratios(tower, "bound_alone"), _TARGETS["bound"]),
        _target(
            "pipeline / bound, stages measured on all cores at once",
            _ratios(tower, "bound_together"),
            None,
        ),
        *[
            _target(f"pipeline / {label}{where}", _ratios(rounds, form), _TARGETS[target])
            for rounds, forms, where, target in (
                (tower, _FORMS, "", "ray_data"),
                (no_op, _NO_OP_FORMS, ", no tower", "ray_data_no_op"),
            )
            for form, label in forms.items()
        ],
        _target("pipeline / bound, no tower", _ratios(no_op, "bound_alone"), None),
        _target(
            "cost of the stages / cost of the pipeline, in core time", _efficiency(tower), None
        ),
        _target("the same, no tower", _efficiency(no_op), None),
        _target(
            "pipeline / bare tower",
            _ratios(tower, "bare_tower"),
            _TARGETS["bare"] if results["options"]["device"] == "cuda" else None,
        ),
    ]
    memory = results["memory"]
    if memory is not None:
        growth, limit = memory["growth"]["peak_bytes"], _TARGETS["growth"]
        verdict = "met" if growth <= limit else "**missed**"
        rows.append(f"| growth of an actor's peak memory | {growth:.1%} | | <= 5 % | {verdict} |")
    head = "| | median | rounds | target | |\n|---|--:|---|--:|---|\n"
    return head + "\n".join(rows)


def _why_missed(results: Mapping[str, Any]) -> list[str]:
    """Return what bounds each ratio to Ray Data on these cores that is below its target."""
    if results["options"]["device"] == "cuda":
        return []
    found = []
    for part, form, target, explain in (
        ("tower", "ray_data_encoder", "ray_data", _why_tower),
        ("no_op", "ray_data", "ray_data_no_op", _why_no_tower),
    ):
        rounds, aim = results[part]["rounds"], _TARGETS[target]
        if (reached := statistics.median(_ratios(rounds, form))) < aim:
            found.append(explain(rounds, reached, aim))
    return found


def _why_tower(rounds: Sequence[Mapping[str, Any]], reached: float, aim: float) -> str:
    """Explain a ratio to Ray Data with the same encoder.

    Tower and carver are then the same code in both. With s core-ms of them an image, a of all else
    here and b of all else there, the ratio is (s + b) / (s + a) where all cores are busy.
    """
    shared, rest, theirs, best = (
        statistics.median(value(r) for r in rounds)
        for value in (
            _shared_ms,
            lambda r: 1000 * r["pipeline"]["cpu_seconds"] - _shared_ms(r),
            lambda r: 1000 * r["ray_data_encoder"]["cpu_seconds"] - _shared_ms(r),
            lambda r: r["bound_alone"] / r["ray_data_encoder"]["steady"],
        )
    )
    text = (
        f"**Why {reached:.2f} and not {aim} with this project's encoder in both.** Tower and "
        f"carver are then the same code and take {shared:.1f} core-ms an image here; all else "
        f"takes {rest:.1f} in this pipeline and {theirs:.1f} in Ray Data. The bound, which charges "
        f"nothing for joining the stages, is itself only {best:.2f} times Ray Data. "
    )
    if (limit := (theirs - aim * rest) / (aim - 1)) > 0:
        text += (
            f"A ratio of {aim} takes a tower and a carver of at most {limit:.1f} core-ms, as where "
            "they run on a GPU and the cores have the rest alone."
        )
    return text


def _why_no_tower(rounds: Sequence[Mapping[str, Any]], reached: float, aim: float) -> str:
    """Explain a ratio to Ray Data where no tower runs."""
    alone, together, busy = (
        statistics.median(value(r) for r in rounds)
        for value in (
            lambda r: r["bound_alone"] / r["ray_data"]["steady"],
            lambda r: r["bound_together"] / r["ray_data"]["steady"],
            lambda r: r["ray_data"]["cores"],
        )
    )
    return (
        f"**Why {reached:.2f} and not {aim} without a tower.** Ray Data keeps {busy:.2f} cores "
        "busy, and most of an image's work, to decode it and to scale it, must be done in both. "
        f"The bound, which charges nothing for joining the stages, is {alone:.2f} times Ray Data "
        f"where each stage has the machine alone, and {together:.2f} times with all cores at work, "
        "as they are in both."
    )


def _shared_ms(measured: Mapping[str, Any]) -> float:
    costs = measured["stages_together"]
    return 1000 * float(costs["tower"] + costs["carve"])


def _target(name: str, ratios: Sequence[float], target: float | None) -> str:
    middle = statistics.median(ratios)
    each = ", ".join(f"{r:.2f}" for r in ratios)
    if target is None:
        return f"| {name} | {middle:.2f} | {each} | | |"
    verdict = "met" if middle >= target else "**missed**"
    return f"| {name} | {middle:.2f} | {each} | >= {target} | {verdict} |"


def _rates(part: Mapping[str, Any]) -> str:
    rounds = part["rounds"]
    table = [
        "| images/s | median | rounds | core-ms per image | cores used | by others | whole run |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    yardsticks = {
        "bare_tower": "bare tower, tensors ready",
        "bound_alone": "bound, stages alone",
        "bound_together": "bound, stages on all cores at once",
    }
    for name, label in yardsticks.items():
        if name in rounds[0]:
            table.append(f"| {label} | {_spread([r[name] for r in rounds])} | | | | |")
    forms = _FORMS if part["name"] == "tower" else _NO_OP_FORMS
    for name, label in {"pipeline": "this pipeline", **forms}.items():
        middle = {key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]}
        table.append(
            f"| {label} | {_spread([r[name]['steady'] for r in rounds])} | "
            f"{1000 * middle['cpu_seconds']:.1f} | {middle['cores']:.2f} | "
            f"{middle['cores_of_others']:.2f} | {middle['whole']:.1f} |"
        )
    return "\n".join(table) + f"\n\nRay Data in all forms: {part['setting']}."


def _spread(values: Sequence[float]) -> str:
    each = ", ".join(f"{v:.1f}" for v in values)
    return f"{statistics.median(values):.1f} | {each}"


def _stages(part: Mapping[str, Any]) -> str:
    rounds = part["rounds"]
    alone, together = (
        {s: statistics.median(r[f"stages_{how}"][s] for r in rounds) for s in _STAGES_WHAT}
        for how in ("alone", "together")
    )
    total = sum(alone.values())
    table = [
        "| stage | core-ms per image, alone | share | on all cores at once | what it is |",
        "|---|--:|--:|--:|---|",
    ]
    for stage, what in _STAGES_WHAT.items():
        table.append(
            f"| {stage} | {1000 * alone[stage]:.2f} | {alone[stage] / total:.0%} | "
            f"{1000 * together[stage]:.2f} | {what} |"
        )
    table.append(f"| sum | {1000 * total:.2f} | | {1000 * sum(together.values()):.2f} | |")
    first = max(alone, key=lambda stage: alone[stage])
    return "\n".join(table) + (
        f"\n\nThe limit is `{first}`: {alone[first] / total:.0%} of the work of an image. Cores "
        f"that work at once need {sum(together.values()) / total:.2f} times what one alone does."
    )


def _memory(memory: Mapping[str, Any] | None) -> str:
    if memory is None:
        return "Not measured in this run."
    table = ["| commits | peak MB | resident MB |", "|--:|--:|--:|"]
    table += [
        f"| {r['commits']} | {r['peak_bytes'] / 1e6:.0f} | {r['resident_bytes'] / 1e6:.0f} |"
        for r in memory["readings"]
    ]
    return "\n".join(table) + (
        f"\n\nOne actor alone over all shards: {memory['growth']['peak_bytes']:+.1%} of its peak "
        "between the two readings."
    )


def _tuning(results: Mapping[str, Any]) -> str:
    table = ["| encoder | setting | images/s |", "|---|---|--:|"]
    for name in ("tower", "no_op"):
        table += [
            f"| {name} | {t['setting']} | {t['images_per_second']:.1f} |"
            for t in results[name]["tried"]
        ]
    agreement = results["tower"]["agreement"]
    return (
        "Tried before the rounds on the first shards, the usual way; the fastest of each encoder "
        "was used in all its forms.\n\n"
        + "\n".join(table)
        + f"\n\nOf the tokens kept per image, at least {agreement:.2%} are the same in the "
        "pipeline's output and in each of Ray Data's: their batches and their attention differ, "
        "and with them the last bits."
    )


_METHOD = """\
- **Same work.** `tokencarve` to 64 tokens (`cls_attention`, `attention_output`), int8, checksums
  and stored columns are the same code in both, and so is the result. The pipeline also writes
  an index and a commit per shard; Ray Data has neither. All processes run torch with one thread.
  The pipeline's actors and the yardsticks keep freed memory (`pipeline/heap.py`); Ray Data's
  workers run as Ray starts them.
- **Ray Data** (`ray_data_baseline.py`): `read_webdataset` -> `map` (decode, preprocess) ->
  `map_batches` on an actor pool that holds the encoder -> `write_parquet`, in the same Ray session
  with the same CPUs, in the layout that was fastest of those tried. *The usual way* is what one
  writes with transformers: Pillow decodes, the model's own image processor preprocesses, its
  float32 pixel values travel, and the model's own tower runs, asked for its hidden states and
  attention weights; those come from its eager attention alone, and all its layers run. *With this
  project's encoder* the tower is ours, which runs no layer behind the features and keeps fused
  attention. *And preprocessing*: it gets our decoder and resizer too and sends uint8: what is left
  is the difference between the two ways to move the data. Where no tower runs, the usual way is
  Pillow and the model's own image processor.
- **Steady state.** Pipeline: from the moment when every actor has made two commits to the moment
  when the first has two left to make, so that as many shards are under way at both; a shard in
  progress counts by its share of time. Ray Data: from the first sixth of the images packed to the
  last shard; since it prepares images far ahead and writes late, an image counts in each stage
  (prepared, packed, written) by that stage's share of the work. *Whole run* includes the start of
  the actors.
- **Core-ms per image** is the CPU time of all processes of the run in that window, Ray's own and
  the driver among them. What it has above the sum of the stages is the price of joining them; the
  share is also what *pipeline / bound* would be with all cores busy. *Cores used* and *by others*
  say how busy they were, and who else was at work; a run beside others cannot reach the bound.
- **Turns.** Each round runs bare tower, stages, pipeline, Ray Data, one after the other; ratios are
  taken within a round, and the table gives their median.
- **Bound.** The CPU time of every stage measured alone in one thread on the same images, added up,
  over the number of cores; on a GPU, the slower of the device's stages and the cores' stages. It
  leaves out whatever it costs to join the stages. *Alone* leaves the other cores idle; *at once*
  has every core measure, so it includes what they lose to each other in caches, memory and clock,
  which no schedule can win back.
- **Noise.** A shared machine moves all rates by 10 % and more within minutes; look at the spread of
  the rounds before believing a second digit.
- **Memory.** `VmHWM` (peak) and `VmRSS` of the actor's process, read when the number of commits
  reaches 2 and 20."""

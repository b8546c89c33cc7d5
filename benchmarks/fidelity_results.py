"""The tables of all groups of `fidelity.py`, summed up: means, and differences on same questions.

I images, F families.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fidelity_groups import Group
from fidelity_online import CARVER as ONLINE

from pipeline.evaluation.findings import MEAN, Sums, describe, join, sum_up
from pipeline.evaluation.means import Estimate, Means, parse_summary
from pipeline.evaluation.results import VARIANT_COLUMNS, read_tables
from pipeline.evaluation.statistics import Bootstrap, intervals, row_spearman
from pipeline.evaluation.variants import BASELINES, FULL, Variant

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that was measured."""

    sums: Sums  # of every variant
    compared: Means  # carvers with one codec, and progressive reads
    others: Means  # codecs, placements, and the online form
    rows: Sequence[dict[str, Any]]  # of both, as `findings` has them
    bootstrap: Bootstrap

    @cached_property
    def places(self) -> dict[Variant, int]:
        """Where each variant is in `sums`."""
        return {Variant(**names): v for v, names in enumerate(self.sums.variants)}

    def difference(self, one: Variant, other: Variant, family: str = MEAN) -> Estimate:
        """Return accuracy less accuracy, paired: of the same questions, image by image."""
        sums_VFI, counts_VFI = self.sums.answers["accuracy"]
        v, w = self.places[one], self.places[other]
        sums_IF = (sums_VFI[v] - sums_VFI[w]).T
        counts_IF = counts_VFI[v].T
        if family == MEAN:
            (found,) = self.bootstrap.family_means(sums_IF[:, :, None], counts_IF[:, :, None])
        else:
            f = list(self.sums.families).index(family)
            (found,) = self.bootstrap.means(sums_IF[:, [f]], counts_IF[:, [f]])
        return Estimate(mean=found.mean, low=_known(found.low), high=_known(found.high))

    def mean(self, variant: Variant, measure: str, family: str = "") -> Estimate:
        """Return one mean of any variant."""
        means = self.compared if variant in self._compared else self.others
        found = means.get(variant, measure, family)
        if found is None:
            raise KeyError(f"{measure} of {variant} was not measured")
        return found

    def correlation(self, variants: Sequence[Variant], information: str) -> Estimate:
        """Return Spearman's correlation of information kept and accuracy lost over variants."""
        rows = [self.places[variant] for variant in variants]
        sums_VI, counts_VI = (part[rows] for part in self.sums.images[information])
        lost_VI, asked_VI = (p[rows].sum(axis=1) for p in self.sums.answers["accuracy_difference"])
        kept_1V = (sums_VI.sum(axis=1) / counts_VI.sum(axis=1))[None]
        lost_1V = -(lost_VI.sum(axis=1) / asked_VI.sum(axis=1))[None]
        samples_R = row_spearman(
            self.bootstrap.ratios(sums_VI.T, counts_VI.T),
            -self.bootstrap.ratios(lost_VI.T, asked_VI.T),
        )
        images = np.array([len(self.sums.keys)])
        (found,) = intervals(row_spearman(kept_1V, lost_1V), samples_R[:, None], images)
        return Estimate(mean=found.mean, low=_known(found.low), high=_known(found.high))

    @cached_property
    def _compared(self) -> set[Variant]:
        return set(self.compared.variants)


def read_results(groups: Sequence[Group], root: Path, *, resamples: int) -> Results:
    """Sum up the tables of all groups."""
    sums = {group.name: sum_up(*read_tables(group.folder(root))) for group in groups}
    carved = [part for name, part in sums.items() if name.startswith(("full", "carver-", "reads-"))]
    stored = [part for name, part in sums.items() if name.startswith(("codecs-", "online"))]
    whole = join([*carved, *stored])
    wanted = [("identity", c) for c in ("fp32", "fp16")]
    compared = _some(
        join(carved),
        lambda v: (
            v["placement"] == "packed"
            and (v["carver"] != FULL or (v["carver"], v["codec"]) in wanted)
        ),
    )
    of_compared = describe(compared, resamples=resamples, seed=SEED)
    others = _some(whole, lambda v: v not in compared.variants)
    of_others = describe(others, resamples=resamples, seed=SEED)
    return Results(
        sums=whole,
        compared=parse_summary(of_compared),
        others=parse_summary(of_others),
        rows=[*of_compared["variants"], *of_others["variants"]],
        bootstrap=Bootstrap(num_images=len(whole.keys), resamples=resamples, seed=SEED),
    )


def write_numbers(results: Results, path: Path) -> None:
    """Write every mean, and every difference to a baseline, as one small table."""
    rows = []
    for row in results.rows:
        named = {name: row[name] for name in (*VARIANT_COLUMNS, "family", "questions")}
        for measure, found in row.items():
            if isinstance(found, dict):
                rows.append({**named, "measure": measure, **_rounded(found)})
    for budget in results.compared.budgets:
        at_budget = results.compared.at_budget(budget)
        for base in (v for v in at_budget if v.carver in BASELINES):
            for variant in (v for v in at_budget if v != base):
                found = results.difference(variant, base)
                named = {**asdict(variant), "family": MEAN, "questions": None}
                measure = f"accuracy_minus_{base.carver}"
                rows.append({**named, "measure": measure, **_rounded(asdict(found))})
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, path, compression="zstd", compression_level=19)


def is_online(variant: Variant) -> bool:
    """Tell the rows of the online form."""
    return variant.carver == ONLINE


def _some(sums: Sums, wanted: Any) -> Sums:  # noqa: ANN401  (a predicate)
    rows = [v for v, names in enumerate(sums.variants) if wanted(names)]
    return Sums(
        keys=sums.keys,
        variants=[sums.variants[v] for v in rows],
        families=sums.families,
        answers={name: (s[rows], c[rows]) for name, (s, c) in sums.answers.items()},
        images={name: (s[rows], c[rows]) for name, (s, c) in sums.images.items()},
    )


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _rounded(found: dict[str, Any]) -> dict[str, float | None]:
    values = {name: found[name] for name in ("mean", "low", "high")}
    return {
        name: None if value is None or not np.isfinite(value) else float(f"{value:.6g}")
        for name, value in values.items()
    }

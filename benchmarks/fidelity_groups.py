"""The parts that `fidelity.py` measures one by one, each with tables of its own on disk.

A group is done when its tables are there and its fingerprint fits: variants, options of carvers and
codecs, weights, questions, and the source of the carvers' own modules. What carvers share is not
in it: after a change there, delete the folder `groups`.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fidelity_online import BUDGETS, CODEC, OnlineShare

from pipeline import carvers, codecs
from pipeline.carvers import Carver
from pipeline.config import PluginConfig
from pipeline.evaluation.results import ResultWriter
from pipeline.evaluation.run import Share
from pipeline.evaluation.task import EvaluationTask
from pipeline.evaluation.variants import FULL, UNCOMPRESSED, Cut, Grid, budget_option, with_budget
from pipeline.types import Placement

CODEC_BUDGET = 2 / 9
"""At which codecs and placements are compared."""

DEFAULT = "carve_default"

PLACEMENTS: tuple[Placement, ...] = ("original", "weighted")
"""Beside `packed`, in which everything else is measured."""

OWN_FORMS = {
    "tokencarve": [
        {"information": information, "attention": attention}
        for information in ("attention_output", "llm_hidden", "features")
        for attention in ("cls_attention", "llm_attention", "received_attention")
        if (information, attention) != ("attention_output", "cls_attention")  # the default
    ],
    "tokencarve_floor": [{"information": "llm_hidden", "attention": "llm_attention"}],
}
"""Options besides the default ones: the question-free forms of TokenCarve."""

CALIBRATED = {"agilepruner": "r_avg", "adaptive": "mean_rank", "doc_correlation": "epsilon"}
"""Carvers with an option that a sample of the corpus sets, and that option."""

_FILE = "group.json"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Variants that are measured together, in one process."""

    name: str  # of its folder
    task: EvaluationTask
    online: bool = False

    @property
    def num_variants(self) -> int:
        """Rows of an image."""
        return OnlineShare.num_variants if self.online else len(self.task.grid.variants)

    def fingerprint(self) -> str:
        """Return a digest of all that decides its numbers."""
        grid = self.task.grid
        parts = [
            self.online,
            [asdict(variant) for variant in grid.variants],
            [dict(cut.carver.describe()) for cut in grid.cuts],
            [repr(codec) for cut in grid.cuts for _, codec in cut.codecs],
            sorted({inspect.getsource(inspect.getmodule(type(cut.carver))) for cut in grid.cuts}),
            dict(self.task.encoder.describe(grid.needs)),
            self.task.config.evaluation.model_dump(mode="json", exclude={"questions"}),
            hashlib.sha256(Path(self.task.config.evaluation.questions).read_bytes()).hexdigest(),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def folder(self, root: Path) -> Path:
        """Return where its tables are."""
        return root / self.name

    def is_done(self, root: Path) -> bool:
        """Tell whether its tables are there, of this very group."""
        path = self.folder(root) / _FILE
        return path.is_file() and json.loads(path.read_text())["fingerprint"] == self.fingerprint()


def cut(carver: Carver, name: str, options: dict[str, Any], budget: float, **how: Any) -> Cut:  # noqa: ANN401
    """Return one carver at one budget; read whole and stored with `CODEC`, or as `how` says."""
    names = how.get("codecs", [CODEC])
    return Cut(
        carver=carver,
        name=name,
        options=json.dumps(options, sort_keys=True),
        budget=budget,
        reads=how.get("reads", (budget,)),
        codecs=[(PluginConfig(name=codec), codecs.build(codec)) for codec in names],
        placements=how.get("placements", ("packed",)),
    )


def full_cuts() -> list[Cut]:
    """Return full tokens by every codec, uncompressed first."""
    others = [name for name in codecs.names() if name != UNCOMPRESSED]
    return [cut(carvers.build(FULL), FULL, {}, 1.0, codecs=[UNCOMPRESSED, *others])]


def carver_cuts(name: str, options: dict[str, Any], calibrated: Sequence[Carver]) -> list[Cut]:
    """Return a carver at every budget.

    Args:
        name: of the carver.
        options: besides the budget and what is calibrated.
        calibrated: of each budget, for a carver that is in `CALIBRATED`; else empty.
    """
    shown = {**options, CALIBRATED[name]: "calibrated"} if calibrated else options
    if name == "doc_correlation":
        pairs = zip(BUDGETS, calibrated, strict=True)
        return [
            cut(
                made,
                name,
                {**shown, "target_ratio": round(budget, 4)},
                1.0,
                placements=_placements(name, options, budget),
            )
            for budget, made in pairs
        ]
    made = calibrated or [with_budget(name, options, budget) for budget in BUDGETS]
    return [
        cut(one, name, shown, b, placements=_placements(name, options, b))
        for one, b in zip(made, BUDGETS, strict=True)
    ]


def _placements(name: str, options: Mapping[str, Any], budget: float) -> Sequence[Placement]:
    """Return all placements for default options at one budget, for the default carver at all."""
    is_compared = not options and (budget == CODEC_BUDGET or name == DEFAULT)
    return ("packed", *PLACEMENTS) if is_compared else ("packed",)


def budget_options(name: str, budget: float) -> dict[str, float]:
    """Return the option that gives a carver its share of the tokens."""
    option = budget_option(name)
    return {("target_ratio" if option is None else option): budget}


def with_cuts(task: EvaluationTask, cuts: Sequence[Cut]) -> EvaluationTask:
    """Return a task that measures these cuts and no others."""
    return replace(task, grid=Grid(cuts=cuts, left_out={}))


def measure(group: Group, root: Path) -> float:
    """Measure a group, write its tables, and return the seconds it took."""
    started = time.monotonic()
    folder = group.folder(root)
    (folder / _FILE).unlink(missing_ok=True)
    share = _share(group)
    with ResultWriter(folder) as writer:
        for tables in share.tables():
            if tables is not None:
                writer.write(*tables)
    if share.rejected:
        raise SystemExit(f"{group.name}: images were left out: {dict(share.rejected)}")
    seconds = time.monotonic() - started
    facts = {"fingerprint": group.fingerprint(), "seconds": round(seconds, 1)}
    (folder / _FILE).write_text(json.dumps(facts) + "\n")
    return seconds


def rehearse(group: Group) -> float:
    """Measure a group on its first batch, and return the seconds that a batch takes."""
    config = group.task.config
    settings = config.evaluation.model_copy(update={"stability_images": 0})
    config = config.model_copy(update={"evaluation": settings})
    share = _share(replace(group, task=replace(group.task, config=config)))
    started = time.monotonic()
    next(iter(share.tables()))
    return time.monotonic() - started


def _share(group: Group) -> Share | OnlineShare:
    torch.set_num_threads(1)
    share = OnlineShare(group.task) if group.online else Share(group.task, device="cpu")
    share.load()
    return share

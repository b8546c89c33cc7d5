"""What is compared: the grid of carver x budget x codec x share that is read."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pipeline import carvers, codecs
from pipeline.carvers import Carver
from pipeline.codecs import Codec
from pipeline.config import PluginConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.types import Placement

BASELINES = ("random", "uniform_grid", "average_pool")
"""Carvers that are compared with in every evaluation."""

FULL = "identity"
"""The carver that keeps every token."""

UNCOMPRESSED = "fp32"
"""The codec that changes no float32 value: full tokens with it are the reference."""

_SHARE_OPTIONS = ("keep_ratio", "mean_ratio")

BUDGET_OPTIONS = frozenset({*_SHARE_OPTIONS, "keep_tokens", "mean_tokens"})
"""Options of carvers that are their budget."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the comparison."""

    carver: str
    carver_options: str  # JSON, sorted; without the budget
    budget: float  # share of the tokens asked for; 1.0 for a carver that takes no budget
    read: float  # share of the tokens read; equals budget unless a prefix is read
    codec: str
    codec_options: str  # JSON, sorted
    placement: str = "packed"  # where the tokens stand, see `types.Placement`


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One carver at one budget, with the ways its result is stored and read."""

    carver: Carver
    name: str
    options: str  # JSON, sorted; without the budget
    budget: float
    reads: Sequence[float]  # the budget itself first, then smaller shares
    codecs: Sequence[tuple[PluginConfig, Codec]]
    placements: Sequence[Placement] = ("packed",)

    def variants(self) -> Iterator[tuple[Variant, Codec]]:
        """Yield all variants, placement after placement within read within codec."""
        for plugin, codec in self.codecs:
            for read in self.reads:
                for placement in self.placements:
                    yield self.variant(plugin, read, placement), codec

    def variant(self, codec: PluginConfig, read: float, placement: Placement) -> Variant:
        """Return the row of one codec, one share that is read and one placement."""
        return Variant(
            carver=self.name,
            carver_options=self.options,
            budget=self.budget,
            read=read,
            codec=codec.name,
            codec_options=_json(codec.options),
            placement=placement,
        )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All cuts of an evaluation; the first is the reference, full tokens uncompressed."""

    cuts: Sequence[Cut]
    left_out: Mapping[str, str]  # carver -> why, where `all` were asked for

    @property
    def needs(self) -> frozenset[str]:
        """Signals that any carver needs."""
        return frozenset().union(*(cut.carver.needs for cut in self.cuts))

    @property
    def variants(self) -> list[Variant]:
        """Every row, the reference first."""
        return [variant for cut in self.cuts for variant, _ in cut.variants()]


def build_grid(settings: EvaluationSettings, yields: frozenset[str]) -> Grid:
    """Build every carver and codec of a grid.

    Args:
        settings: of the evaluation.
        yields: signals that the encoder can give.

    Raises:
        ConfigError: names every carver and codec that cannot be built or served.
    """
    problems: list[str] = []
    stored = _build_codecs(settings.codecs, problems)
    plugins, left_out = _expand(settings.carvers)
    cuts: list[Cut] = []
    for plugin in plugins:
        try:
            found = list(_cuts(plugin, settings, stored))
        except ConfigError as err:
            problems.append(str(err))
            continue
        missing = sorted(found[0].carver.needs - yields) if found else []
        if not missing:
            cuts += found
        elif plugin.name in left_out:
            left_out[plugin.name] = f"needs {', '.join(missing)}"
        else:
            problems.append(
                f"carver {plugin.name!r} needs {', '.join(missing)}, which the encoder cannot give "
                f"(it gives {', '.join(sorted(yields)) or 'nothing'}): change its options or leave "
                "it out"
            )
    if problems:
        raise ConfigError("; ".join(problems))
    return Grid(
        cuts=(_reference(), *cuts), left_out={name: why for name, why in left_out.items() if why}
    )


def with_budget(name: str, options: Mapping[str, Any], budget: float) -> Carver:
    """Build a carver that keeps a share of the tokens.

    Raises:
        ConfigError: unknown name or option, or the options hold a budget.
    """
    option = budget_option(name)
    return carvers.build(name, {**options, **({} if option is None else {option: budget})})


def budget_option(name: str) -> str | None:
    """Return the option of a carver that is its share of tokens; None if it decides by itself.

    Raises:
        ConfigError: there is no such carver.
    """
    known = {f.name for f in fields(carvers.load(name))}
    return next((option for option in _SHARE_OPTIONS if option in known), None)


def tokens_of(share: float, num_tokens: int) -> int:
    """Return how many of an image's tokens a share is, as carvers count: at least 1."""
    return max(1, round(num_tokens * share))


def _expand(plugins: Sequence[PluginConfig]) -> tuple[list[PluginConfig], dict[str, str]]:
    """Return baselines and carvers, each once, and those that came by `all` (may be left out)."""
    asked = [PluginConfig(name=name) for name in (FULL, *BASELINES)]
    by_all: dict[str, str] = {}
    for plugin in plugins:
        if plugin.name != "all":
            asked.append(plugin)
            continue
        named = {p.name for p in plugins} | {p.name for p in asked}
        by_all = {name: "" for name in carvers.names() if name not in named}
        asked += [PluginConfig(name=name) for name in by_all]
    unique = {(p.name, _json(p.options)): p for p in asked}
    return list(unique.values()), by_all


def _cuts(
    plugin: PluginConfig,
    settings: EvaluationSettings,
    stored: Sequence[tuple[PluginConfig, Codec]],
) -> Iterator[Cut]:
    options = _json(plugin.options)
    if given := sorted(plugin.options.keys() & BUDGET_OPTIONS):
        raise ConfigError(f"carver {plugin.name!r}: give {given[0]} by evaluation.budgets")
    has_budget = budget_option(plugin.name) is not None
    if plugin.name == FULL:  # the reference stands beside them
        stored = [(p, codec) for p, codec in stored if p.name != UNCOMPRESSED]
        if not stored:
            return
    for budget in sorted(set(settings.budgets), reverse=True) if has_budget else [1.0]:
        smaller = sorted({read for read in settings.reads if read < budget}, reverse=True)
        yield Cut(
            carver=with_budget(plugin.name, plugin.options, budget),
            name=plugin.name,
            options=options,
            budget=budget,
            reads=(budget, *smaller) if has_budget else (budget,),
            codecs=stored,
            # Full tokens stand where they stand, and count once.
            placements=["packed"] if plugin.name == FULL else settings.placements,
        )


def _reference() -> Cut:
    plugin = PluginConfig(name=UNCOMPRESSED)
    return Cut(
        carver=carvers.build(FULL),
        name=FULL,
        options=_json({}),
        budget=1.0,
        reads=(1.0,),
        codecs=((plugin, codecs.build(UNCOMPRESSED)),),
    )


def _build_codecs(
    plugins: Sequence[PluginConfig], problems: list[str]
) -> list[tuple[PluginConfig, Codec]]:
    built = []
    for plugin in {(p.name, _json(p.options)): p for p in plugins}.values():
        try:
            built.append((plugin, codecs.build(plugin.name, plugin.options)))
        except ConfigError as err:
            problems.append(str(err))
    return built


def _json(options: Mapping[str, Any]) -> str:
    return json.dumps(dict(options), sort_keys=True)

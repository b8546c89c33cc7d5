"""A storm: real runs on a real cluster, hurt while they work, and what must be left after it."""

import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.chaos import inspection, rows
from tests.chaos.corpus import Corpus
from tests.chaos.forge import Process
from tests.chaos.library import HERE
from tests.chaos.plan import Fault, Phase, StormPlan
from tests.chaos.sight import Sight
from tests.chaos.strike import Strike
from tests.chaos.world import RUN_S, World

_EXIT_CODES = {0, 2, 3, 4, 75, -signal.SIGKILL, -signal.SIGTERM}
_ACTORS_PER_RUN = 2


@dataclass(kw_only=True)
class Findings:
    """What a storm was like; goes into the log of storms."""

    seed: int
    store: str
    faults: list[dict[str, Any]] = field(default_factory=list)  # kind, landed, in_flight
    exit_codes: list[int] = field(default_factory=list)  # of the disturbed runs
    num_runs: int = 0
    num_commits: int = 0
    num_attempts: int = 0  # whose files were there at the end
    num_orphans: int = 0  # attempts that no commit names
    num_collected: int = 0  # files, of attempts and others
    num_rows: int = 0
    looks: int = 0  # of the reader beside the storm
    looked_rows: int = 0
    is_compared: bool = False  # with the cache of another run on Ray, undisturbed
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    ended_at: float = 0.0  # Unix time


class Storm:
    """One storm; `run` it once.

    Args:
        plan: what happens.
        world: where.
        compares: carve the last corpus once more, undisturbed into another cache, and compare.
    """

    def __init__(self, plan: StormPlan, world: World, *, compares: bool = False) -> None:
        self.plan, self.world, self.compares = plan, world, compares
        name = f"storm-{plan.store}-{plan.seed}-{time.time_ns():x}"
        self.folder = world.folder / name
        self.folder.mkdir()
        self.corpus = Corpus(world.place(plan.store, f"{name}/in"))
        self.cache = world.place(plan.store, f"{name}/cache")
        self.other = world.place(plan.store, f"{name}/undisturbed")
        self.findings = Findings(seed=plan.seed, store=plan.store)
        self.runs: list[Process] = []

    def run(self) -> Findings:
        """Let it rage, then check what is left.

        Raises:
            AssertionError: with the seed, the plan and the last words of the runs.
        """
        try:
            for shard in self.plan.first:
                self.corpus.put(shard, 0)
            with self._watched():
                with self._timed("rage"):
                    for phase in self.plan.phases:
                        self._rage(phase)
                        self._calm()
                self.corpus.change(self.plan.last_changes)
                with self._timed("last run"):
                    self._finish()
            with self._timed("checks"):
                self._check()
            if self.compares:
                with self._timed("comparison"):
                    self._compare()
        except AssertionError as err:
            self.findings.error = str(err).splitlines()[0]
            raise AssertionError(f"{err}\n{self._story()}") from err
        finally:
            self.findings.ended_at = time.time()
            self.world.proxy.heal()
        return self.findings

    def _rage(self, phase: Phase) -> None:
        """Start the runs of a phase, hurt them, and wait for their end."""
        self.corpus.change(phase.changes)
        todo = inspection.num_to_do(self.corpus, self.cache)
        sight = Sight(self.cache, todo, self.folder / f"gate-{len(self.runs)}")
        settings = {"pause_s": phase.pause_s, "gate": sight.gate}
        runs = [self._start(settings, num_actors=_ACTORS_PER_RUN) for _ in range(phase.num_jobs)]
        late = [fault for fault in phase.faults if fault.after != "start"]
        for fault in phase.faults:
            if fault.after == "start":
                self._strike(fault, sight, runs)
        per_run = min(_ACTORS_PER_RUN, todo)
        sight.let_begin(lambda: per_run * sum(run.is_alive for run in runs))
        for fault in late:
            self._strike(fault, sight, runs)
        for run in runs:
            self.findings.exit_codes.append(run.wait(RUN_S))
            assert run.code in _EXIT_CODES, f"{run.name} ended with {run.code}"
            assert "Traceback" not in run.output, f"{run.name} crashed"

    def _strike(self, fault: Fault, sight: Sight, runs: list[Process]) -> None:
        if fault.after != "start":
            wanted = max(1, round(fault.share * sight.todo))
            while sight.count(fault.after) < wanted and any(run.is_alive for run in runs):
                sight.pause()
        time.sleep(fault.delay_s)
        self.findings.faults.append(Strike(self.world, fault, sight, runs).strike())

    def _start(self, encoder: dict[str, Any], *, num_actors: int = 1, output: str = "") -> Process:
        options = ("--input", self.corpus.folder.url, "--output", output or self.cache.url)
        settings = {f"encoder.options.{name}": value for name, value in encoder.items()}
        settings["runner.num_actors"] = num_actors
        changes = [("--set", f"{name}={value}") for name, value in settings.items()]
        run = self.world.forge.start(
            *(HERE / "carve_script.py", "--config", self.world.library.config, *options),
            *(word for change in changes for word in change),
            environment=self.world.run_environment(self.plan.store),
        )
        self.runs.append(run)
        self.findings.num_runs += 1
        return run

    def _calm(self) -> None:
        """End the faults; actors of killed drivers may still be at work."""
        self.world.proxy.heal()
        self.world.cluster.wait_until_whole()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Read the cache all the time, as its users do, and compare each row with the truth."""
        stop, out = self.folder / "stop", self.folder / "watched.json"
        watcher = self.world.forge.start(
            *(HERE / "look.py", self.cache.url, out, self.world.library.path, stop),
            environment=self.world.reader_environment(self.plan.store),
        )
        try:
            yield
        finally:
            stop.touch()
            code = watcher.wait(RUN_S)
        assert code == 0, f"a reader failed: {watcher.output}"
        report = json.loads(out.read_text())
        assert not report["wrong"], f"a reader saw: {report['wrong'][:3]}"
        self.findings.looks, self.findings.looked_rows = report["looks"], report["images"]

    def _finish(self) -> None:
        """Run undisturbed."""
        run = self._start({})
        assert run.wait(RUN_S) == 0, f"the last run ended with {run.code}"
        num_left = inspection.num_to_do(self.corpus, self.cache)
        assert num_left == 0, f"the last run left {num_left} shards undone"
        # Files may still come from actors of drivers that were killed.
        self.world.cluster.wait_until_idle()

    def _check(self) -> None:
        """Check what is left, collect the garbage, and check again."""
        view = self._look()
        served = set(view["files"])
        found = inspection.contents(self.corpus, self.cache, self.world.library, served)
        inspection.check_view(view, found, self.world.library)
        before, garbage = set(self.cache.list()), inspection.unreferenced(self.cache)
        self._carve("gc", self.cache.url, "--grace", "0")
        after = set(self.cache.list())
        assert after <= before, f"gc made {sorted(after - before)}"
        wrong = sorted(garbage & after), sorted(before - after - garbage)
        assert before - after == garbage, f"gc left {wrong[0]}, and took {wrong[1]}"
        again = inspection.contents(self.corpus, self.cache, self.world.library, served)
        assert again == found, "gc changed the cache"
        num_rows = sum(map(len, found.values()))
        said = self._carve("verify", self.cache.url)
        assert f"{num_rows} rows checked, 0 problems" in said, said
        self._check_nothing_to_do(after)
        self._count(garbage, num_rows)

    def _check_nothing_to_do(self, files: set[str]) -> None:
        run = self._start({})
        assert run.wait(RUN_S) == 0, f"a run with nothing to do ended with {run.code}"
        assert f"nothing to do: all {len(self.corpus.now)} shards" in run.output
        assert set(self.cache.list()) == files, "a run with nothing to do changed the cache"

    def _compare(self) -> None:
        """Compare with a cache that another run made of the same corpus, undisturbed."""
        run = self._start({}, output=self.other.url)
        assert run.wait(RUN_S) == 0, f"the undisturbed run ended with {run.code}"
        theirs, ours = self._look(self.other.url), self._look()
        keys = theirs["images"].keys()
        # Ours may hold more: shards that were removed stay.
        assert {key: ours["images"].get(key) for key in keys} == theirs["images"]
        assert not Counter(theirs["scanned"]) - Counter(ours["scanned"])
        assert len(keys) == len(theirs["scanned"])
        self.findings.is_compared = True

    def _look(self, url: str = "") -> dict[str, Any]:
        seen = self.folder / "seen.json"
        look = self.world.forge.run(
            *(HERE / "look.py", url or self.cache.url, seen),
            environment=self.world.reader_environment(self.plan.store),
        )
        assert look.code == 0, look.output
        return json.loads(seen.read_text())

    def _carve(self, *arguments: str) -> str:
        done = self.world.forge.run(
            *(HERE / "carve_command.py", *arguments),
            environment=self.world.reader_environment(self.plan.store),
        )
        assert done.code == 0, f"carve {' '.join(arguments)} ended with {done.code}: {done.output}"
        return done.output

    def _count(self, garbage: set[str], num_rows: int) -> None:
        commits = rows.records(self.cache)
        files = {file["path"] for record in commits for file in record["files"]}
        self.findings.num_commits = len(commits)
        self.findings.num_orphans = len(inspection.attempts(garbage))
        self.findings.num_attempts = self.findings.num_orphans + len(inspection.attempts(files))
        self.findings.num_collected = len(garbage)
        self.findings.num_rows = num_rows

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.findings.seconds[what] = round(time.monotonic() - started, 2)

    def _story(self) -> str:
        """Return how to see this storm again, and what happened."""
        replay = f"pytest -m chaos tests/chaos --seed {self.plan.seed} -k {self.plan.store}"
        words = [f"--- {run.name} ({run.code})\n{run.output[-3000:]}" for run in self.runs]
        told = [json.dumps(self.plan.to_json()), json.dumps(self.findings.faults)]
        return "\n".join([f"replay: {replay}", *told, *words])

"""What every benchmark shares: interleaved rounds, medians, ratios to a baseline, bars, a table, a JSON file.

A benchmark names its contestants; each is a function that takes one round of measurements. Rounds are interleaved
and start with another contestant each time, so that a slow minute of the machine falls on all of them. A ratio is
the median of the rounds' own ratios: it compares what was measured side by side.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform as machine
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks import plot

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-bench"
INSTALL_S_MAX = 1_800.0

Round = Mapping[str, float]
"""One contestant's measurements in one round, by metric. A metric that does not apply to it is left out."""


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """A measured quantity. `name` has its unit last; `better` is the good direction, `plot` if it is drawn."""

    name: str
    better: Literal["higher", "lower"]
    digits: int = 2
    plot: bool = False


class Contestant(msgspec.Struct, frozen=True, kw_only=True):
    """Something to measure. `run` takes one round; `note` says what it is, for the reader of the table."""

    name: str
    run: Callable[[], Round]
    note: str = ""


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that should be reached. `value` is None if it could not be measured, which falls short."""

    name: str
    value: float | None
    limit: float
    better: Literal["higher", "lower"]

    @property
    def ok(self) -> bool:
        """At least the limit where higher is better, below it where lower is."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.better == "higher" else self.value < self.limit

    def line(self) -> str:
        value = "-" if self.value is None else f"{self.value:.4g}"
        return f"bar {self.name} {value} {self.limit:g} {'ok' if self.ok else 'short'}"


class Results:
    """All rounds of all contestants."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = tuple(metrics)
        self.rounds: dict[str, list[Round]] = {}
        self.notes: dict[str, str] = {}
        self.missing: dict[str, str] = {}

    def values(self, contestant: str, metric: str) -> list[float]:
        """One value a round, in the order of rounds."""
        return [taken[metric] for taken in self.rounds.get(contestant, []) if metric in taken]

    def median(self, contestant: str, metric: str) -> float | None:
        values = self.values(contestant, metric)
        return statistics.median(values) if values else None

    def ratio(self, contestant: str, baseline: str, metric: str) -> float | None:
        """Median over the rounds of contestant / baseline, both taken in the same round."""
        return self._paired(contestant, baseline, metric, lambda mine, base: mine / base if base else None)

    def difference(self, contestant: str, baseline: str, metric: str) -> float | None:
        """Median over the rounds of contestant - baseline, both taken in the same round."""
        return self._paired(contestant, baseline, metric, lambda mine, base: mine - base)

    def _paired(
        self, contestant: str, baseline: str, metric: str, join: Callable[[float, float], float | None]
    ) -> float | None:
        pairs = zip(self.rounds.get(contestant, []), self.rounds.get(baseline, []), strict=False)
        joined = [join(mine[metric], base[metric]) for mine, base in pairs if metric in mine and metric in base]
        known = [value for value in joined if value is not None]
        return statistics.median(known) if known else None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One cell of the table; the JSON file holds them all."""

    contestant: str
    metric: str
    median: float
    ratio: float | None
    rounds: tuple[float, ...]


class BarResult(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    value: float | None
    limit: float
    ok: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file. `missing` has the contestants that could not take part, and why."""

    benchmark: str
    baseline: str
    cpus: int
    python: str
    kernel: str
    arguments: dict[str, str]
    results: tuple[Summary, ...]
    missing: dict[str, str]
    bars: tuple[BarResult, ...]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments that every benchmark has, and `own`: all of them as parsed."""

    rounds: int
    warmups: int
    json: Path | None
    own: argparse.Namespace
    plot: Path | None = None
    lock: Path | None = None


def parser(description: str | None, *, rounds: int = 5, warmups: int = 1) -> argparse.ArgumentParser:
    """An argument parser with the shared options; a benchmark adds its own and calls `options`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--rounds", type=_at_least(1), default=rounds, help="measured rounds of each contestant")
    made.add_argument("--warmups", type=_at_least(0), default=warmups, help="rounds before these, not counted")
    made.add_argument("--json", type=Path, metavar="FILE", default=None, help="write all figures to FILE")
    made.add_argument("--plot", type=Path, metavar="FILE", default=None, help="draw the medians to FILE (SVG)")
    help_lock = "hold this file's lock (flock) during each contestant's turn: who takes it shared then waits"
    made.add_argument("--lock", type=Path, metavar="FILE", default=None, help=help_lock)
    return made


def options(made: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> Options:
    """The parsed arguments. A file that could not be written is refused now, not after the measurement."""
    own = made.parse_args(arguments)
    for name, file in (("--json", own.json), ("--plot", own.plot), ("--lock", own.lock)):
        if file is not None and not file.absolute().parent.is_dir():
            made.error(f"{name}: there is no folder {file.absolute().parent}")
    return Options(rounds=own.rounds, warmups=own.warmups, json=own.json, own=own, plot=own.plot, lock=own.lock)


def part(chosen: Options, name: str) -> Options:
    """The same, with `name` in the names of its files: for a benchmark that publishes several reports."""

    def named(file: Path | None) -> Path | None:
        return None if file is None else file.with_stem(f"{file.stem}-{name}")

    return msgspec.structs.replace(chosen, json=named(chosen.json), plot=named(chosen.plot))


def measure(contestants: Sequence[Contestant], metrics: Sequence[Metric], chosen: Options) -> Results:
    """Runs all rounds, interleaved, saying on stderr how far it is.

    A contestant that raises PeerError is left out, with what it had measured; `missing` says why.
    """
    results = Results(metrics)
    results.notes = {contestant.name: contestant.note for contestant in contestants}
    for number in range(-chosen.warmups, chosen.rounds):
        shift = number % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            if contestant.name in results.missing:
                continue
            label = "warm-up" if number < 0 else f"round {number + 1}/{chosen.rounds}"
            print(f"{label}: {contestant.name}", file=sys.stderr, flush=True)
            try:
                with _locked(chosen.lock):
                    taken = contestant.run()
            except PeerError as error:
                results.missing[contestant.name] = str(error)
                results.rounds.pop(contestant.name, None)
                continue
            if number >= 0:
                results.rounds.setdefault(contestant.name, []).append(taken)
    return results


@contextmanager
def _locked(lock: Path | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def publish(
    benchmark: str,
    results: Results,
    bars: Sequence[Bar],
    chosen: Options,
    *,
    baseline: str,
    missing: Mapping[str, str] | None = None,
) -> Report:
    """Prints the table and the bars, writes the JSON file. Never fails because a bar is short."""
    missing = dict(missing or {}) | results.missing
    report = Report(
        benchmark=benchmark,
        baseline=baseline,
        cpus=os.cpu_count() or 1,
        python=machine.python_version(),
        kernel=machine.release(),
        arguments={name: str(value) for name, value in vars(chosen.own).items() if value is not None},
        results=_summaries(results, baseline),
        missing=missing,
        bars=tuple(BarResult(name=bar.name, value=bar.value, limit=bar.limit, ok=bar.ok) for bar in bars),
    )
    # A pipe has no width of its own; the table must not be folded there.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(_table(benchmark, results, baseline))
    for name, reason in missing.items():
        console.print(f"not measured: {name}: {reason}")
    for bar in bars:
        print(bar.line())
    if chosen.json is not None:
        chosen.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if chosen.plot is not None:
        series = {
            metric.name: {
                name: value for name in results.rounds if (value := results.median(name, metric.name)) is not None
            }
            for metric in results.metrics
            if metric.plot
        }
        chosen.plot.write_text(plot.bars(benchmark, series, mark="snowdrop"))
    return report


def peer_python(name: str, requirements: Sequence[str]) -> Path:
    """The interpreter of a peer's own environment, made or completed on first use.

    Raises PeerError if pip cannot install the requirements: the caller leaves the peer out and says so.
    """
    folder = PEERS / name
    python = folder / "bin" / "python"
    done = folder / "requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    if done.is_file() and done.read_text() == wanted:
        return python
    print(f"making the environment of {name}: {', '.join(requirements)}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    try:
        done_pip = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S_MAX, check=False)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"pip took more than {INSTALL_S_MAX:g} s for {name}") from error
    if done_pip.returncode != 0:
        last = done_pip.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        raise PeerError(f"pip could not install {', '.join(requirements)}: {last[0]}")
    done.write_text(wanted)
    return python


class PeerError(Exception):
    """A peer cannot take part, for the reason given."""


def _summaries(results: Results, baseline: str) -> tuple[Summary, ...]:
    made: list[Summary] = []
    for contestant in results.rounds:
        for metric in results.metrics:
            values = results.values(contestant, metric.name)
            if values:
                made.append(
                    Summary(
                        contestant=contestant,
                        metric=metric.name,
                        median=statistics.median(values),
                        ratio=results.ratio(contestant, baseline, metric.name),
                        rounds=tuple(values),
                    )
                )
    return tuple(made)


def _table(benchmark: str, results: Results, baseline: str) -> Table:
    rounds = max((len(taken) for taken in results.rounds.values()), default=0)
    title = f"{benchmark}: medians of {rounds} interleaved rounds; in brackets the ratio to {baseline}"
    made = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    made.add_column("contestant")
    for metric in results.metrics:
        made.add_column(metric.name, justify="right")
    if any(results.notes.values()):
        made.add_column("what it is", style="dim")
    for contestant in results.rounds:
        cells = [contestant]
        for metric in results.metrics:
            median = results.median(contestant, metric.name)
            ratio = results.ratio(contestant, baseline, metric.name)
            text = "-" if median is None else f"{median:,.{metric.digits}f}"
            cells.append(text if ratio is None else f"{text} ({ratio:.2f})")
        if any(results.notes.values()):
            cells.append(results.notes.get(contestant, ""))
        made.add_row(*cells)
    return made


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
        if value < least:
            raise argparse.ArgumentTypeError(f"at least {least}")
        return value

    return parse

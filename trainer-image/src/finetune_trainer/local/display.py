"""Console output of ``finetune run``: one progress bar per stage on a terminal, plain lines
elsewhere, and the table of test metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Final, Literal, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from finetune_api.evaluation_results import Comparison, DataSetScores
from finetune_api.results import Failure, PreparedSummary, PublishSummary, TrainSummary
from finetune_api.results import Progress as TrainProgress
from finetune_api.tasks import Kinds
from finetune_trainer.failures import TrainerError, exit_code, failure_of, printable
from finetune_trainer.publish.run_facts import by_set, scores_of

_COLOURS: Final = {True: "green", False: "red", None: "dim"}
"""Of a gain that is better, worse or neither."""
_SHORT: Final = {
    "Better": "better", "Worse": "worse", "NotBetter": "no gain", "TooFewSamples": "undecided",
}  # fmt: skip
"""Verdicts, as the table of the terminal has them."""
_STAGES: Final = {
    "prepare": "Prepare", "train": "Train", "evaluate": "Evaluate", "publish": "Publish",
}  # fmt: skip
"""Names of the stages; evaluate is train where nothing is trained."""
_PLAIN_SECONDS: Final = 5.0
"""Seconds between progress lines without a terminal."""


class Display:
    """Console output of one ``finetune run``."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._tasks: dict[str, TaskID] = {}
        self._texts: dict[str, str] = {}
        self._spoken = 0.0
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("[bold]{task.description}", table_column=Column(min_width=7)),
            BarColumn(bar_width=None, table_column=Column(min_width=12, max_width=28, ratio=1)),
            TimeElapsedColumn(table_column=Column(min_width=7, no_wrap=True)),
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, ratio=3)),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def begin(self, stage: str) -> None:
        """Show the start of a stage."""
        self._tasks[stage] = self._bars.add_task(_STAGES[stage], total=None, text="starting")
        if not self.console.is_terminal:
            self.say(f"{_STAGES[stage]} ...")

    def show(self, stage: str, text: str, share: float | None) -> None:
        """Show the progress of a stage; ``share`` is 0 to 1, or None if unknown."""
        total, done = (None, 0.0) if share is None else (1.0, share)
        self._bars.update(self._tasks[stage], total=total, completed=done, text=escape(text))
        if self.console.is_terminal or self._texts.get(stage) == text:
            return
        if time.monotonic() - self._spoken >= _PLAIN_SECONDS:
            self._spoken = time.monotonic()
            self._texts[stage] = text
            self.say(f"  {text}")

    def end(self, stage: str, text: str) -> None:
        """Show the end of a stage."""
        self._bars.update(self._tasks[stage], total=1.0, completed=1.0, text=escape(text))
        if not self.console.is_terminal:
            self.say(f"{_STAGES[stage]}: {text}")

    def failed(self, stage: str, failure: Failure, tail: str, log: str) -> None:
        """Show the failure of a stage, with the tail of its log."""
        self._bars.stop()
        if tail:
            self.console.rule(f"end of {log}", style="dim", characters="-")
            self.console.print(escape(tail), highlight=False, style="dim", soft_wrap=True)
        self.console.print(
            f"[bold red]{_STAGES[stage]} failed:[/] [bold]{failure.failure_class}[/]"
            f" ({escape(failure.reason)})",
            highlight=False,
        )
        self.say(failure.message)
        self.say(f"Log: {log}")

    def scores(self, published: PublishSummary, kinds: Kinds) -> None:
        """Print the table of test metrics, and what they recommend.

        Args:
            kinds: all metrics of the run.
        """
        if not published.scores:
            self.say("No test set: give data.test, or a data.split.test above 0.")
            return
        self.console.print(scores_table("Test metrics", published.scores, kinds))
        if published.recommendation:
            self.say(f"Advice:  {published.recommendation}")
        if published.overfitting:
            self.say(f"Overfit: {published.overfitting}")
        if published.remedy:
            self.say(f"Remedy:  {published.remedy}")
        if published.held:
            self.say(f"Held:    {published.held}")
        elif published.became_current:
            self.say("Current: this is the current model now")

    def labels(self, published: PublishSummary) -> None:
        """Print the hint at suspect labels, if there is one."""
        if published.suspect_labels:
            self.say(f"Labels:  {published.suspect_labels}")

    def time(self, trained: TrainSummary) -> None:
        """Print how the training processes have spent their time."""
        spent = trained.time
        if spent is not None:
            self.say(f"Time:    {duration(spent.total)} of processes: {spent.text}")


def short_verdict(found: Comparison | None) -> str:
    """Return a verdict in one or two words; "" without a comparison."""
    return _SHORT.get(found.verdict, found.verdict) if found else ""


def plain_table(title: str) -> Table:
    """Return an empty table with few lines."""
    return Table(
        title=Text(printable(title), "bold"), title_justify="left", box=SIMPLE_HEAD,
        pad_edge=False, collapse_padding=True,
    )  # fmt: skip


def scores_table(title: str, scores: Sequence[DataSetScores], kinds: Kinds) -> Group:
    """Return a table of the metrics of base and tuned model, 80 columns wide with usual names, and
    a line about the comparisons that more samples would decide. Where nothing was trained: a table
    of the model's metrics."""
    if not any(each.tuned for each in scores):
        return Group(_values_table(title, scores, kinds))
    table = plain_table(f"{title}, gains with their 95 % intervals")
    for name in ("data set", "metric", "base", "tuned", "gain", "verdict"):
        text = name in ("data set", "metric", "verdict")
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    undecided = []
    for name, rows in by_set(scores_of(scores, kinds)):
        for i, row in enumerate(rows):
            gain, colour = row.show(row.gain, signed=True), _COLOURS[row.better]
            interval = f" ({row.interval})" if row.interval else ""
            found = row.comparison
            table.add_row(
                escape(printable(name)) if i == 0 else "", row.metric, row.show(row.base),
                row.show(row.tuned), f"[{colour}]{gain}[/]{interval}",
                short_verdict(found),
            )  # fmt: skip
            if found and found.needed_samples:
                undecided.append(f"{name} {row.metric} {found.needed_samples:,}")
        table.add_section()
    if not undecided:
        return Group(table)
    words = f"Samples that would decide: {', '.join(undecided)}"
    return Group(table, Text(printable(words), "dim"))


def _values_table(title: str, scores: Iterable[DataSetScores], kinds: Kinds) -> Table:
    table = plain_table(title)
    for name in ("data set", "samples", "metric", "value"):
        justify: Literal["left", "right"] = "right" if name in ("samples", "value") else "left"
        table.add_column(name, justify=justify, overflow="fold")
    for name, rows in by_set(scores_of(scores, kinds)):
        for i, row in enumerate(rows):
            first = (escape(printable(name)), f"{row.samples:,}") if i == 0 else ("", "")
            table.add_row(*first, row.metric, row.show(row.value))
        table.add_section()
    return table


def show_error(console: Console, error: TrainerError) -> int:
    """Print an error outside of a stage, and return its exit code."""
    failure = failure_of(error)
    console.print(f"[bold red]{failure.failure_class}[/] ({failure.reason})", highlight=False)
    console.print(error.message, markup=False, highlight=False, soft_wrap=True)
    return int(exit_code(failure))


def prepared_text(summary: PreparedSummary) -> str:
    counts = f"{summary.train_samples:,}/{summary.validation_samples:,}/{summary.test_samples:,}"
    counts += " train/validation/test samples"
    work = "training"
    if not summary.total_steps:
        counts = f"{summary.test_samples:,}/{summary.retention_samples:,} test/retention samples"
        work = "evaluation"
    reused = ", prepared before" if summary.reused else ""
    memory = ""
    if summary.memory is not None:
        memory = f", {work} takes about {summary.memory.needed / (1 << 30):,.1f} GiB a process"
        if summary.memory.warning:
            memory += f". {summary.memory.warning}"
    return f"{counts}{reused}{memory}"


def reading_text(records: int) -> str:
    return f"{records:,} records read"


def training_text(progress: TrainProgress) -> str:
    """Return stage, step, loss, speed and the expected time left as text."""
    if progress.stage != "Training" and not (progress.stage == "Evaluating" and progress.step):
        return progress.stage.lower()
    parts = [f"step {progress.step:,}/{progress.total_steps:,}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.remaining_seconds is not None:
        parts.append(f"{duration(progress.remaining_seconds)} left")
    return ", ".join(parts)


def trained_text(summary: TrainSummary) -> str:
    if not summary.steps:
        count = len(summary.scores)
        return f"{count} {'set' if count == 1 else 'sets'}, {duration(summary.training_seconds)}"
    early = ", stopped early" if summary.stopped_early else ""
    loss = f", loss {summary.loss:.4f}" if summary.loss is not None else ""
    restarts = f", {summary.restarts} restarts" if summary.restarts else ""
    start = f", first after {duration(summary.startup.total)}" if summary.startup else ""
    return f"{summary.steps:,} steps{start}{loss}{early}{restarts}"


def published_text(summary: PublishSummary) -> str:
    return f"{' and '.join(summary.formats) or 'results'}, {summary.bytes / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Format seconds as ``1h02m``, ``2m10s`` or ``59s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"

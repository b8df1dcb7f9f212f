"""``finetune run``: run all stages of a job.

manifest → storage → which run → run-spec.json → prepare → train → publish → table
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console

from finetune_api.base import InvalidSpec
from finetune_api.names import ExitCode
from finetune_api.results import PublishSummary, Termination, TrainSummary
from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec
from finetune_trainer.failures import TrainerError, exit_code
from finetune_trainer.local import display as face
from finetune_trainer.local import stages
from finetune_trainer.local.base_reference import find_tuned
from finetune_trainer.local.layout import count_gpus, lay_out
from finetune_trainer.local.manifest import LocalJob, read_manifest, with_paths
from finetune_trainer.local.read_progress import read_progress
from finetune_trainer.local.state import StateFolder, changed, choose_run
from finetune_trainer.local.storage import Where, copy_published, storage_for
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.threads import count_cores

MANIFEST_FAULT: Final = 2
"""Exit code of a manifest that is refused before any stage runs."""
HELD: Final = 3
"""Exit code of a run that is complete, but missed its gates."""
_POLL_SECONDS: Final = 0.2
_TAIL_LINES: Final = 15


class StageFailed(Exception):
    """A stage failed; the failure has been shown."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def run_manifest(
    manifest: Path, state_dir: Path, *, endpoint: str | None = None, local_storage: bool = False
) -> int:
    """Run a FineTuneJob on this machine and return the exit code: 0, 2 for a refused manifest, else
    that of the failure (``names.ExitCode``).

    Args:
        endpoint: S3 server to use; overrides the manifest's.
        local_storage: use the embedded S3 server, even if manifest or environment name another.
    """
    try:
        job = read_manifest(manifest)
    except InvalidSpec as error:
        for line in error.problems:
            Console().print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        return MANIFEST_FAULT
    again = f"finetune run {manifest}"
    return run_job(job, state_dir, again, endpoint=endpoint, local_storage=local_storage).code


@dataclass(frozen=True)
class RunDone:
    """How a run on this machine has ended."""

    code: int
    """Exit code."""
    output_uri: str = ""
    """Where it publishes; empty if it did not begin."""


def run_job(
    job: LocalJob, state_dir: Path, again: str, *, endpoint: str | None, local_storage: bool
) -> RunDone:
    """Run a job on this machine; arguments as in ``run_manifest``.

    Args:
        again: command that continues the run.
    """
    console, state, uri = Console(), StateFolder(state_dir), ""
    try:
        with storage_for(job.spec, state, endpoint, local_storage) as where:
            runner = Runner(job, state, where, console)
            uri = runner.output_uri
            return RunDone(runner.run(again), uri)
    except TrainerError as error:
        return RunDone(face.show_error(console, error), uri)
    except KeyboardInterrupt:
        return RunDone(int(ExitCode.INTERRUPTED), uri)


class Runner:
    """Runs the stages of one run of a job."""

    def __init__(self, job: LocalJob, state: StateFolder, where: Where, console: Console) -> None:
        self._job = job
        self._state = state
        self._where = where
        self._console = console
        known, run, self._goes_on = choose_run(state.read(job.name), job)
        base = known.runs[-1].base or find_tuned(state, job.namespace, where)
        known = changed(known, base=base)
        state.write(job.name, known)
        self._known = known
        compute = where.spec.compute
        self._layout = lay_out(compute, count_gpus(), count_cores())
        here = compute.model_copy(update={"context_parallel": self._layout.context_parallel})
        self._run_spec = RunSpec(
            version=CONTRACT_VERSION,
            job=JobIdentity(namespace=job.namespace, name=job.name, uid=known.uid),
            run=run,
            spec=where.spec.model_copy(update={"compute": here}),
            base=base,
        )
        self._folder = state.run_folder(job.name, run)
        self._stops = 0
        """Stop signals received."""

    @property
    def output_uri(self) -> str:
        """Where the run publishes."""
        return self._run_spec.output_uri

    def run(self, again: str) -> int:
        """Run all stages, show the results, and return the exit code.

        Args:
            again: command that continues the run.
        """
        paths = self._stage_paths()
        with face.Display(self._console) as display, self._stoppable():
            begun = "continues" if self._goes_on else "begins"
            display.say(
                f"Run {self._run_spec.run} of {self._job.name} {begun}; files: {self._folder}"
            )
            for note in self._layout.notes:
                display.say(f"Note: {note}.")
            try:
                trained, published = self._stages(paths, display)
            except StageFailed as failed:
                if self._stops:
                    display.say(f"Stopped. To continue: {again}")
                return failed.code
        self._note_complete(published)
        shutil.rmtree(self._folder / "scratch", ignore_errors=True)
        shown = face.Display(self._console)
        shown.scores(published, self._job.spec.evaluation.kinds)
        shown.labels(published)
        shown.time(trained)
        self._tell_results(published)
        return HELD if published.held else int(ExitCode.OK)

    def _stages(
        self, paths: stages.StagePaths, display: face.Display
    ) -> tuple[TrainSummary, PublishSummary]:
        prepare = stages.single_process_stage(paths, "prepare")

        def reading() -> tuple[str, float | None]:
            found = read_progress(prepare.processes[0].scratch)
            if found is None:
                return "checking access", None
            records, share = found
            return face.reading_text(records), share

        said = self._watch("prepare", prepare, reading, display)
        assert said.prepared is not None
        display.end("prepare", face.prepared_text(said.prepared))

        stage, port = stages.training_stage(
            paths, self._layout, self._run_spec.spec.failure_policy.max_restarts
        )

        def training() -> tuple[str, float | None]:
            found = stages.read_progress(port, self._run_spec.run)
            if found is None:
                return "starting", None
            share = found.step / found.total_steps if found.total_steps else None
            return face.training_text(found), share

        trains = self._run_spec.spec.method.kind.trains
        name = "train" if trains else "evaluate"
        trained = self._watch(name, stage, training, display).trained
        assert trained is not None
        display.end(name, face.trained_text(trained))

        publish = stages.single_process_stage(paths, "publish")
        text = "writing the model" if trains else "writing the results"
        said = self._watch("publish", publish, lambda: (text, None), display)
        assert said.published is not None
        display.end("publish", face.published_text(said.published))
        return trained, said.published

    def _watch(
        self,
        name: str,
        stage: stages.Stage,
        look: Callable[[], tuple[str, float | None]],
        display: face.Display,
    ) -> Termination:
        """Run a stage to its end and return the termination message of its first process.

        Raises:
            StageFailed: the stage failed; the failure has been shown.
        """
        if self._stops:
            raise StageFailed(int(ExitCode.INTERRUPTED))
        display.begin(name)
        handled = 0
        try:
            stage.start()
            while not stage.step():
                if self._stops > handled:
                    handled = self._stops
                    self._stop(stage, display)
                display.show(name, *look())
                time.sleep(_POLL_SECONDS)
        finally:
            stage.stop(signal.SIGKILL)
            for process in stage.processes:
                process.wait()
        failed = stage.failed()
        if failed is None:
            said = stage.processes[0].said()
            assert said is not None
            return said
        process, failure = failed
        message = with_paths(failure.message, self._job.claims)
        failure = failure.model_copy(update={"message": message})
        if self._stops and failure.failure_class == "Preempted":
            display.show(name, failure.message, None)
            display.say(failure.message)
        else:
            tail = "\n".join(process.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
            display.failed(name, failure, tail, str(process.log))
        raise StageFailed(int(exit_code(failure)))

    def _stop(self, stage: stages.Stage, display: face.Display) -> None:
        """First signal: save and stop. Second signal: kill."""
        if self._stops > 1:
            stage.stop(signal.SIGKILL)
            return
        display.say("Stopping once the state is saved; Ctrl-C again stops immediately.")
        stage.stop()

    def _stage_paths(self) -> stages.StagePaths:
        """Create the run's folder, run-spec.json and claim links; return what every stage needs."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "run-spec.json").write_text(self._run_spec.to_text())
        self._state.link_claims(self._job.claims)
        keys = self._where.environment(self._run_spec)
        return stages.StagePaths(self._folder, self._state.claims, keys, count_cores())

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Count SIGINT and SIGTERM as stop requests while the context lasts."""

        def told(number: int, frame: FrameType | None) -> None:
            self._stops += 1

        before = {n: signal.signal(n, told) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_complete(self, published: PublishSummary) -> None:
        """Record what jobs that refer to this one need: manifest digest and storage."""
        embedded = self._where.embedded is not None
        endpoint = None if embedded else self._where.spec.storage.endpoint
        done = changed(
            self._known,
            complete=True, digest=published.digest, held=published.held,
            embedded=embedded, endpoint=endpoint,
        )  # fmt: skip
        self._state.write(self._job.name, done)

    def _tell_results(self, published: PublishSummary) -> None:
        """Show the addresses of the results. Copy the model out of the embedded storage to plain
        files, since that server ends with this command."""
        store = self._store()
        report = self._folder / "report.html"
        store.download(f"{published.uri}/report.html", report)
        say = face.Display(self._console).say
        say(f"{'Model:  ' if published.formats else 'Results:'} {published.uri}")
        if self._where.embedded is not None:
            folder = self._state.model_folder(self._job.name, self._run_spec.run)
            copy_published(store, published.uri, folder)
            say(f"Copy:    {folder}")
            report = folder / "report.html"
        say(f"Report:  {report}")

    def _store(self) -> ObjectStore:
        return Stores(self._run_spec, self._where.environment(self._run_spec)).default

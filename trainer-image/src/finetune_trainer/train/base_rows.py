"""The base model's rows: found in the workspace if another run has measured the same, else measured
and left there.

    what a row asks ──► key (``base_row_key``) ──► base-rows/<key>.json ──► answers/<row>.json

Not shared: rows of a classifier, whose base has a head that is drawn by the run's seed; and rows of
a run whose personal data is redacted, since answers are masked only where they are published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from finetune_api.evaluation_results import Row
from finetune_trainer.evaluate.base_row_key import (
    AskedSet,
    computation_of,
    model_digest,
    row_key,
)
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.base_rows import read_shared_row, write_shared_row
from finetune_trainer.storage.runfiles import RowAnswers, SetAnswers
from finetune_trainer.train.session import MeasuringSession

Complete = Callable[[Sequence[SetAnswers]], list[SetAnswers]]


class BaseRows:
    """The base model's rows of a run."""

    def __init__(self, session: MeasuringSession) -> None:
        self._session = session
        spec = session.spec
        self._shares = spec.kind.generates and spec.data.quality.personal_data != "Redact"

    def row(
        self,
        row: Row,
        asked: Callable[[], Sequence[AskedSet]],
        measure: Callable[[], RowAnswers],
        complete: Complete = list,
    ) -> RowAnswers:
        """Return a row, which is among the run's answers then; on all ranks alike.

        Args:
            asked: returns what the row asks; called on rank 0.
            measure: measures the row on all ranks, and writes it to the run's answers.
            complete: adds metrics to the answers of another run; called on rank 0.
        """
        if not self._shares:
            return measure()
        session = self._session
        store, workspace = session.stores.default, session.spec.effective_workspace
        key, found = session.world.on_main(lambda: self._find(row, asked(), complete))
        if found is not None:
            return found
        answers = measure()
        run = f"{session.run_spec.job.name} {session.run_spec.run}"
        session.world.on_main(lambda: write_shared_row(store, workspace, key, run, answers))
        return answers

    def _find(
        self, row: Row, asked: Sequence[AskedSet], complete: Complete
    ) -> tuple[str, RowAnswers | None]:
        session, store = self._session, self._session.stores.default
        key = row_key(self._model, computation_of(session.spec, session.evaluator), asked)
        found = read_shared_row(store, session.spec.effective_workspace, key)
        if found is None:
            return key, None
        print(f"row {row.key}: as run {found.run} has measured it", flush=True)
        sets = complete(found.answers.sets)
        update = {"row": row, "sets": sets, "measured_by": found.run}
        answers = found.answers.model_copy(update=update)
        runfiles.write_row(store, session.run_spec.run_uri, answers)
        return key, answers

    @cached_property
    def _model(self) -> str:
        return model_digest(self._session.base_files)

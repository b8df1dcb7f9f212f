"""From sources to shards in one pass, batch by batch: memory does not grow with the data.

records → drafts ─(personal data, duplicates)→ split ─→ tokens ─(overlength)→ shards
       → index, without what shares text with held-out samples

Everything is counted on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from finetune_api.sources import Data
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.deduplicate import Deduplicator
from finetune_trainer.prepare.digest import Source
from finetune_trainer.prepare.faults import Faults
from finetune_trainer.prepare.heldout import compare
from finetune_trainer.prepare.output import Output
from finetune_trainer.prepare.overlength import fit
from finetune_trainer.prepare.personal import inspect
from finetune_trainer.prepare.reader import Reader, Say
from finetune_trainer.prepare.report import SourceReport
from finetune_trainer.prepare.tokens import Model
from finetune_trainer.prepared.manifest import DataManifest

log = logging.getLogger(__name__)


def write_samples(
    data: Data, sources: Sequence[Source], model: Model, output: Output, say: Say
) -> DataManifest:
    """Write the prepared data of all sources; the manifest last.

    Raises:
        DataError: naming the record that cannot be used; 'EmptyDataSet' naming the set;
            'TooManyDuplicates', 'Contaminated'.
        UserError: where the model's tokenizer fits neither the model nor the data.
    """
    reader = Reader(sources, say)
    duplicates = Deduplicator(data.quality)
    for source in sources:
        _write_source(source, data, model, reader, duplicates, output)
    duplicates.check()
    if not output.samples("train"):
        raise _empty("train", _where_training_went(output))
    compare(output, data.quality.contamination, model.tokenizer.decode)
    return output.finish(model.max_length, data.quality)


def _write_source(
    source: Source,
    data: Data,
    model: Model,
    reader: Reader,
    duplicates: Deduplicator,
    output: Output,
) -> None:
    quality = data.quality
    faults = Faults(quality.faulty_records)
    form, batches = reader.open(source, data, model, faults)
    report = output.begin(source, form, faults)
    for batch in batches:
        report.records += batch.records
        report.languages.look(batch.drafts)
        drafts = [
            inspect(draft, quality.personal_data, own_group=data.split.group_by is None)
            for draft in batch.drafts
        ]
        if source.side == "train":
            drafts = duplicates.fresh(drafts, report)
        for sample in model.tokens.samples(drafts, faults.take):
            fitted, cut = fit(sample, model.max_length, quality.overlength, model.tokens.bos_id)
            report.cuts[cut] += 1
            if fitted is not None:
                output.add(fitted, sample.draft.side, stops=cut != "Completion")
    _tell_personal(report, quality.personal_data)
    if source.side != "train" and not report.sides:
        why = ", ".join(f"{cause} {n}" for cause, n in report.dropped.items() if n)
        raise _empty(source.name, f"all {report.records} records were left out ({why})")


def _tell_personal(report: SourceReport, policy: str) -> None:
    for side, found in report.sides.items():
        if found.personal and policy == "Warn":
            counts = ", ".join(f"{kind} {n.occurrences}" for kind, n in found.personal.items())
            log.warning(
                "data set %s holds personal data (%s: %s; first at %s), see its report",
                report.name, side, counts, next(iter(found.personal.values())).places[0],
            )  # fmt: skip


def _empty(name: str, why: str) -> DataError:
    return DataError("EmptyDataSet", f"data set {name!r} is empty: {why}; correct data or spec")


def _where_training_went(output: Output) -> str:
    held = output.samples("validation") + output.samples("test")
    dropped = ", ".join(f"{cause} {n}" for cause, n in output.dropped().items() if n)
    return f"no record is left to train on (held out: {held}; left out: {dropped or 'none'})"

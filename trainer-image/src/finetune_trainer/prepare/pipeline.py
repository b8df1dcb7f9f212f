"""The prepare stage from start to end. It finds errors of spec, model and data without a GPU.

access → tokenizer → method on the placeholder model → sources → digest
       → (reuse, or: input splits → map → reduce → manifest) → questions → memory → prepared.json

One process with a pool does all of it. With ``prepare.workers`` above 1, that many pods run the
steps up to the map, each with a share of the input splits, and another pod runs the reduce.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from finetune_api.identity import data_uri
from finetune_api.results import MemoryEstimate, PreparedSummary
from finetune_api.run_spec import RunSpec
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.adaptersum import check_sum
from finetune_trainer.engine.base import fetch_base
from finetune_trainer.engine.memory.alternatives import Measure
from finetune_trainer.engine.memory.fitting import (
    check_min_nodes,
    fit,
    memory_estimate,
    others,
)
from finetune_trainer.engine.memory.formatting import table
from finetune_trainer.engine.memory.profile_cache import ProfileCache
from finetune_trainer.engine.memory.requirements import check_image
from finetune_trainer.engine.planning.micro_batch_size import samples_of
from finetune_trainer.engine.planning.schedule import replay_of, stage_plans, stages_of, steps_of
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.evaluate.metric_selection import check_metrics
from finetune_trainer.evaluate.remedy_check import check_remedy
from finetune_trainer.evaluate.slices import check_slices
from finetune_trainer.failures import DataError, UserError, object_changed
from finetune_trainer.prepare.custom_metric_check import check_custom_metrics
from finetune_trainer.prepare.data_curve_check import check_data_curve
from finetune_trainer.prepare.digest import content_digest
from finetune_trainer.prepare.gate_check import check_gates
from finetune_trainer.prepare.instruction_check import check_instructions
from finetune_trainer.prepare.mapping.batch import Recipe, begin
from finetune_trainer.prepare.mapping.map import RunPaths, map_splits
from finetune_trainer.prepare.mapping.pool import Pool, count_processes
from finetune_trainer.prepare.mapping.progress import ProgressCallback, ReadProgress
from finetune_trainer.prepare.mapping.reader import Reader
from finetune_trainer.prepare.questions.questions import make_questions
from finetune_trainer.prepare.reading.inputsplits import InputSplit, deal, divide
from finetune_trainer.prepare.reading.sources import Source, changed, resolve
from finetune_trainer.prepare.reducing.reduce import reduce_splits
from finetune_trainer.prepare.task_formats import RENDERINGS
from finetune_trainer.prepare.tokenizing.tokens import Model
from finetune_trainer.prepare.untrained_check import check_measured, head_of
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.manifest import DataManifest, is_complete, read_manifest
from finetune_trainer.prepared.questions import write_questions
from finetune_trainer.prepared.split import SIDES
from finetune_trainer.storage import modelfiles, runfiles
from finetune_trainer.storage.current import CurrentPointer
from finetune_trainer.storage.modelconfig import load_config, load_tokenizer
from finetune_trainer.storage.objects import ObjectStore, Stores, check_conditions, file_info

log = logging.getLogger(__name__)


Step = Literal["All", "Map", "Reduce"]
"""Step that a process runs: All, or Map or Reduce where ``prepare.workers`` is above 1."""


class LogProgress:
    """Logs the read progress at every 5 % of the bytes."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, progress: ReadProgress) -> None:
        percent = 100 * progress.bytes // max(1, progress.total_bytes)
        if percent >= self._next:
            log.info("%s: %d records, %d %% of all data", progress.set, progress.records, percent)
            self._next = percent + 5


def prepare(
    run_spec: RunSpec,
    stores: Stores,
    scratch: Path,
    say: ProgressCallback | None = None,
    *,
    step: Step = "All",
    worker: int = 0,
    processes: int | None = None,
) -> PreparedSummary | None:
    """Prepare the data of a run, or reuse prepared data, and write the run's ``prepared.json``.

    Args:
        scratch: folder for temporary files.
        say: progress callback, called every few hundred records. Default: log the progress.
        step: the step to run.
        worker: index of this pod among ``prepare.workers``, for the map.
        processes: size of the pool. Default: one process per core.

    Returns:
        The summary; None for step Map.

    Raises:
        UserError, DataError, StorageDenied, StorageUnavailable: with the remedy.
        HostOutOfMemory, NodeFailure: a process of the pool was killed.
    """
    spec = run_spec.spec
    check_image(spec)
    check_access(spec, stores.default)
    base = fetch_base(run_spec, stores, scratch, weights=False)
    check_sum(run_spec, base)
    model = load_model(run_spec, base.folder)
    profiles = ProfileCache(base.folder, model.max_length)
    profiles(spec)
    sources = find_sources(spec, stores)
    files = modelfiles.tokenizer_files(base.folder)
    tokenizer = {file.name: file_info(file).sha256 for file in files}

    digest = content_digest(
        spec.data, sources, tokenizer, model.max_length, spec.task, spec.evaluation.slices,
        model.head,
    )  # fmt: skip
    uri = data_uri(spec.effective_workspace, digest)
    manifest = read_manifest(stores.default, uri)
    reused = manifest is not None and is_complete(stores.default, uri, manifest)
    if manifest is None or not reused:
        folder = f"{run_spec.run_uri}/splits/{digest}"
        paths = RunPaths(stores.default, uri, digest, folder, scratch / "prepared")
        work = Work(spec, sources, model, paths, stores)
        manifest = write_data(work, step, worker, processes, say or LogProgress())
    if manifest is None or step == "Map":
        return None
    check_measured(spec, manifest)
    check_metrics(spec, manifest.sets)
    data = PreparedData(stores.default, uri, scratch / "data", manifest)
    if spec.evaluation.slices:
        check_slices(spec.evaluation.slices, data.slices())
    questions = make_questions(spec, data, model, stores)
    check_gates(spec, manifest, questions)
    check_instructions(spec, data)
    check_custom_metrics(spec, data)
    check_remedy(spec, data)
    check_data_curve(spec, data)
    if spec.output.current is not None:
        CurrentPointer(stores.default, spec.output.destination).read()
    write_questions(stores.default, run_spec.run_uri, questions)
    memory = estimate_memory(spec, data, profiles)
    runfiles.write_memory_profiles(stores.default, run_spec.run_uri, profiles.to_json())
    summary = summarise(spec, manifest, uri, reused).model_copy(update={"memory": memory})
    runfiles.write_prepared(stores.default, run_spec.run_uri, summary)
    return summary


class Work(NamedTuple):
    """Inputs of ``write_data``."""

    spec: FineTuneJobSpec
    sources: Sequence[Source]
    model: Model
    paths: RunPaths
    stores: Stores


def write_data(
    work: Work, step: Step, worker: int, processes: int | None, say: ProgressCallback
) -> DataManifest | None:
    """Map and reduce the data, or run one of the two steps.

    Returns:
        The manifest, written last; None for step Map.

    Raises:
        Errors of ``map_splits`` and ``reduce_splits``; DataError: 'ObjectChanged', 'UnknownLabel',
            'TooFewClasses'.
    """
    spec, sources, model, paths, stores = work
    data, results = spec.data, paths.results
    paths.scratch.mkdir(parents=True, exist_ok=True)
    splits = divide(sources)
    mine = share(sources, splits, spec.prepare.workers, worker) if step == "Map" else splits
    log.info("%s: %d of %d input splits", step.lower(), len(mine), len(splits))
    if step == "Reduce" and results.empty():
        raise object_changed(", ".join(source.spec.source for source in sources))
    size = sum(split.bytes for split in mine)
    slices = spec.evaluation.slices
    recipe = Recipe(data, [replace(source, objects=()) for source in sources], model, slices)
    with Pool(processes or count_processes(size), begin, recipe) as pool:
        try:
            reader = Reader(sources, mine, model.task, data.quality.faulty_records)
            # For step Reduce all splits are done already, unless shards were deleted since.
            map_splits(data, sources, mine, reader, pool, paths, say)
            if step == "Map":
                check_unchanged(sources, stores, may_grow=False)
                return None
            output = reduce_splits(
                data, sources, splits, pool, paths, model.tokenizer.decode, slices
            )
            check_unchanged(sources, stores, may_grow=step == "All")
            classes_of = RENDERINGS[model.task].classes
            manifest = output.finish(
                model.max_length, data.quality, lambda found: classes_of(found, model.head)
            )
        except DataError:
            if step != "Map":
                results.remove()
            raise
    results.remove()
    return manifest


def share(
    sources: Sequence[Source], splits: Sequence[InputSplit], pods: int, pod: int
) -> list[InputSplit]:
    """Input splits that one pod maps: its share of the training sources, all of the held-out."""
    training = [split for split in splits if sources[split.source].side == "train"]
    held_out = [split for split in splits if sources[split.source].side != "train"]
    return held_out + deal(training, pods)[pod]


def check_access(spec: FineTuneJobSpec, store: ObjectStore) -> None:
    """Check that workspace and output can be written, and that the store honours conditional
    writes.

    Raises:
        StorageDenied, StorageUnavailable: a write failed.
        UserError: 'StoreIgnoresConditions'.
    """
    check_conditions(store, spec.effective_workspace)
    probe = f"{spec.output.destination.rstrip('/')}/.write-probe"
    store.put(probe, b"")
    store.delete([probe])


def load_model(run_spec: RunSpec, folder: Path) -> Model:
    """Load the tokenizer and the limits of the base model from a folder.

    Raises:
        UserError: 'UnsupportedModel', 'UnsupportedTokenizer', 'MaxLengthTooLong'.
    """
    spec, source = run_spec.spec, run_spec.base_model.source
    limits = modelfiles.read_limits(folder, source)
    task = TASKS[spec.task]
    if not task.fits(config := load_config(folder)):
        raise UserError(
            "UnsupportedModel",
            f"spec.model: {source} is of type {config.model_type}, which cannot be"
            f" {task.called}, as spec.task {spec.task} needs; choose another model",
        )
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as error:  # of the classes of hundreds of architectures, and of Rust
        raise UserError(
            "UnsupportedTokenizer",
            f"{source}: transformers cannot load its tokenizer: {modelfiles.first_line(error)}; a"
            " model folder needs tokenizer.json and tokenizer_config.json",
        ) from None
    tokens = RENDERINGS[spec.task].tokens(tokenizer, source, limits.vocabulary)
    bounds = [bound for bound in (limits.max_length, tokens.longest) if bound is not None]
    bound = min(bounds, default=None)
    return Model(
        source=source,
        tokenizer=tokenizer,
        tokens=tokens,
        task=spec.task,
        max_length=max_length_of(spec, bound),
        positions=None if bound is None else bound - spec.method.virtual_tokens,
        head=() if spec.method.kind.trains else head_of(run_spec, config),
    )


def max_length_of(spec: FineTuneJobSpec, model_maximum: int | None) -> int:
    """Return the maximum tokens of a sample: the spec's value, or its default limited by the
    model's positions. Virtual tokens take positions of the model too.

    Raises:
        UserError: 'MaxLengthTooLong', the spec's value exceeds the model's positions.
    """
    virtual = spec.method.virtual_tokens
    wanted = spec.training.max_length
    if model_maximum is None:
        return spec.training.longest
    room = model_maximum - virtual
    if room < 1 or (wanted is not None and wanted > room):
        taken = f", less {virtual} of spec.method.prompt.virtualTokens" if virtual else ""
        raise UserError(
            "MaxLengthTooLong",
            f"spec.training.maxLength: {wanted or 1} is more than the {model_maximum} positions of"
            f" the base model (max_position_embeddings){taken}; lower it",
        )
    return min(room, spec.training.longest)


def find_sources(spec: FineTuneJobSpec, stores: Stores) -> list[Source]:
    """Return every data source of the spec with its objects, in the order of the lists.

    Raises:
        UserError: 'NoObjects'; 'DuplicateName', a given name equals another set's default name.
    """
    data = spec.data
    found = []
    tested = set(data.names("test") if data.test else data.names("train"))
    for name in data.names("retention"):
        if name in tested:
            raise UserError(
                "DuplicateName",
                f"spec.data.retention: {name!r} is also the name of a test set (without data.test,"
                " each training set has a test set of its name); give the retention set another",
            )
    for side in SIDES:
        names = data.names(side)
        for name, source in zip(names, getattr(data, side) or (), strict=True):
            if names.count(name) > 1:
                raise UserError(
                    "DuplicateName",
                    f"spec.data.{side}: {name!r} is the name of one set and the default name of"
                    " another; name both",
                )
            objects = resolve(source.source, stores.of(source.storage))
            found.append(Source(side, name, source, objects))
    return found


def check_unchanged(sources: Sequence[Source], stores: Stores, may_grow: bool) -> None:
    """Check that the objects of the sources have not changed.

    Args:
        may_grow: whether new objects are allowed (and ignored). Not with several workers, which
            must all find the same objects.

    Raises:
        DataError: 'ObjectChanged', with the first object that changed.
    """
    for source in sources:
        try:
            now = resolve(source.spec.source, stores.of(source.spec.storage))
        except UserError:  # no object is left
            now = []
        if (uri := changed(source.objects, now, may_grow)) is not None:
            raise object_changed(uri)


def estimate_memory(spec: FineTuneJobSpec, data: PreparedData, measure: Measure) -> MemoryEstimate:
    """Estimate and log the memory that training (or evaluation alone) takes per process.

    Raises:
        UserError: 'DoesNotFit', the memory of a process in the manifest is certainly too small.
    """
    samples = samples_of(spec, data)
    available = spec.compute.process_memory
    found = fit(spec, samples, available, measure)
    check_min_nodes(spec, samples, available, measure)
    level = logging.WARNING if found.warning else logging.INFO
    log.log(level, "%s", table(found, others(spec, samples, found, measure)))
    return memory_estimate(found)


def summarise(
    spec: FineTuneJobSpec, manifest: DataManifest, uri: str, reused: bool
) -> PreparedSummary:
    """Summarise the prepared data and the training plan.

    Raises:
        UserError: 'NothingToMix', 'StageTooShort', 'NothingToReplay'.
    """
    train = [s for s in manifest.sets if s.split == "train"]
    total = steps_of(spec, manifest.samples("train"))
    sets = {s.name: s.tokens for s in train}
    stages = stage_plans(stages_of(spec, sets, total), sets)
    for stage in stages:
        log.info("stage %s: %d steps, %s", stage.name, stage.steps, stage.mixture_text)
    replay_of(spec, [s.name for s in train])
    fields = {
        "digest": manifest.digest,
        "uri": uri,
        "reused": reused,
        "train_samples": manifest.samples("train"),
        "validation_samples": manifest.samples("validation"),
        "test_samples": manifest.samples("test"),
        "retention_samples": manifest.samples("retention"),
        "train_tokens": sum(s.tokens for s in train),
        "supervised_tokens": sum(s.supervised for s in train),
        "dropped": manifest.dropped,
        "total_steps": total,
        "stages": stages,
    }
    return PreparedSummary.model_validate(fields, by_alias=False, by_name=True)

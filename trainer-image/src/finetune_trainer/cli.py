"""Command line ``finetune``: entry point of the trainer image and of local runs.

``prepare``, ``supervise`` and ``publish`` are the container commands of a run. They read the run
spec that the environment names. The other commands are for users. Each command imports its own
dependencies, which keeps ``supervise`` small.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from finetune_api.names import ENV_WORKER
from finetune_trainer.local.eval_options import add_options
from finetune_trainer.threads import thread_environment

_MANIFEST_HELP: Final = "a FineTuneJob; its relative paths start from its folder; -: standard input"
_MODEL_HELP: Final = "folder of a model: spec.output.destination and the run's ID"

if TYPE_CHECKING:
    from finetune_api.results import PreparedSummary, PublishSummary
    from finetune_api.run_spec import RunSpec
    from finetune_trainer.local.current import Change
    from finetune_trainer.storage.objects import Stores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for wrong arguments or an invalid manifest,
    else a ``names.ExitCode``."""
    options = _parser().parse_args(arguments)
    code: int = options.command(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune", description="Fine-tune language models, on this machine or as a container."
    )
    parser.add_argument(
        "--version", action="version", version=f"finetune {version('finetune-trainer')}"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a FineTuneJob on this machine")
    run.add_argument("manifest", type=Path, metavar="JOB.yaml", help=_MANIFEST_HELP)
    run.add_argument(
        "--state-dir", type=Path, default=Path(".finetune"), metavar="DIR",
        help="logs, reports, the embedded object storage (default: .finetune)",
    )  # fmt: skip
    where = run.add_mutually_exclusive_group()
    where.add_argument("--endpoint", metavar="URL", help="S3 endpoint for s3:// URIs")
    where.add_argument(
        "--local-storage", action="store_true",
        help="serve s3:// from the embedded server in the state folder, ignoring the environment",
    )  # fmt: skip
    run.set_defaults(command=_run)

    validate = commands.add_parser("validate", help="check a FineTuneJob manifest")
    validate.add_argument("manifest", type=Path, metavar="JOB.yaml", help=_MANIFEST_HELP)
    validate.set_defaults(command=_validate)

    quickstart = commands.add_parser(
        "quickstart", help="create a small base model and labelled data for a first run"
    )
    quickstart.add_argument("folder", type=Path, metavar="DIR")
    quickstart.add_argument(
        "--tiny", action="store_true", help="a smaller, less accurate model that is made in seconds"
    )
    quickstart.set_defaults(command=_quickstart)

    templates = commands.add_parser("templates", help="list the library of templates, or show one")
    templates.add_argument("name", nargs="?", metavar="NAME", help="the template to show")
    templates.add_argument(
        "--data", type=Path, metavar="FILE", help="render the first records of FILE with it"
    )
    templates.add_argument(
        "--field", action="append", default=[], metavar="document=article",
        help="the template's field and the records' name for it; may be repeated",
    )  # fmt: skip
    templates.add_argument(
        "--role", action="append", default=[], metavar="bot=assistant",
        help="the records' name for a role of a conversation and what it means; may be repeated",
    )  # fmt: skip
    templates.set_defaults(command=_templates)

    report = commands.add_parser("report", help="show the results of a published model")
    report.add_argument("model", metavar="S3_URI", help=_MODEL_HELP)
    report.add_argument(
        "--lm-eval", type=Path, metavar="DIR",
        help="also write the files of lm-evaluation-harness: results.json, samples_*.jsonl",
    )  # fmt: skip
    _storage_options(report)
    report.set_defaults(command=_report)
    compare = commands.add_parser(
        "compare", help="compare published models on the samples that all have answered"
    )
    compare.add_argument("models", nargs="+", metavar="S3_URI", help=_MODEL_HELP)
    compare.add_argument(
        "--min-effect", type=float, default=2.0, metavar="POINTS",
        help="smallest gain that matters, in hundredths of a share or of a nat (default: 2)",
    )  # fmt: skip
    _storage_options(compare)
    compare.set_defaults(command=_compare)

    evaluate = commands.add_parser(
        "eval", help="measure models as they are on this machine, and compare them"
    )
    add_options(evaluate)
    _storage_options(evaluate)
    evaluate.set_defaults(command=_evaluate)

    interpolate = commands.add_parser(
        "interpolate", help="choose and publish a point between the base and the tuned model"
    )
    interpolate.add_argument("model", metavar="S3_URI", help=_MODEL_HELP)
    interpolate.add_argument(
        "--scan", choices=("Interpolation", "LayerLinear"),
        help="as evaluation.remedy.scan (default: the run's, else Interpolation)",
    )  # fmt: skip
    interpolate.add_argument(
        "--points", nargs="+", default=(), metavar="POINT",
        help="points besides 1, above 0 and below 1 (default: the run's, else 0.8 0.6 0.4 0.2)",
    )  # fmt: skip
    _storage_options(interpolate)
    interpolate.set_defaults(command=_interpolate)

    current = commands.add_parser("current", help="show the model in use at a destination")
    _current_options(current)
    current.set_defaults(command=_current)
    promote = commands.add_parser(
        "promote", help="make a published run the model in use, whatever its gates said"
    )
    _current_options(promote)
    promote.add_argument("run", metavar="RUN", help="status.run.id of a run at the destination")
    promote.set_defaults(command=_promote)
    rollback = commands.add_parser("rollback", help="make an earlier model the one in use")
    _current_options(rollback)
    rollback.add_argument(
        "--run", metavar="RUN", help="run that published it (default: the one before the current)"
    )
    rollback.set_defaults(command=_rollback)

    prepare = commands.add_parser("prepare", help="stage: data to token shards")
    half = prepare.add_mutually_exclusive_group()
    half.add_argument(
        "--map", action="store_const", dest="step", const="Map", default="All",
        help=f"one of several pods: its input splits ({ENV_WORKER} is its index) to token shards",
    )  # fmt: skip
    half.add_argument(
        "--reduce", action="store_const", dest="step", const="Reduce",
        help="the shards of all map pods to index, report and manifest",
    )  # fmt: skip
    prepare.set_defaults(command=_prepare)

    for name, text, command in (
        ("supervise", "stage: the training processes of one node", _supervise),
        ("publish", "stage: the chosen checkpoint to a published model", _publish),
    ):
        commands.add_parser(name, help=text).set_defaults(command=command)
    return parser


def _current_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", metavar="S3_URI", help="spec.output.destination")
    _storage_options(parser)


def _storage_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", metavar="URL", help="S3 endpoint for s3:// URIs")
    parser.add_argument(
        "--local-storage", action="store_true", help="the embedded storage of the state folder"
    )
    parser.add_argument("--state-dir", type=Path, default=Path(".finetune"), metavar="DIR")


def _storage(options: argparse.Namespace) -> dict[str, Any]:
    """The values of ``_storage_options``, by the parameters that take them."""
    return {name: getattr(options, name) for name in ("state_dir", "endpoint", "local_storage")}


def _report(options: argparse.Namespace) -> int:
    from finetune_trainer.local.results import report

    return report(options.model, lm_eval=options.lm_eval, **_storage(options))


def _compare(options: argparse.Namespace) -> int:
    from finetune_trainer.local.results import compare

    return compare(options.models, min_effect=options.min_effect, **_storage(options))


def _evaluate(options: argparse.Namespace) -> int:
    from finetune_trainer.local.evaluation import evaluate

    return evaluate(options, **_storage(options))


def _interpolate(options: argparse.Namespace) -> int:
    os.environ.update(thread_environment(os.environ))  # before torch is imported
    from transformers.utils import logging

    from finetune_trainer.local.interpolate import interpolate

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return interpolate(options.model, scan=options.scan, points=options.points, **_storage(options))


def _current(options: argparse.Namespace, change: Change | None = None) -> int:
    from finetune_trainer.local.current import current

    return current(options.destination, change=change, **_storage(options))


def _promote(options: argparse.Namespace) -> int:
    from finetune_trainer.local.current import to

    return _current(options, to(options.run))


def _rollback(options: argparse.Namespace) -> int:
    from finetune_trainer.local.current import back

    return _current(options, back(options.run))


def _run(options: argparse.Namespace) -> int:
    from finetune_trainer.local.runner import run_manifest

    return run_manifest(
        options.manifest,
        options.state_dir,
        endpoint=options.endpoint,
        local_storage=options.local_storage,
    )


def _validate(options: argparse.Namespace) -> int:
    from finetune_api.base import InvalidSpec
    from finetune_trainer.local.manifest import read_manifest

    try:
        job = read_manifest(options.manifest)
    except InvalidSpec as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    print(f"{options.manifest}: FineTuneJob {job.name} is valid")
    return 0


def _quickstart(options: argparse.Namespace) -> int:
    os.environ.update(thread_environment(os.environ))  # before torch is imported
    from transformers.utils import logging

    from finetune_trainer.quickstart import make_quickstart

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder: Path = options.folder
    print(f"Making a base model and labelled data in {folder} (under a minute) ...", flush=True)
    reused = make_quickstart(folder, tiny=options.tiny)
    print(f"{'Copied from the cache' if reused else 'Made'}: {folder}/model, {folder}/data")
    return 0


def _templates(options: argparse.Namespace) -> int:
    from rich.console import Console

    from finetune_trainer.local.templates import list_templates, show_template

    if options.name is None:
        return list_templates(Console())
    return show_template(Console(), options.name, options.field, options.data, options.role)


def _prepare(options: argparse.Namespace) -> int:
    from finetune_trainer.stage import run_stage, scratch_folder

    os.environ.update(thread_environment(os.environ))  # before torch is imported

    def body(run_spec: RunSpec, stores: Stores) -> PreparedSummary | None:
        from finetune_trainer.local.read_progress import ProgressFile
        from finetune_trainer.prepare.pipeline import prepare

        scratch, worker = scratch_folder(), int(os.environ.get(ENV_WORKER, "0"))
        teller = ProgressFile(scratch)
        return prepare(run_spec, stores, scratch, teller, step=options.step, worker=worker)

    return run_stage("map" if options.step == "Map" else "prepare", body)


def _supervise(options: argparse.Namespace) -> int:
    from finetune_trainer.supervise.supervisor import supervise

    return supervise()


def _publish(options: argparse.Namespace) -> int:
    from finetune_trainer.stage import run_stage, scratch_folder

    os.environ.update(thread_environment(os.environ))  # before torch is imported

    def body(run_spec: RunSpec, stores: Stores) -> PublishSummary:
        from finetune_trainer.publish.pipeline import publish

        return publish(run_spec, stores, scratch_folder())

    return run_stage("publish", body)

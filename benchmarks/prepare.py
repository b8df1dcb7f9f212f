"""Prepare: speed compared with datasets.map, memory by size of the data, and reading from S3.

    python benchmarks/prepare.py [--megabytes 16] [--rounds 3]

All parts use the same tokenizer and the same JSON Lines of generated prompts and completions, from
a local S3 server or from disk (datasets.map). Each figure is measured in its own process, which
prepares a few records first.

- Speed: MB of data per CPU-second of the process and its threads, which other load distorts little.
  Prepare (one process, without the memory estimate) and datasets.map take turns.
- Scaling: seconds of one process and of a pool of two, in turns.
- Checks: CPU-seconds per MB that each check adds.
- Memory: peak of the process above its memory at the start, at 1, 4 and 16 times the data with the
  default checks, and once each with fewer and with more checks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec
from finetune_api.sources import StorageAccess
from finetune_api.spec import parse_spec
from finetune_trainer.storage.objects import Credentials, ObjectStore, Stores
from finetune_trainer.storage.s3server import EmbeddedS3

BUCKET = "bench"
VOCABULARY = 16384
WORDS = 20_000
TIMES = (1, 4, 16)
CHUNK = 1 << 20
FEW = f"s3://{BUCKET}/few.jsonl"
"""Records that are prepared before the measurement: imports and first calls take seconds."""


def words() -> list[str]:
    """Return random words of 2 to 11 letters."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    weights = 1.0 / np.arange(1, len(letters) + 1)
    weights /= weights.sum()
    return ["".join(draw.choice(letters, n, p=weights)) for n in draw.integers(2, 12, WORDS)]


def records(size: int, vocabulary: list[str]) -> Iterator[bytes]:
    """Yield JSON lines of ``size`` bytes in total: prompts and completions of log-normal lengths,
    with words drawn by Zipf's law. One in 50 is a copy of the line before."""
    draw = np.random.default_rng(1)
    weights = 1.0 / np.arange(1, WORDS + 1)
    cumulative = np.cumsum(weights / weights.sum())
    written, line = 0, b""
    while written < size:
        if not line or draw.random() >= 0.02:
            lengths = np.clip(draw.lognormal(4.3, 0.7, 2).astype(int), 4, 1000)
            drawn = np.searchsorted(cumulative, draw.random(lengths.sum())).clip(max=WORDS - 1)
            text = [vocabulary[i] for i in drawn]
            record = {
                "prompt": " ".join(text[: lengths[0]]),
                "completion": " " + " ".join(text[lengths[0] :]),
            }
            line = json.dumps(record).encode() + b"\n"
        yield line
        written += len(line)


def make_model(folder: Path, vocabulary: list[str]) -> None:
    """Write a model folder with a byte-level BPE tokenizer trained on ``records``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((line.decode() for line in records(2 << 20, vocabulary)), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")


def run_spec(name: str, data: str, quality: dict[str, Any]) -> RunSpec:
    spec = {
        "model": {"source": f"s3://{BUCKET}/model"},
        "data": {"train": [{"source": data}], "quality": quality},
        "output": {"destination": f"s3://{BUCKET}/out/{name}"},
    }
    job = JobIdentity(namespace="bench", name="bench", uid="0" * 36)
    return RunSpec(version=CONTRACT_VERSION, job=job, run="1-00000", spec=parse_spec(spec))


@dataclass(frozen=True)
class Server:
    """Endpoint and keys of the S3 server, for other processes."""

    endpoint: str
    access_key: str
    secret_key: str

    def store(self) -> ObjectStore:
        return ObjectStore(self.endpoint, credentials=Credentials(self.access_key, self.secret_key))


@dataclass(frozen=True)
class Figures:
    """CPU time, duration and memory of some work."""

    cpu: float
    """CPU-seconds of all threads of the process."""
    seconds: float
    held: float
    """Peak memory above the memory at the start, MiB."""


def measured(work: Callable[[], object]) -> Figures:
    """Run ``work`` in this process and measure it."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM, the peak
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    ended, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
    cpu = ended.ru_utime + ended.ru_stime - used.ru_utime - used.ru_stime
    return Figures(cpu, seconds, memory("VmHWM") - before)


def memory(what: str) -> float:
    """Return a field of /proc/self/status, in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith(f"{what}:"))


def ours(
    server: Server, name: str, data: str, quality: dict[str, Any], processes: int = 1
) -> Figures:
    """Measure map and reduce, from S3 to S3."""
    from finetune_trainer.prepare import pipeline

    asked, store = run_spec(name, data, quality), server.store()

    class Here(Stores):
        def of(self, access: StorageAccess | None) -> ObjectStore:
            return store

    few = run_spec(f"{name}-few", FEW, quality)
    figures: list[Figures] = []
    write_data = pipeline.write_data

    def measuring(*arguments: Any) -> Any:
        found: list[Any] = []
        figures.append(measured(lambda: found.append(write_data(*arguments))))
        return found[0]

    pipeline.write_data = measuring
    with tempfile.TemporaryDirectory() as folder:
        pipeline.prepare(few, Here(few), Path(folder) / "few", processes=processes)
        pipeline.prepare(asked, Here(asked), Path(folder) / "all", processes=processes)
    return figures[1]


def theirs(model: Path, data: Path, few: Path) -> Figures:
    """Measure load_dataset and map, from disk to disk: prompt and completion are tokenized and
    concatenated, with the mask, without checks."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        prompts = tokenizer(batch["prompt"], add_special_tokens=False)["input_ids"]
        answers = tokenizer(batch["completion"], add_special_tokens=False)["input_ids"]
        made = zip(prompts, answers, strict=True)
        both = [([1, *p, *a, 2], [0] * (len(p) + 1) + [1] * (len(a) + 1)) for p, a in made]
        return {"input_ids": [ids for ids, _ in both], "completion_mask": [m for _, m in both]}

    def work(path: Path) -> None:
        with tempfile.TemporaryDirectory() as cache:
            rows = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
            rows.map(tokenize, batched=True, remove_columns=rows.column_names)

    work(few)
    return measured(lambda: work(data))


def streamed(server: Server, uri: str) -> Figures:
    """Measure reading the object as prepare does."""
    store = server.store()

    def work() -> None:
        with store.read_stream(uri) as stream:
            while stream.read(CHUNK):
                pass

    return measured(work)


def raw(server: Server, uri: str) -> Figures:
    """Measure reading the object by one plain HTTP request."""
    import boto3

    client = boto3.client(
        "s3", endpoint_url=server.endpoint, region_name="us-east-1",
        aws_access_key_id=server.access_key, aws_secret_access_key=server.secret_key,
    )  # fmt: skip
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    signed = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})

    def work() -> None:
        with urllib.request.urlopen(signed) as answer:
            while answer.read(CHUNK):
                pass

    return measured(work)


def alone(work: Callable[..., Figures], *arguments: Any) -> Figures:
    """Run ``work`` in its own process and return its figures."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def speed(server: Server, model: Path, data: Path, few: Path, uri: str, rounds: int) -> None:
    size = data.stat().st_size / 1e6
    pairs = []
    for i in range(rounds):
        own = alone(ours, server, f"speed-{i}", uri, {})
        pairs.append((size / own.cpu, size / alone(theirs, model, data, few).cpu))
    a, b = (statistics.median(x) for x in zip(*pairs, strict=True))
    ratios = " ".join(f"{x / y:.2f}" for x, y in pairs)
    print(f"\n{size:.0f} MB, MB per CPU-second: prepare {a:.2f}, datasets.map {b:.2f}; ratio by"
          f" round {ratios}", flush=True)  # fmt: skip


def scaling(server: Server, data: Path, uri: str, rounds: int) -> None:
    size = data.stat().st_size / 1e6
    pairs = []
    for i in range(rounds):
        one, two = (alone(ours, server, f"scaling-{i}-{n}", uri, {}, n).seconds for n in (1, 2))
        pairs.append((one, two))
    a, b = (statistics.median(x) for x in zip(*pairs, strict=True))
    ratios = " ".join(f"{x / y:.2f}" for x, y in pairs)
    print(f"\n{size:.0f} MB, seconds: one process {a:.1f}, two {b:.1f}; ratio by round {ratios}",
          flush=True)  # fmt: skip


NOTHING: Final[dict[str, Any]] = {
    "deduplicate": False, "contamination": "Ignore", "personalData": "Ignore",
}  # fmt: skip
CHECKS: Final[dict[str, dict[str, Any]]] = {
    "none": {},
    "exact duplicates": {"deduplicate": True},
    "contamination": {"contamination": "Warn"},
    "personal data": {"personalData": "Warn"},
    "near duplicates": {"nearDuplicates": "Drop"},
}


def checks(server: Server, data: Path, uri: str, rounds: int) -> None:
    size = data.stat().st_size / 1e6
    found: dict[str, list[float]] = {name: [] for name in CHECKS}
    for i in range(rounds):
        for name, quality in CHECKS.items():
            figures = alone(ours, server, f"checks-{i}-{name[:4]}", uri, {**NOTHING, **quality})
            found[name].append(figures.cpu / size)
    plain = found.pop("none")
    print(f"\n{size:.0f} MB, CPU-seconds a MB: {statistics.median(plain):.3f} without checks;"
          " added by each check (by round):", flush=True)  # fmt: skip
    for name, seconds in found.items():
        more = [s - p for s, p in zip(seconds, plain, strict=True)]
        told = " ".join(f"{s:.3f}" for s in more)
        print(f"{name:>18}{statistics.median(more):8.3f}   ({told})", flush=True)


SOUGHT: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "default": ("duplicates, contamination (default)", {}),
    "duplicates": ("duplicates", {"contamination": "Ignore"}),
    "near": ("duplicates, contamination, near", {"nearDuplicates": "Drop"}),
}


def growth(server: Server, data: dict[int, Path], uris: dict[int, str]) -> None:
    print(f"\n{'data, MB':>10}{'records':>10}  {'checks':40}{'peak, MiB':>10}{'MB/CPU-s':>10}")
    for times, name in [*((t, "default") for t in TIMES), (16, "duplicates"), (4, "near")]:
        size = data[times].stat().st_size / 1e6
        with data[times].open("rb") as lines:
            count = sum(1 for _ in lines)
        said, quality = SOUGHT[name]
        found = alone(ours, server, f"{times}-{name}", uris[times], quality)
        print(f"{size:10.0f}{count:10,}  {said:40}{found.held:10.0f}{size / found.cpu:10.2f}",
              flush=True)  # fmt: skip


def reading(server: Server, data: Path, uri: str, rounds: int) -> None:
    size = data.stat().st_size / 1e6
    pairs = [
        (size / alone(streamed, server, uri).seconds, size / alone(raw, server, uri).seconds)
        for _ in range(rounds)
    ]
    a, b = (statistics.median(x) for x in zip(*pairs, strict=True))
    ratios = " ".join(f"{x / y:.2f}" for x, y in pairs)
    print(f"\nreading {size:.0f} MB from S3, MB/s: ours {a:.0f}, one plain request {b:.0f}; ratio"
          f" by round {ratios}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="0: measure only memory")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a pod
    print(", ".join(f"{p} {version(p)}" for p in ("datasets", "tokenizers", "pyarrow")))
    with tempfile.TemporaryDirectory() as folder, EmbeddedS3(Path(folder) / "s3") as s3:
        server = Server(s3.endpoint, s3.access_key, s3.secret_key)
        s3.ensure_bucket(BUCKET)
        store, vocabulary = server.store(), words()
        model = Path(folder) / "model"
        make_model(model, vocabulary)
        for path in model.iterdir():
            store.upload(path, f"s3://{BUCKET}/model/{path.name}")
        data = {times: Path(folder) / f"{times}.jsonl" for times in TIMES}
        uris = {times: f"s3://{BUCKET}/data/{times}.jsonl" for times in TIMES}
        for times, path in data.items():
            with path.open("wb") as file:
                file.writelines(records(times * options.megabytes * 1_000_000, vocabulary))
            store.upload(path, uris[times])
        few = Path(folder) / "few.jsonl"
        few.write_bytes(b"".join(islice(records(1 << 20, vocabulary), 100)))
        store.upload(few, FEW)
        if options.rounds:
            reading(server, data[16], uris[16], options.rounds)
            speed(server, model, data[4], few, uris[4], options.rounds)
            scaling(server, data[4], uris[4], options.rounds)
            checks(server, data[1], uris[1], options.rounds)
        growth(server, data, uris)


if __name__ == "__main__":
    main()

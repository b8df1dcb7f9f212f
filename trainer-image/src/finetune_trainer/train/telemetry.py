"""What the gang's first process says while it works: ``/metrics`` for Prometheus, ``/progress``.

Both are read-only pages of one small server; nothing in the training waits for a reader.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from finetune_api.results import Progress, Startup, StartupPart
from finetune_trainer.train.startup import StartupClock


class _Server(ThreadingHTTPServer):
    """On every address of the pod, IPv6 included where the kernel has it."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class Telemetry:
    """State that the loop writes and the pages show."""

    def __init__(self, run: str, attempt: int, restarts: int, startup: StartupClock) -> None:
        self.registry = CollectorRegistry()
        self._startup = startup
        self._progress = Progress(run=run, attempt=attempt, restarts=restarts, stage="Loading")
        self._lock = threading.Lock()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"finetune_{name}", text, registry=self.registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"finetune_{name}", text, registry=self.registry)

        self.loss = gauge("train_loss", "Training loss per supervised token, nats")
        self.validation_loss = Gauge(
            "finetune_validation_loss", "Validation loss per supervised token, nats",
            ["data_set"], registry=self.registry,
        )  # fmt: skip
        self.source_loss = Gauge(
            "finetune_train_data_set_loss", "Training loss by training set, of several",
            ["data_set"], registry=self.registry,
        )  # fmt: skip
        self.learning_rate = gauge("learning_rate", "Learning rate of the last step")
        self.gradient_norm = gauge("gradient_norm", "Norm of the gradient before clipping")
        self.step = gauge("step", "Optimizer steps done")
        self.total_steps = gauge("total_steps", "Optimizer steps of the run")
        self.tokens_per_second = gauge("tokens_per_second", "Real tokens trained per second")
        self.data_wait = gauge(
            "data_wait_share",
            "Share of the steps' time since the last log point that was spent waiting for data",
        )
        self._gauge = gauge
        self._late: dict[str, Gauge] = {}
        self.tokens = counter("tokens", "Real tokens trained, whole gang")
        self.samples = counter("samples", "Samples trained, whole gang")
        self.skipped_steps = counter("skipped_steps", "Steps whose update was not made")
        self.rollbacks = counter(
            "rollbacks", "Times that the run went back to an earlier checkpoint"
        )
        self.checkpoints_abandoned = counter(
            "checkpoints_abandoned",
            "Commits that storage did not take and the training went on without",
        )
        self.seconds = Counter(
            "finetune_step_seconds", "Time of the training loop by part",
            ["part"], registry=self.registry,
        )  # fmt: skip
        self.step_time = Histogram(
            "finetune_step_duration_seconds", "Time of one optimizer step", registry=self.registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
        )  # fmt: skip
        for part in ("data_wait", "compute", "checkpoint", "evaluation"):
            self.seconds.labels(part)
        self._startup_seconds = Gauge(
            "finetune_startup_seconds", "Time to the first step of this attempt by part",
            ["part"], registry=self.registry,
        )  # fmt: skip
        self._show_startup()

    def reached(self, part: StartupPart) -> None:
        """The end of a part of the attempt's start, or of a piece of it."""
        self._startup.reached(part)
        self._show_startup()

    def first_step(self, from_step: int, compiling: float | None) -> Startup:
        """The end of the attempt's first step; arguments as of ``StartupClock.first_step``."""
        startup = self._startup.first_step(from_step, compiling)
        self._show_startup()
        self.say(startup=startup)
        return startup

    def _show_startup(self) -> None:
        for part, seconds in self._startup.seconds.items():
            self._startup_seconds.labels(part).set(seconds)

    def set_gpu_memory(self, peak_bytes: int) -> None:
        """Peak memory allocated on the first process's GPU; the series is absent without one."""
        text = "Peak memory allocated on the GPU of the gang's first process"
        self._set_late("gpu_memory_peak_bytes", text, peak_bytes)

    def set_utilization(self, share: float) -> None:
        """Model FLOPs utilization; the series is absent where the device's peak is not known."""
        text = "Share of the device's peak that the arithmetic on real tokens makes"
        self._set_late("model_flops_utilization", text, share)

    def set_compilations(self, graphs: int) -> None:
        """Graphs that were compiled; the series is absent where nothing is."""
        text = "Graphs that torch.compile made; they should be few, and made at the first step"
        self._set_late("compiled_graphs", text, graphs)

    def set_anchor_kl(self, divergence: float) -> None:
        """Divergence on replay sets; the series is absent without an anchor."""
        text = "KL(untuned || tuned) per supervised token of replay sets, nats"
        self._set_late("anchor_kl", text, divergence)

    def set_router_loss(self, loss: float) -> None:
        """Router loss of a mixture of experts; the series is absent where it is not trained."""
        self._set_late("router_loss", "Router loss before its coefficient", loss)

    def _set_late(self, name: str, text: str, value: float) -> None:
        if name not in self._late:
            self._late[name] = self._gauge(name, text)
        self._late[name].set(value)

    @property
    def progress(self) -> Progress:
        with self._lock:
            return self._progress

    def say(self, **changes: Any) -> None:
        """Change fields of the progress (by their Python names)."""
        with self._lock:
            self._progress = self._progress.model_copy(update={**changes, "updated": time.time()})

    def serve(self, port: int) -> None:
        """Serve the pages on all addresses. Where the port is taken the training goes on unseen:
        a page to read is no reason to fail."""
        telemetry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    body, kind = generate_latest(telemetry.registry), CONTENT_TYPE_LATEST
                elif self.path == "/progress":
                    body = json.dumps(telemetry.progress.to_json()).encode()
                    kind = "application/json"
                else:
                    self.send_error(404, "there are /metrics and /progress")
                    return
                with suppress(ConnectionError):  # the reader has gone: its time was up
                    self.send_response(200)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Readers poll often; their requests are no news."""

        try:
            server = _Server(("", port), Handler)
        except OSError as error:
            print(f"no metrics page on port {port}: {error}", flush=True)
            return
        threading.Thread(target=server.serve_forever, name="telemetry", daemon=True).start()

"""Telemetry of rank 0: an HTTP server with ``/metrics`` for Prometheus and ``/progress``.

Both pages are read-only. The training never waits for a reader.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from finetune_api.results import Progress, Startup, StartupPart
from finetune_api.time_use import TimeUse
from finetune_trainer.train.startup import StartupClock


class _Server(ThreadingHTTPServer):
    """HTTP server that listens on all addresses of the pod, including IPv6 if the kernel has it."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class Telemetry:
    """Metrics and progress: written by the training loop, shown by the pages."""

    def __init__(
        self, run: str, attempt: int, restarts: int, startup: StartupClock,
        account: Callable[[], TimeUse | None] = lambda: None,
    ) -> None:  # fmt: skip
        """
        Args:
            account: returns how the run has spent its time up to now.
        """
        self.registry = CollectorRegistry()
        self._account = account
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
            "finetune_train_data_set_loss", "Training loss by training set, if there are several",
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
        self.tokens = counter("tokens", "Real tokens trained, all ranks")
        self.samples = counter("samples", "Samples trained, all ranks")
        self.skipped_steps = counter("skipped_steps", "Steps whose update the guard skipped")
        self.rollbacks = counter("rollbacks", "Rollbacks to an earlier checkpoint")
        self.checkpoints_abandoned = counter(
            "checkpoints_abandoned",
            "Checkpoints abandoned because storage failed, while training continued",
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
        """End a part of the startup (see ``StartupClock.reached``)."""
        self._startup.reached(part)
        self._show_startup()

    def first_step(self, from_step: int, compiling: float | None) -> Startup:
        """End the startup with the first step; arguments as in ``StartupClock.first_step``."""
        startup = self._startup.first_step(from_step, compiling)
        self._show_startup()
        self.say(startup=startup)
        return startup

    def _show_startup(self) -> None:
        for part, seconds in self._startup.seconds.items():
            self._startup_seconds.labels(part).set(seconds)

    def set_gpu_memory(self, peak_bytes: int) -> None:
        """Set the peak memory allocated on rank 0's GPU. Without a GPU the series is absent."""
        text = "Peak memory allocated on the GPU of rank 0"
        self._set_late("gpu_memory_peak_bytes", text, peak_bytes)

    def set_utilization(self, share: float) -> None:
        """Set the model FLOPs utilization. If the device's peak is unknown the series is absent."""
        text = "Model FLOPs utilization: share of the device's peak, counted on real tokens"
        self._set_late("model_flops_utilization", text, share)

    def set_compilations(self, graphs: int) -> None:
        """Set the number of compiled graphs. Without compilation the series is absent."""
        text = "Graphs compiled by torch.compile; expected: few, and all at the first step"
        self._set_late("compiled_graphs", text, graphs)

    def set_anchor_kl(self, divergence: float) -> None:
        """Set the KL divergence on replay sets. Without an output anchor the series is absent."""
        text = "KL(base || tuned) per supervised token of replay sets, nats"
        self._set_late("anchor_kl", text, divergence)

    def set_base_kl(self, divergence: float) -> None:
        """Set the KL divergence on validation samples. If not measured, the series is absent."""
        text = "KL(base || tuned) per supervised token of validation samples, nats"
        self._set_late("base_kl", text, divergence)

    def set_router_loss(self, loss: float) -> None:
        """Set the router loss of a mixture of experts. If untrained, the series is absent."""
        self._set_late("router_loss", "Router loss before its coefficient", loss)

    def _set_late(self, name: str, text: str, value: float) -> None:
        if name not in self._late:
            self._late[name] = self._gauge(name, text)
        self._late[name].set(value)

    @property
    def progress(self) -> Progress:
        with self._lock:
            return self._progress

    def page(self) -> bytes:
        """Return the page ``/progress``: the progress, with the account of the time up to now."""
        told = self.progress.model_copy(update={"time": self._account()})
        return json.dumps(told.to_json()).encode()

    def say(self, **changes: Any) -> None:
        """Update fields of the progress, given by their Python names."""
        with self._lock:
            self._progress = self._progress.model_copy(update={**changes, "updated": time.time()})

    def serve(self, port: int) -> None:
        """Serve the pages on all addresses. If the port is in use, the training continues without
        pages."""
        telemetry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    body, kind = generate_latest(telemetry.registry), CONTENT_TYPE_LATEST
                elif self.path == "/progress":
                    body = telemetry.page()
                    kind = "application/json"
                else:
                    self.send_error(404, "available pages: /metrics and /progress")
                    return
                with suppress(ConnectionError):  # the reader timed out and disconnected
                    self.send_response(200)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing: readers poll often."""

        try:
            server = _Server(("", port), Handler)
        except OSError as error:
            print(f"cannot serve metrics on port {port}: {error}", flush=True)
            return
        threading.Thread(target=server.serve_forever, name="telemetry", daemon=True).start()

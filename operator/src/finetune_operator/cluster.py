"""The only module that talks to the API server: creates, patches, deletes, server-side apply of
status, events, lists, and the pod proxy, over one aiohttp session.

Each write checks ``guard`` (whether this process is the leader) right before it is sent.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import uuid
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp
import kubernetes.client
import kubernetes.config
import orjson

from finetune_api.names import API_VERSION, FIELD_OWNER, KIND, PLURAL
from finetune_operator.decision.plan import Event, Subject
from finetune_operator.world import nodes, workloads

Json = dict[str, Any]
REQUEST_SECONDS: Final = 5.0
"""Request timeout. At most the Lease's duration minus its renewal deadline, so that no write of a
former leader is in flight when the next leader starts."""

PAGE: Final = "500"
"""Objects per page of a list: one page must arrive within REQUEST_SECONDS."""

EVENT_PAGES: Final = 10
"""Most pages of the warnings of one namespace."""

PATHS: Final[dict[str, tuple[str, str]]] = {
    "ConfigMap": ("/api/v1", "configmaps"),
    "Service": ("/api/v1", "services"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Pod": ("/api/v1", "pods"),
    "Job": ("/apis/batch/v1", "jobs"),
    KIND: (f"/apis/{API_VERSION}", PLURAL),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "Event": ("/apis/events.k8s.io/v1", "events"),
}


_INSTALL: Final = "install crds/finetunejob.crd.yaml, or the chart with crds.enabled"
log = logging.getLogger(__name__)

Credentials = kubernetes.client.Configuration
"""Address of an API server, and the credentials for it."""


class NoCluster(Exception):
    """No credentials for a cluster were found."""


class ApiError(Exception):
    """The API server refused a request."""

    def __init__(
        self, method: str, path: str, code: int, text: str, retry_after: float | None = None
    ) -> None:
        """
        Args:
            code: HTTP status.
            text: message of the server.
            retry_after: seconds to wait before the next try, if the server asks for it.
        """
        super().__init__(f"{method} {path}: {code} {text[:500]}")
        self.code = code
        self.text = text[:500]
        self.retry_after = retry_after


class NotLeading(Exception):
    """A write was not sent: the Lease is lost, or may be lost."""


def load_credentials(kubeconfig: str | None, context: str | None) -> tuple[Credentials, bool]:
    """Load the pod's service account credentials; with an argument, or outside a pod, load a
    kubeconfig (``kubeconfig``, ``KUBECONFIG`` or the default path).

    Returns the credentials, and whether they are the pod's.

    Raises:
        NoCluster: no credentials were found.
    """
    configuration = Credentials()
    if kubeconfig is None and context is None:
        try:
            kubernetes.config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
            return configuration, True
        except kubernetes.config.ConfigException:
            pass
    try:
        kubernetes.config.load_kube_config(  # type: ignore[no-untyped-call]
            config_file=kubeconfig, context=context, client_configuration=configuration
        )
    except kubernetes.config.ConfigException as error:
        raise NoCluster(str(error)) from None
    return configuration, False


def ssl_context(configuration: Credentials) -> ssl.SSLContext:
    """TLS context for the API server, with the client certificate if there is one."""
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def bearer(configuration: Credentials) -> str | None:
    """The current bearer token, read anew: Kubernetes renews the tokens of pods on disk."""
    text = configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
    return text.strip().rpartition(" ")[2] if text else None


class Cluster:
    """A connection to one API server. Use as an async context manager."""

    def __init__(self, configuration: Credentials) -> None:
        self._configuration = configuration
        self._session: aiohttp.ClientSession | None = None
        self._queue_version: str | None = None
        self.guard: Callable[[], bool] = lambda: True

    async def __aenter__(self) -> Cluster:
        tls = ssl_context(self._configuration)
        connector = aiohttp.TCPConnector(ssl=tls, limit=64)
        self._session = aiohttp.ClientSession(
            base_url=self._configuration.host.rstrip("/") + "/",
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._session is not None:
            await self._session.close()

    # --- writes ---------------------------------------------------------------------------------

    async def create(self, obj: Json) -> Json:
        """Create a child. Raises ApiError with code 409 if its name is taken: a child is never
        changed this way, as an apply would when the watches are behind."""
        path = collection_path(obj["kind"], obj["metadata"]["namespace"])
        return await self._write("POST", path, obj)

    async def apply(self, obj: Json) -> Json:
        """Server-side apply of a child: create it, or change it to this one."""
        meta = obj["metadata"]
        path = object_path(obj["kind"], meta["namespace"], meta["name"])
        return await self._write("PATCH", path, obj, "application/apply-patch+yaml", force="true")

    async def apply_status(self, subject: Subject, status: Json) -> Json:
        """Server-side apply of a job's whole status. The uid makes it fail if another job now has
        the name."""
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {
                "name": subject.name,
                "namespace": subject.namespace,
                "uid": subject.uid,
            },
            "status": status,
        }
        path = object_path(KIND, subject.namespace, subject.name) + "/status"
        return await self._write("PATCH", path, body, "application/apply-patch+yaml", force="true")

    async def patch(self, kind: str, namespace: str, name: str, patch: Json) -> Json | None:
        """Merge patch of a child; None: it does not exist any more."""
        path = object_path(kind, namespace, name)
        try:
            return await self._write("PATCH", path, patch, "application/merge-patch+json")
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Delete a child if it exists, and not another one that has its name by now; its pods end
        with their grace period."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            await self._write("DELETE", object_path(kind, namespace, name), body)
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    async def event(self, subject: Subject, event: Event, instance: str) -> None:
        """Create an Event on the job."""
        now = datetime.now(UTC)
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{subject.name[:200]}.{uuid.uuid4().hex[:16]}",
                "namespace": subject.namespace,
            },
            "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": FIELD_OWNER,
            "reportingInstance": instance[:128],
            "action": "Reconcile",
            "type": event.type,
            "reason": event.reason[:128],
            "note": event.message.encode()[:1000].decode(errors="ignore"),
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": subject.namespace,
                "name": subject.name,
                "uid": subject.uid,
            },
        }
        await self._write("POST", collection_path("Event", subject.namespace), body)

    async def _write(
        self,
        method: str,
        path: str,
        body: Json,
        content_type: str = "application/json",
        **parameters: str,
    ) -> Json:
        if not self.guard():
            raise NotLeading(f"{method} {path}")
        if method in ("PATCH", "POST"):
            parameters["fieldManager"] = FIELD_OWNER
        return await self.request(method, path, body, content_type, **parameters)

    # --- reads, and requests of the Lease --------------------------------------------------------

    async def versions(
        self, kind: str, namespace: str | None, selector: str
    ) -> tuple[int, set[str]]:
        """Return the resourceVersion of a kind's list, and the uids in the list (metadata only)."""
        accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
        path, uids, version = collection_path(kind, namespace), set[str](), 0
        page = {"labelSelector": selector, "limit": PAGE}
        while True:
            raw = await self._request_bytes("GET", path, None, "application/json", accept, page)
            found = orjson.loads(raw)
            version = version or int(found["metadata"]["resourceVersion"])
            uids |= {item["metadata"]["uid"] for item in found["items"] or ()}  # null: none
            if not (following := found["metadata"].get("continue")):
                return version, uids
            page["continue"] = following

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        """An object; None: it does not exist."""
        try:
            return await self.request("GET", object_path(kind, namespace, name))
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    async def newest_warnings(self, namespace: str, uids: Collection[str]) -> dict[str, str]:
        """Message of the newest warning about each object of a namespace that has one, by uid."""
        path, found = f"/api/v1/namespaces/{namespace}/events", dict[str, tuple[str, str]]()
        page, accept = {"fieldSelector": "type=Warning", "limit": PAGE}, "application/json"
        for _ in range(EVENT_PAGES):
            raw = await self._request_bytes("GET", path, None, accept, accept, page)
            events = orjson.loads(raw)
            for event in events.get("items", ()):
                uid = event["involvedObject"].get("uid")
                text = str(event.get("message") or event.get("reason"))
                if uid in uids:
                    found[uid] = max(found.get(uid, ("", "")), (_event_time(event), text))
            if not (following := events["metadata"].get("continue")):
                break
            page["continue"] = following
        return {uid: text for uid, (_, text) in found.items()}

    async def queue_message(self, namespace: str, uid: str) -> str | None:
        """What Kueue says about the wait of a Job; None: it says nothing. Needs the optional right
        to list Workloads.

        Raises:
            ApiError: 403 without that right, 404 without Kueue.
        """
        api = f"/apis/{workloads.GROUP}"
        if self._queue_version is None:
            found = await self.request("GET", api)
            self._queue_version = str(found["preferredVersion"]["version"])
        path = f"{api}/{self._queue_version}/namespaces/{namespace}/workloads"
        selector = f"{workloads.JOB_LABEL}={uid}"
        found = await self.request("GET", path, labelSelector=selector, limit="1")
        return next(map(workloads.workload_message, found.get("items", ())), "") or None

    async def node_problems(self, node: str, types: Sequence[str]) -> str | None:
        """The problems of a node; None: it has none. Needs the optional right to get Nodes.

        Raises:
            ApiError: 403 without that right, 404 if the node is gone.
        """
        found = await self.request("GET", f"/api/v1/nodes/{node}")
        return nodes.node_problems(found, types) or None

    async def pod_progress(self, namespace: str, pod: str, port: int) -> bytes:
        """Read ``/progress`` of a pod through the API server's proxy."""
        path = f"{object_path('Pod', namespace, pod)}:{port}/proxy/progress"
        return await self._request_bytes("GET", path, None, "application/json", "*/*", {})

    async def request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        **parameters: str,
    ) -> Json:
        """Send one request.

        Raises:
            ApiError: the server refused the request.
            aiohttp.ClientError, TimeoutError: the server could not be reached in time.
        """
        raw = await self._request_bytes(method, path, body, content_type, accept, parameters)
        response: Json = orjson.loads(raw)
        return response

    async def _request_bytes(
        self,
        method: str,
        path: str,
        body: Json | None,
        content_type: str,
        accept: str,
        parameters: dict[str, str],
    ) -> bytes:
        assert self._session is not None
        headers = {"Content-Type": content_type, "Accept": accept, "User-Agent": FIELD_OWNER}
        token = bearer(self._configuration)
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        data = orjson.dumps(body) if body is not None else None
        async with self._session.request(
            method, path.lstrip("/"), data=data, headers=headers, params=parameters
        ) as response:
            raw = await response.read()
            if response.status >= 400:
                text, wait = raw.decode(errors="replace"), response.headers.get("Retry-After", "")
                raise ApiError(
                    method, path, response.status, _message(text),
                    float(wait) if wait.isdigit() else None,
                )  # fmt: skip
            return raw

    async def wait_until_served(self) -> None:
        """Wait until the API server serves FineTuneJobs; log each new cause of the wait once."""
        logged = None
        while (why := await self._not_served()) is not None:
            if why != logged:
                log.warning("waiting for %s: %s", API_VERSION, why)
            logged = why
            await asyncio.sleep(1)

    async def _not_served(self) -> str | None:
        try:
            found = await self.request("GET", f"/apis/{API_VERSION}")
        except ApiError as error:
            if error.code == 404:
                return f"the API server does not know it; {_INSTALL}"
            return f"the API server refuses the request: {error}"
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"the API server cannot be reached: {type(error).__name__}: {error}"
        served = any(r["name"] == PLURAL for r in found.get("resources", []))
        return None if served else f"it has no {PLURAL}; {_INSTALL}"


def _event_time(event: Json) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")


def collection_path(kind: str, namespace: str | None) -> str:
    """URL path of all objects of a kind, in one namespace or in all."""
    prefix, plural = PATHS[kind]
    return f"{prefix}/namespaces/{namespace}/{plural}" if namespace else f"{prefix}/{plural}"


def object_path(kind: str, namespace: str, name: str) -> str:
    """URL path of one object."""
    return f"{collection_path(kind, namespace)}/{name}"


def _message(text: str) -> str:
    try:
        return str(orjson.loads(text).get("message", text))
    except (ValueError, AttributeError):
        return text

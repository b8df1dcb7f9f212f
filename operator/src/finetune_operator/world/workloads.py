"""Kueue's Workload of a queued Job: what it says about the wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

GROUP: Final = "kueue.x-k8s.io"
JOB_LABEL: Final = f"{GROUP}/job-uid"
"""Label of a Workload: uid of the Job that it admits."""


def workload_message(workload: Mapping[str, Any]) -> str:
    """Return Kueue's explanation: of an eviction, of a missing quota, or of the admission checks
    that a Workload with quota waits for; "" if there is none."""
    status = workload.get("status") or {}
    by_type = {c.get("type"): c for c in status.get("conditions") or []}
    evicted, quota = by_type.get("Evicted") or {}, by_type.get("QuotaReserved") or {}
    if quota.get("status") == "True":
        waits = [
            f"{check.get('name')} ({check.get('state')}): {check.get('message') or 'no message'}"
            for check in status.get("admissionChecks") or []
            if check.get("state") != "Ready"
        ]
        return "; ".join(["quota is reserved", *waits])
    words = str(quota.get("message") or "")
    if evicted.get("status") == "True":
        cause = f"evicted ({evicted.get('reason')}): {evicted.get('message') or 'no message'}"
        return f"{cause}; {words}" if words else cause
    return words

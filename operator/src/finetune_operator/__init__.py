"""The operator: observe → decide → render → apply → report, level-triggered.

The packages ``world`` (observed state), ``decision`` (next actions), ``children`` (Kubernetes
objects of a plan) and ``status`` (status, conditions and events) are pure. Of the other modules,
only ``cluster`` talks to the API server, and only ``watch`` uses kopf.
"""

"""The operator: observe → decide → render → apply → report, level-triggered.

``observe``, ``decide`` (with ``runs``, ``stages``, ``failure``, ``waiting``, ``usage``, ``status``,
``report``) and ``render`` (with ``podspec``, ``overlay``) are pure. ``cluster`` is the only module
that talks to the API server; ``watch`` is the only one that knows kopf.
"""

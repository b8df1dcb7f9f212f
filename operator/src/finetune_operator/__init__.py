"""The operator: observe → decide → render → apply → report, level-triggered.

The rooms ``world`` (what is there), ``decision`` (what comes next), ``children`` (the objects of a
plan) and ``status`` (what a user reads back) are pure. Of the modules beside them, ``cluster`` is
the only one that talks to the API server, and ``watch`` the only one that knows kopf.
"""

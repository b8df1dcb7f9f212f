"""The training engine: plan → feed → model → loss, on one process or many.

``plan`` and ``schedule`` need no torch. The engine does not depend on runs or on the checkpoint
manager.
"""

"""The arithmetic of a training: plan → feed → model → loss, on one process or a gang.

Pure where it can be (``plan``, ``schedule``), torch elsewhere; it knows neither runs nor commits.
"""

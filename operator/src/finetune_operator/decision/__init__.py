"""Next actions for a job: the current run, the stage of the run, and the actions of this pass.
Pure.

``runs`` finds the current run, ``run_view`` derives the state that a pass needs from it,
``run_failure`` decides whether it has failed, and ``advance`` turns this into actions.
"""

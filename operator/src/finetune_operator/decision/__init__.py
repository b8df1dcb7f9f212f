"""What comes next for a job: which run is current, the stage that the run is in, and what this pass
does about it. Pure.

``runs`` finds the current run, ``run_view`` derives what a pass must know of it, ``run_failure``
says whether it has failed, and ``advance`` turns that into actions.
"""

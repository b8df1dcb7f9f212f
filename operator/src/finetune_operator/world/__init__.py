"""Observed state: the children of a job, and the jobs whose models it starts from, as data for
decisions. Pure and total: malformed objects are skipped and never raise."""

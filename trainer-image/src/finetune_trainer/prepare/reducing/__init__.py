"""Reduce: one pod turns the sample statistics of the whole data into decisions, index, report and
manifest."""

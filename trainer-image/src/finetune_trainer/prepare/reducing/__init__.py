"""Reduce: the whole data, from sample statistics to decisions, index, report and manifest, in one
pod."""

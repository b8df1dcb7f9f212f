"""Prepared data: written by prepare, read by the other stages."""

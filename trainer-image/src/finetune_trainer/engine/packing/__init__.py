"""Micro-batches: layout of their documents, transfer to the device, attention and dropout."""

"""Rendering: reads the content of records by format, and renders it to examples."""

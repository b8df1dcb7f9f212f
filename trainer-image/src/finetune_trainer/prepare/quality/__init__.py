"""Data quality checks on texts and tokens, independent of records and their sources."""

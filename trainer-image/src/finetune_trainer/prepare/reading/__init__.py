"""From objects to records: which objects a source has, how they are cut into input splits, and the
records in them, one at a time."""

"""Reading: lists the objects of a source, cuts them into input splits, and streams their
records."""

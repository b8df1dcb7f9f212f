"""The whole data, from facts to verdicts, index and report: what the first worker does once the
others are done."""

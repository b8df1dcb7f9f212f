"""A part of the data, from records to shards and facts: what each worker does, and no worker needs
another for."""

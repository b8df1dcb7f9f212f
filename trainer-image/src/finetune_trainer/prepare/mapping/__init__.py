"""Map: input splits, from raw records to shards and sample statistics, by a pool of processes; no
pod needs another one for it."""

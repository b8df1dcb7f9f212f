"""Map: turns the raw records of input splits into shards and sample statistics, by a pool of
processes. Pods map independently of each other."""

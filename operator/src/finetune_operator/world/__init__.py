"""What is there: the objects of a job in the cluster, and what other jobs have published, as
data that decisions read."""

"""Object storage (boto3 only in ``objectstore``), the embedded server, the base model's files, and
the small files and checkpoints of a run."""

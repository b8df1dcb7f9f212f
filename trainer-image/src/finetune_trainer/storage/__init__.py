"""What lies outside of the process: object storage (boto3 in ``objectstore`` alone), the embedded
server, the base model's files, and the small files and commits of a run."""

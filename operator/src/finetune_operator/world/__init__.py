"""What is there: the children of a job, and the jobs whose models it starts from, as data for
decisions. Pure, and total: odd objects are passed over, never raised on."""

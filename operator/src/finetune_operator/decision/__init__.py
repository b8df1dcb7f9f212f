"""What a pass does about a job: which run it is at, which stage that run is in, and what comes
next. Pure."""

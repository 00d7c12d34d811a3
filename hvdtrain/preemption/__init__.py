"""Taking a host out of a run before it is preempted."""

"""What `covercal deploy` registers on a Prefect server."""

"""What runs: the chain of steps, its plan, and the command line."""

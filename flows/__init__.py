"""What runs: the chain of steps, its plan, and the command line."""

import os

# OpenMP's threads wait for each other by spinning. Where another process has one of the cores, that makes a step of
# many small operations 25 times slower; waiting passively costs 4% on cores of one's own (docs/results.md). Read
# once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

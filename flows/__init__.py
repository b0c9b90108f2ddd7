"""What runs: the chain of steps, its plan, and the command line."""

import os

from covercal.memory import keep_freed

# OpenMP's threads wait for each other by spinning. Where another process has one of the cores, that makes a step of
# many small operations many times slower; not spinning at all costs 40% on cores of one's own. A short spin costs
# little either way (docs/performance.md). Read once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
keep_freed()

"""One module per cached step: each reads artifacts, calls `covercal`, and writes one artifact."""

"""Where artifacts live: keys, manifests, commits, locks, arrays, tables and run records."""

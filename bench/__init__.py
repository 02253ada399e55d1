"""What the sink costs, beside its peers: ``make bench``. What came of it is in docs/performance.md."""

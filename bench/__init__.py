"""What the sink costs, beside its peers. ``make bench`` runs it; docs/performance.md shows what came of it."""

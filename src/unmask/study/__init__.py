"""Evidence: measurements that carry their provenance."""

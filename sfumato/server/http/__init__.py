"""What every route shares: limits, keys, errors, bodies, connections."""

"""Exact weighted k-means of scalars, many independent problems at once."""

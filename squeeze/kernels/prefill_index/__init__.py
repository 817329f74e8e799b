"""Estimate, select and list what a sparse prefill reads."""

"""Causal attention over listed key blocks and single columns (K1)."""

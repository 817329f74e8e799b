"""Prefill policies: which keys a block of queries may see. One file is one policy."""

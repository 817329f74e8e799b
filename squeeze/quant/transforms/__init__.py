"""Exact changes of basis that compose with any KV format. One file is one transform."""

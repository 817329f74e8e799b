"""Quantization of the KV cache (`kv`, `transforms`) and of weights (`weights`)."""

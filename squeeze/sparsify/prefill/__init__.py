"""Prefill policies: which keys a block of queries may see. One file is one policy.

A policy is a frozen dataclass under ``@register`` whose file name is its name and whose field
annotations say which values are allowed. Beside its own parameters it has

- ``min_length: int``: prompts shorter than this are attended densely; the caller asks.
- ``statistics: ClassVar[tuple[str, ...]]``: what it needs from calibration (none of ours does).
- ``index(query, keys, starts, scaling, softcap=None) -> BlockIndex``: ``query [B, H, T, D]`` and
  ``keys [B, H_kv, T, D]`` after RoPE, for causal self-attention of T tokens. ``starts`` is int64
  ``[B]``, the number of left-padding tokens of each row, or ``None`` when there are none.

What every index obeys, and the tests of the registry check: positions count from each row's first
real token, so a row gives the same index alone and in a padded batch; every block of queries lists
block 0 and its diagonal block, so no query is left without a key; ids ascend and never pass the
diagonal; columns lie outside the listed blocks; nothing waits for the device.
"""

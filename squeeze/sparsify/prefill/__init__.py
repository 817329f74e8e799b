"""Prefill policies: which keys a block of queries may see. One file is one policy.

A policy is a frozen dataclass under ``@register`` whose file name is its name and whose field
annotations say which values are allowed. Beside its own parameters it has

- ``min_length: int``: prompts shorter than this are attended densely; the caller asks.
- ``statistics: ClassVar[tuple[str, ...]]``: what it needs from calibration (none of ours does).
- ``index(query, keys, starts, scaling, softcap=None) -> BlockIndex``: ``query [B, H, T_q, D]`` and
  ``keys [B, H_kv, T, D]`` after RoPE, for causal attention of the last T_q of T tokens; T_q < T
  where earlier parts of the prompt came before. ``starts`` is int64 ``[B]``, the number of
  left-padding tokens of each row, or ``None`` when there are none. A policy with ``asks_types``
  takes ``types`` too, int ``[B, T]``, 0 for text; one with ``asks_implementation`` takes
  ``implementation``, of the kernels that it estimates, selects and lists with.

One that calibration can tune head by head has ``tuned``, the name of the parameter that says how
much is read; ``ladder``, values of it from the least read to the most; and a field ``heads``, one
value of it per query head, empty where all have the same.

What every index obeys, and the tests of the registry check: positions count from each row's first
real token, so a row gives the same index alone and in a padded batch; every block of queries lists
block 0 and its diagonal block, so no query is left without a key; ids ascend and never pass the
diagonal; columns lie outside the listed blocks; nothing waits for the device.
"""

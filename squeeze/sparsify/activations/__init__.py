"""Policies that leave inputs of linear layers out. One file is one policy.

A policy is a frozen dataclass under ``@register`` whose file name is its name and whose field
annotations say which values are allowed. Beside its own parameters it has

- ``statistics: tuple[str, ...]``: what it needs from calibration, by linear layer.
- ``fit(weight, statistics) -> Tensor``: of ``weight [out, in]`` the threshold float32 ``[in]`` of
  every channel; inputs whose magnitude is not above it count as zero.
"""

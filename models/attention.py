"""Scaled dot-product attention behind one function.

`sdpa` (PyTorch's own) is always there; flash, sage and xformers are used when importable and asked
for. A back end is part of the numerics profile: it is chosen for a job, never by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from reelpool.errors import ConfigError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# back end -> the package that brings it; sdpa needs none
PACKAGES = {"sdpa": "torch", "flash": "flash_attn", "sage": "sageattention", "xformers": "xformers"}


def available_backends() -> tuple[str, ...]:
    """Names of the attention back ends that can be imported here."""
    return tuple(name for name, package in PACKAGES.items() if find_spec(package) is not None)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    backend: str = "sdpa",
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention over all keys, scaled by 1/sqrt(head_dim).

    Args:
        query: (L, heads, head_dim), any strides with a contiguous last dimension.
        key: (Lk, heads, head_dim), same dtype and device as `query`.
        value: like `key`.
        backend: one of `available_backends()`.
        bias: (Lk,) added to the scores of each key. Only sdpa takes one, so attention with a bias
            (over a few dozen text rows) is computed by sdpa whatever the back end.
    Returns:
        (L, heads, head_dim), same dtype as `query`.
    Raises:
        ConfigError: if the back end is unknown or its package is missing.
    """
    attend = _BACKENDS.get(backend)
    if attend is None or find_spec(PACKAGES[backend]) is None:
        raise ConfigError(
            "--attention",
            f"{backend!r} is not to be had here",
            "use " + ", ".join(available_backends()),
        )
    return attend(query, key, value) if bias is None else _sdpa(query, key, value, bias)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    mask = None if bias is None else bias.expand(1, 1, query.shape[0], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(0).transpose(0, 1)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return cast(Tensor, flash_attn_func(query[None], key[None], value[None])).squeeze(0)


def _sage(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from sageattention import sageattn

    out = sageattn(query[None], key[None], value[None], tensor_layout="NHD")
    return cast(Tensor, out).squeeze(0)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return cast(Tensor, memory_efficient_attention(query[None], key[None], value[None])).squeeze(0)


_BACKENDS: dict[str, Attend] = {
    "sdpa": _sdpa,
    "flash": _flash,
    "sage": _sage,
    "xformers": _xformers,
}

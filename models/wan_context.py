"""What the blocks attend to besides the video: the prompt, and for some models images.

Both are brought to the transformer's width once for a prompt or an image, and every block makes its
keys and values from that. They are the same in every step of a job.

Source: Wan2.1 repository, wan/modules/model.py (WanI2VCrossAttention, MLPProj).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import Linear
from .spec import TransformerSpec, rounded_up
from .wan_weights import BlockWeights, ImageWeights, TextWeights, tensors_of

IMAGE_EPS = 1e-5  # of the image embedding's two norms, in every model


@dataclass(frozen=True)
class Context:
    """Rows of a prompt or of images at the transformer's width.

    Wan pads every prompt to 512 rows and attends to all of them without a mask. The padding rows
    are equal, so a row with log(copies) added to its attention score stands for so many: the same
    function, and for a prompt of 40 words (64 rows) an eighth of the keys, values and scores.

    rows: (n, dim) compute dtype; n <= 512 for a prompt, 257 for each image.
    bias: (n,) added to the scores, in the rows' dtype; None when nothing was folded.
    """

    rows: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one context for one block, (n, heads, head_dim), and their score bias."""

    key: Tensor
    value: Tensor
    bias: Tensor | None = None


def embed_text(weights: TextWeights, prompt_embeds: Tensor) -> Context:
    """Bring encoded text to the transformer's width.

    Args:
        weights: the text projection.
        prompt_embeds: (512, text_dim), padding rows zero; best on the host, where finding equal
            rows waits for no card.
    Returns:
        The context for `text_key_value`, most of the equal padding rows folded into two.
    """
    length = prompt_embeds.shape[0]
    same_as_last = (prompt_embeds == prompt_embeds[-1]).all(dim=-1)
    copies = int(same_as_last.flip(0).long().cumprod(0).sum())
    kept = min(length, rounded_up(length - copies + min(copies, 2)))
    device, dtype = next(tensors_of(weights)).device, weights.first.dtype
    hidden = weights.first(prompt_embeds[:kept].to(device, dtype))
    rows = weights.second(F.gelu(hidden, approximate="tanh"))
    bias = None
    if kept < length:
        bias = torch.zeros(kept, dtype=dtype)
        bias[-2:] = _log_in_two(length - kept + 2, dtype)
        bias = bias.to(rows.device)
    return Context(rows, bias)


def embed_image(weights: ImageWeights, image_embeds: Tensor) -> Context:
    """Bring an image encoder's features to the transformer's width.

    The norms and the positions are computed in float32, the products in the compute dtype.

    Args:
        weights: the image embedding.
        image_embeds: (rows, image_dim) float32, first image first; where the model has a table of
            positions, at most as many rows as that.
    Returns:
        The context for `image_key_value`.
    """
    count, rows = image_embeds.shape[0], image_embeds.float()
    if weights.positions is not None:
        rows = rows + weights.positions[:count]
    normed = F.layer_norm(pad_rows(rows), rows.shape[-1:], *weights.norm_in, IMAGE_EPS)
    inner = F.gelu(weights.first(normed.to(weights.first.dtype)))
    wide = weights.second(inner)
    out = F.layer_norm(wide.float(), wide.shape[-1:], *weights.norm_out, IMAGE_EPS)
    return Context(out[:count].to(wide.dtype))


def text_key_value(spec: TransformerSpec, weights: BlockWeights, context: Context) -> KeyValue:
    """Keys and values of a prompt for one block.

    Args:
        spec: geometry.
        weights: the block.
        context: from `embed_text`.
    """
    return _key_value(spec, weights.cross_kv, weights.cross_norm_k, context)


def image_key_value(spec: TransformerSpec, weights: BlockWeights, context: Context) -> KeyValue:
    """Keys and values of images for one block, of a model that attends to such.

    Args:
        spec: geometry.
        weights: the block.
        context: from `embed_image`.
    """
    assert weights.image_kv is not None
    assert weights.image_norm_k is not None
    return _key_value(spec, weights.image_kv, weights.image_norm_k, context)


def pad_rows(x: Tensor) -> Tensor:
    """(rows, columns) with zero rows behind, up to a multiple of ROW_MULTIPLE."""
    missing = rounded_up(x.shape[0]) - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _key_value(spec: TransformerSpec, both: Linear, norm: Tensor, context: Context) -> KeyValue:
    count, heads = context.rows.shape[0], (spec.num_heads, spec.head_dim)
    key, value = both(pad_rows(context.rows))[:count].chunk(2, dim=-1)
    key = F.rms_norm(key, (spec.dim,), norm, spec.eps)
    value = value.contiguous()  # a view would keep the keys before their norm alive with it
    return KeyValue(key.unflatten(-1, heads), value.unflatten(-1, heads), context.bias)


def _log_in_two(copies: int, dtype: torch.dtype) -> Tensor:
    """Two biases whose exponentials sum to `copies`, though `dtype` be coarse.

    One bfloat16 is too coarse: log(449) is off by 0.013, 1.3 % of the padding's weight. So the
    last is rounded down, and the other, small one stands for its own row and for what is missing:
    the sum is right to 2.6e-4 in bfloat16 and to 3e-6 in float16 for any number up to 512.
    """
    exact = math.log(copies - 1)
    last = torch.tensor(exact, dtype=dtype).item()
    if last > exact:
        last -= torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(last))
    return torch.tensor([math.log(copies - math.exp(last)), last], dtype=dtype)

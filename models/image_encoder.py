"""The CLIP vision tower of Wan 2.1's image-to-video models: from pixels to features.

Two layouts, each with any prefix: transformers' (ComfyUI's clip_vision_h too), and Wan's own `.pth`
that holds a whole open-CLIP XLM-RoBERTa ViT-H/14. The features are the hidden states that the last
block would get, so that block, the norm and the head behind it are never read.

Source: Wan2.1 repository, wan/modules/clip.py (layout, treatment of the image, the block left out).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelpool.errors import ConfigError, MissingTensor, NumericError, WeightError

from .fp8 import with_scales
from .plain_weights import load_plain
from .quant import Matrix, Quantised
from .spec import ImageEncoderSpec
from .weights import TensorInfo, WeightSource, check_tensors

WANTED = "a CLIP vision encoder: ViT-H/14"
ADVICE = (
    "usual files: clip_vision_h.safetensors, "
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
)
PREFIX = "vision_model."  # of transformers' names, which are ours
ACTIVATIONS = ("gelu", "quick_gelu")

# OpenAI's CLIP, whose statistics open-CLIP kept
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_CLASS = "embeddings.class_embedding"
_PATCH = "embeddings.patch_embedding.weight"
_POSITIONS = "embeddings.position_embedding.weight"
# transformers <- original: outside of the blocks (whole names), and layers inside of a block
_OUTER = {
    _CLASS: "cls_embedding",
    _PATCH: "patch_embedding.weight",
    _POSITIONS: "pos_embedding",
    "pre_layrnorm.weight": "pre_norm.weight",  # the misspelling is transformers'
    "pre_layrnorm.bias": "pre_norm.bias",
}
_INNER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # thirds of attn.to_qkv
_PROBE = "encoder.layers.0.self_attn.q_proj.weight"
_ORIGINAL_PROBE = "transformer.0.attn.to_qkv.weight"

_OTHERS = (
    (re.compile(r"(^|\.)text_model\.encoder\.|(^|\.)textual\."), "a CLIP text encoder"),
    (re.compile(r"\.resblocks\.0\."), "a CLIP encoder under open_clip's own names"),
    (re.compile(r"SelfAttention|(^|\.)enc\.blk\.0\."), "a T5 text encoder"),
    (re.compile(r"(^|\.)blocks\.0\.(self_attn|attn1)\."), "a diffusion transformer"),
)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: a stored one, or the third of its rows with that number."""

    name: str
    third: int | None = None


class _ImageSource:
    """A file's tensors under transformers' names: thirds of some, others without leading ones."""

    def __init__(self, source: WeightSource, places: Mapping[str, _Place]) -> None:
        self._source = source
        self._places = dict(places)

    @property
    def where(self) -> str:
        """The underlying file."""
        return self._source.where

    def names(self) -> Iterator[str]:
        """Transformers' names."""
        return iter(self._places)

    def info(self, name: str) -> TensorInfo:
        """Place of one tensor; raises MissingTensor."""
        place = self._place(name)
        info = self._source.info(place.name)
        if place.third is not None and (not info.shape or info.shape[0] % 3):
            found = f"tensor {info.name} of shape {list(info.shape)}"
            raise WeightError(info.file, found, "three matrices of one size, stacked")
        return replace(info, shape=_shape(info.shape, name, place))

    def get(self, name: str) -> Tensor:
        """A view of one plain tensor; raises MissingTensor, or WeightError for a quantised one."""
        matrix = self.matrix(name)
        if isinstance(matrix, Quantised):
            raise WeightError(self.where, f"tensor {name} as {matrix.kind}", "a plain tensor")
        return matrix

    def matrix(self, name: str) -> Matrix:
        """A view of one tensor, quantised or not; raises MissingTensor."""
        place = self._place(name)
        matrix = self._source.matrix(place.name)
        if place.third is not None:
            rows = matrix.shape[0] // 3
            start, stop = place.third * rows, (place.third + 1) * rows
            return matrix.rows(start, stop) if isinstance(matrix, Quantised) else matrix[start:stop]
        if isinstance(matrix, Quantised):
            return matrix
        return matrix.view(_shape(tuple(matrix.shape), name, place))

    def _place(self, name: str) -> _Place:
        try:
            return self._places[name]
        except KeyError:
            raise MissingTensor(self.where, name, "it among the file's tensors") from None


def _shape(stored: tuple[int, ...], name: str, place: _Place) -> tuple[int, ...]:
    """Shape under the wanted name: a third of the rows; tables without leading axes of 1."""
    if place.third is not None:
        return (stored[0] // 3, *stored[1:])
    rank = {_CLASS: 1, _POSITIONS: 2}.get(name.removeprefix(PREFIX))
    while rank is not None and len(stored) > rank and stored[0] == 1:
        stored = stored[1:]
    return stored


def open_image_encoder(
    source: WeightSource, config: Mapping[str, object] | None = None
) -> tuple[ImageEncoderSpec, WeightSource]:
    """Recognise a CLIP vision tower and see it under transformers' names.

    Args:
        source: the file's tensors as stored.
        config: the content of its config.json, if there is one: heads, activation and epsilon
            cannot be seen from shapes. All else is taken from the shapes.
    Returns:
        Its geometry, and its weights under the names of `image_tensors`, all checked.
    Raises:
        MissingTensor, ShapeMismatch: if a tensor is not there or does not fit.
        WeightError: if it is something else than a CLIP vision tower.
    """
    source = with_scales(source)
    names = set(source.names())
    prefix, is_original = _recognise(names, source.where)
    blocks = f"{prefix}{'transformer' if is_original else 'encoder.layers'}."
    rests = (name[len(blocks) :] for name in names if name.startswith(blocks))
    num_layers = len({rest.partition(".")[0] for rest in rests})
    renamed = _ImageSource(source, _places(prefix, is_original, num_layers))
    spec = _geometry(renamed, num_layers, config or {})
    check_tensors(renamed, image_tensors(spec))
    return spec, renamed


def _recognise(names: Iterable[str], where: str) -> tuple[str, bool]:
    """The prefix of all names, and whether they are the original ones."""
    for probe in (_PROBE, _ORIGINAL_PROBE):
        for name in sorted(names):
            prefix = name.removesuffix(probe)
            # transformers calls the layers of CLIP's two towers the same
            if prefix != name and prefix[-1:] in ("", ".") and not prefix.endswith("text_model."):
                return prefix, probe == _ORIGINAL_PROBE
    for pattern, kind in _OTHERS:
        if any(map(pattern.search, names)):
            raise WeightError(where, kind, WANTED, ADVICE)
    raise WeightError(where, "no names of an image encoder", WANTED, ADVICE)


def _places(prefix: str, is_original: bool, num_layers: int) -> dict[str, _Place]:
    """Transformers' names to where the tensors lie, whether they are there or not."""
    places = {ours: theirs if is_original else ours for ours, theirs in _OUTER.items()}
    found = {PREFIX + ours: _Place(prefix + stored) for ours, stored in places.items()}
    for index in range(num_layers - 1):
        ours_block = f"{PREFIX}encoder.layers.{index}."
        block = f"{prefix}{'transformer' if is_original else 'encoder.layers'}.{index}."
        for kind in ("weight", "bias"):
            for ours, theirs in _INNER.items():
                stored = theirs if is_original else ours
                found[f"{ours_block}{ours}.{kind}"] = _Place(f"{block}{stored}.{kind}")
            for third, ours in enumerate(_QKV):
                place = _Place(f"{block}{ours}.{kind}")
                if is_original:
                    place = _Place(f"{block}attn.to_qkv.{kind}", third)
                found[f"{ours_block}{ours}.{kind}"] = place
    return found


def _geometry(
    source: WeightSource, num_layers: int, config: Mapping[str, object]
) -> ImageEncoderSpec:
    """Sizes by shapes; what they cannot tell by the config, or as ViT-H/14 has it."""
    if num_layers < 2:
        raise WeightError(source.where, f"{num_layers} blocks", "at least 2")
    dim, channels, patch, width = _sizes(source, _PATCH, 4)
    if channels != 3 or patch != width:
        found = f"patches of {channels} channels, {patch} x {width} pixels"
        raise WeightError(source.where, found, "3 channels, as many rows as columns")
    rows, _ = _sizes(source, _POSITIONS, 2)
    side = math.isqrt(rows - 1)
    if side * side != rows - 1 or side == 0:
        found = f"{rows} positions"
        raise WeightError(source.where, found, "a square of patches, and one for the class token")
    ffn_dim, _ = _sizes(source, "encoder.layers.0.mlp.fc1.weight", 2)
    defaults = ImageEncoderSpec()
    activation = config.get("hidden_act", defaults.activation)
    if activation not in ACTIVATIONS:
        found = f"hidden_act {activation!r} in its config.json"
        raise WeightError(source.where, found, " or ".join(ACTIVATIONS))
    eps = config.get("layer_norm_eps", defaults.eps)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        found = f"layer_norm_eps {eps!r} in its config.json"
        raise WeightError(source.where, found, "a number from 0 to 1")
    return ImageEncoderSpec(
        dim=dim,
        num_layers=num_layers,
        num_heads=_num_heads(source, dim, config.get("num_attention_heads")),
        ffn_dim=ffn_dim,
        image_size=side * patch,
        patch_size=patch,
        activation=str(activation),
        eps=float(eps),
    )


def _num_heads(source: WeightSource, dim: int, stated: object) -> int:
    """Heads of 80 channels, as ViT-H has them, unless the config says how many there are."""
    if stated is None:
        if dim % 80:
            raise WeightError(source.where, f"a vision encoder of width {dim}", WANTED, ADVICE)
        return dim // 80
    if type(stated) is not int or stated < 1 or dim % stated:
        found = f"{stated!r} heads in its config.json for a width of {dim}"
        raise WeightError(source.where, found, f"a divisor of {dim}")
    return stated


def _sizes(source: WeightSource, name: str, rank: int) -> tuple[int, ...]:
    info = source.info(PREFIX + name)
    if len(info.shape) != rank or math.prod(info.shape) == 0:
        found = f"tensor {info.name} of shape {list(info.shape)}"
        raise WeightError(source.where, found, f"{rank} axes, none of them empty")
    return info.shape


def image_tensors(spec: ImageEncoderSpec) -> dict[str, tuple[int, ...]]:
    """Names (transformers) and shapes of what is used: not the last block, nothing behind it."""
    d, f, patch = spec.dim, spec.ffn_dim, spec.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        _CLASS: (d,),
        _PATCH: (d, 3, patch, patch),
        _POSITIONS: (spec.num_tokens, d),
        "pre_layrnorm.weight": (d,),
        "pre_layrnorm.bias": (d,),
    }
    layers: dict[str, tuple[int, ...]] = dict.fromkeys((*_QKV, "self_attn.out_proj"), (d, d))
    layers |= {"mlp.fc1": (f, d), "mlp.fc2": (d, f), "layer_norm1": (d,), "layer_norm2": (d,)}
    for index in range(spec.num_layers - 1):
        for layer, shape in layers.items():
            shapes[f"encoder.layers.{index}.{layer}.weight"] = shape
            shapes[f"encoder.layers.{index}.{layer}.bias"] = shape[:1]
    return {PREFIX + name: shape for name, shape in shapes.items()}


class ImageEncoder:
    """The vision tower of one model, on one device. Not thread-safe."""

    def __init__(
        self,
        spec: ImageEncoderSpec,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Load the weights.

        Args:
            spec: geometry.
            source: the weights under transformers' names, already checked; quantised ones are
                decoded to `dtype`.
            dtype: compute type.
            device: where to compute.
        Raises:
            WeightError: if a weight is not finite.
        """
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._model = _load_tower(spec, source, dtype, device)

    def encode(self, images: Tensor) -> Tensor:
        """Features of whole images, squashed to the tower's square (not cropped), bicubic.

        Args:
            images: (n, 3, H, W) float32, 0 to 1.
        Returns:
            (n * num_tokens, dim) float32 on the CPU.
        Raises:
            ConfigError: if the images have another shape.
            NumericError: if the compute type cannot hold the values.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
            raise ConfigError("images", f"shape {list(images.shape)}", "expected (n, 3, H, W)")
        pixels = normalise(images.to(self._device), self._spec.image_size).to(self._dtype)
        with torch.inference_mode():
            features: Tensor = self._model(pixel_values=pixels).last_hidden_state
        rows = features.flatten(0, 1).float().cpu()
        if not rows.isfinite().all():
            raise NumericError("encode_image", "the features", "compute in bfloat16 or float32")
        return rows

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights held."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())


def normalise(images: Tensor, size: int) -> Tensor:
    """Squash (n, 3, H, W) of 0 to 1 to (n, 3, size, size) and to CLIP's statistics, float32.

    Like Wan's code, bicubic without antialiasing: a large image is sampled, not averaged.
    """
    squashed = F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (squashed - mean) / std


def _load_tower(
    spec: ImageEncoderSpec, source: WeightSource, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=spec.dim,
        intermediate_size=spec.ffn_dim,
        num_hidden_layers=spec.num_layers - 1,
        num_attention_heads=spec.num_heads,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        hidden_act=spec.activation,
        layer_norm_eps=spec.eps,
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    tower = getattr(model, "vision_model", model)  # of transformers 4 it is inside, of 5 itself
    tower.post_layernorm = nn.Identity()  # it serves the pooled output, which nobody reads
    tower.embeddings.position_ids = torch.arange(spec.num_tokens, device=device).view(1, -1)
    weights = {
        name.removeprefix(PREFIX): load_plain(source, name, dtype, device)
        for name in image_tensors(spec)
    }
    tower.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    return cast(nn.Module, model)

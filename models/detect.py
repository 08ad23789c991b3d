"""What a transformer is, by the names and shapes of its tensors. Free of torch.

Names and shapes decide; a config.json gives what they cannot tell (heads, eps) and must not
contradict them, but for the keys of image models: copies of the 5B config.json have them although
its weights do not.

Two things cannot be seen: which expert of a two-expert model a file is, and that a SkyReels model
without frame-rate embedding is for diffusion forcing. Names of files tell those.
Source: the configurations of Wan2.1, Wan2.2 and SkyReels-V2; the rules of ComfyUI and kijai's
wrapper.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from reelpool.errors import MissingTensor, WeightError

from .spec import ImageInput, TransformerSpec

HEAD_DIM = 128  # of every Wan model; smaller ones say theirs in config.json
MAX_LAYERS = 1000
MAX_SIZE = 2**31 - 1
TI2V_CHANNELS = 48  # of the Wan 2.2 VAE, which only TI2V-5B has

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelTraits:
    """What kind of model a transformer is for; see `ModelSpec`.

    quant: the type of most of the blocks' matrices: "bf16", "q4_k", "fp8_e4m3 scaled".
    """

    variant: str
    image: ImageInput
    quant: str


# part of a name, up to a dot: what only such models have
_UNSUPPORTED = (
    ("vace_patch_embedding", "VACE"),
    ("vace_blocks", "VACE"),
    ("casual_audio_encoder", "Wan 2.2 S2V"),  # so spelled in the model
    ("audio_injector", "Wan 2.2 S2V"),
    ("audio_proj", "HuMo"),
    ("face_adapter", "Wan 2.2 Animate"),
    ("pose_patch_embedding", "Wan 2.2 Animate"),
    ("control_adapter", "Fun-Camera"),
    ("ref_conv", "Fun-Control"),
    ("video_model", "Ovi"),
)
# what a file is that is no transformer of Wan's
_OTHERS = (
    (r"lora_(up|down|A|B)\b|\.diff(_b)?$", "a LoRA", "give it as --lora"),
    (r"(^|\.)double_blocks\.|(^|\.)transformer_blocks\.", "another kind of transformer", ""),
    (r"(^|\.)visual\.|vision_model\.", "a CLIP image encoder", "give it as --image-encoder"),
    (r"(^|\.)(decoder|encoder)\.(conv_in|conv1|middle)\.", "a VAE", "give it as --vae"),
    (
        r"token_embd|shared\.weight|token_embedding",
        "a text encoder",
        "give it as --text-encoder",
    ),
    (r"(^|\.)input_blocks\.|down_blocks\.", "an image model", ""),
)
_WANTED = "a Wan transformer"


def refuse_unsupported(where: str, names: Iterable[str]) -> None:
    """Refuse variants that this version cannot run.

    Raises:
        WeightError: naming the variant.
    """
    first = {part: name for name in names for part in name.split(".")}
    for part, kind in _UNSUPPORTED:
        if part in first:
            raise WeightError(
                where,
                f"a {kind} model (tensor {first[part]})",
                "a model for text or images to video, without further controls",
                f"{kind} models cannot be run yet",
            )


def refuse_other(where: str, names: Iterable[str]) -> WeightError:
    """The error for a file in which no Wan transformer is, saying what it seems to be."""
    known = list(names)
    for pattern, kind, advice in _OTHERS:
        if any(re.search(pattern, name) for name in known):
            return WeightError(where, kind, _WANTED, advice)
    some = f"tensor {known[0]} and others" if known else "no tensors"
    return WeightError(where, some, _WANTED, "is it a model's file?")


def detect(
    where: str, shapes: Shapes, config: Mapping[str, object], config_file: str, name: str
) -> tuple[TransformerSpec, str, ImageInput]:
    """Geometry, variant and image input of a transformer.

    Args:
        where: the weights, for messages.
        shapes: canonical names and the shapes of the values, axes of 1 left out or not.
        config: content of its config.json, diffusers' or the original's; empty without.
        config_file: that file, for messages.
        name: words of its name and folders, for what nothing else tells.

    Raises:
        MissingTensor: if one is not there that must be.
        WeightError: if it cannot be run, or something in it cannot be.
    """
    hints = _Hints(config_file, config)
    spec = _geometry(_Shapes(where, shapes), hints)
    variant, image = variant_of(where, spec, name)
    return spec, variant, image


class _Shapes:
    """Shapes by name; a missing one is an error."""

    def __init__(self, where: str, shapes: Shapes) -> None:
        self.where = where
        self.all = shapes

    def axes(self, name: str, rank: int) -> tuple[int, ...]:
        if name not in self.all:
            raise MissingTensor(self.where, name, "it in a Wan transformer")
        shape = self.all[name]
        if len(shape) != rank or min(shape) < 1 or max(shape) > MAX_SIZE:
            found = f"tensor {name} of shape {list(shape)}"
            raise WeightError(self.where, found, f"{rank} axes of 1 to {MAX_SIZE}")
        return shape

    def num_values(self, name: str) -> int:
        if name not in self.all:
            raise MissingTensor(self.where, name, "it in a Wan transformer")
        return math.prod(self.all[name])


class _Hints:
    """A config.json whose keys go by either of two spellings."""

    def __init__(self, where: str, config: Mapping[str, object]) -> None:
        self.where = where
        self._config = config

    def refuse(self, found: str, expected: str) -> WeightError:
        return WeightError(self.where, found, expected)

    def count(self, keys: str, default: int, at_most: int = MAX_SIZE) -> int:
        """A whole number under one of two names, split by a space."""
        for key in keys.split():
            value = self._config.get(key)
            if value is not None:
                if type(value) is not int or not 0 < value <= at_most:
                    raise self.refuse(f"{key} {value!r}", f"a whole number from 1 to {at_most}")
                return value
        return default

    def number(self, key: str, default: float) -> float:
        value = self._config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise self.refuse(f"{key} {value!r}", "a number of at least 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._config.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} {value!r}", "true or false")
        return value

    def only(self, key: str, *allowed: object) -> None:
        """A key that must be absent or have one of these values."""
        value = self._config.get(key, allowed[0])
        if value not in allowed:
            raise self.refuse(f"{key} {value!r}", " or ".join(map(str, allowed)))


def _geometry(shapes: _Shapes, hints: _Hints) -> TransformerSpec:
    """Sizes as the config says them, else by shapes; `layouts` compares both, tensor by tensor."""
    hints.only("qk_norm", "rms_norm_across_heads", True)
    hints.only("patch_size", [1, 2, 2], (1, 2, 2))
    dim, text_dim = shapes.axes("text_embedding.0.weight", 2)
    heads, head_dim = _heads(shapes.where, dim, hints)
    out = shapes.axes("head.head.weight", 2)[0]
    in_values = shapes.num_values("patch_embedding.weight")
    if out % 4 or in_values % (4 * dim) or not 0 < in_values <= MAX_SIZE:
        found = f"{out} outputs and {in_values} values in patch_embedding.weight"
        raise WeightError(shapes.where, found, "patches of 1x2x2")
    has_image = any(
        name.startswith("img_emb.") or name.endswith(".k_img.weight") for name in shapes.all
    )
    image_dim = shapes.axes("img_emb.proj.1.weight", 2)[1] if has_image else 0
    positions = 0
    if "img_emb.emb_pos" in shapes.all:
        positions = shapes.num_values("img_emb.emb_pos") // max(image_dim, 1)
    spec = TransformerSpec(
        num_heads=heads,
        head_dim=head_dim,
        ffn_dim=hints.count("ffn_dim", shapes.axes("blocks.0.ffn.0.weight", 2)[0]),
        num_layers=hints.count("num_layers", _num_layers(shapes), MAX_LAYERS),
        in_channels=hints.count("in_channels in_dim", in_values // (4 * dim)),
        out_channels=hints.count("out_channels out_dim", out // 4),
        text_dim=hints.count("text_dim", text_dim),
        freq_dim=hints.count("freq_dim", shapes.axes("time_embedding.0.weight", 2)[1]),
        eps=hints.number("eps", 1e-6),
        cross_norm=hints.flag("cross_attn_norm", "blocks.0.norm3.weight" in shapes.all),
        image_dim=image_dim,
        image_positions=positions,
        fps_embedding="fps_embedding.weight" in shapes.all,
    )
    if spec.head_dim % 2 or spec.freq_dim % 2:
        found = f"heads of {spec.head_dim}, freq_dim {spec.freq_dim}"
        raise WeightError(hints.where, found, "even numbers")
    return spec


def _heads(where: str, dim: int, hints: _Hints) -> tuple[int, int]:
    """(heads, width of one): as the config says, else of 128."""
    heads = hints.count("num_attention_heads num_heads", 0)
    head_dim = hints.count("attention_head_dim", 0)
    if heads and head_dim:
        return heads, head_dim
    given = heads or head_dim
    width = given or HEAD_DIM
    if dim % width:
        found = f"a width of {dim}, of which the heads cannot be told"
        raise WeightError(
            where, found, f"a multiple of {width}", "put the model's config.json beside it"
        )
    return (heads, dim // heads) if heads else (dim // width, width)


def _num_layers(shapes: _Shapes) -> int:
    """One more than the highest number of a block: gaps are missing tensors then."""
    numbers = {
        int(match[1]) for name in shapes.all if (match := re.match(r"blocks\.(\d{1,9})\.", name))
    }
    count = max(numbers, default=-1) + 1
    if not 0 < count <= MAX_LAYERS:
        raise WeightError(shapes.where, f"{count} blocks", f"1 to {MAX_LAYERS}")
    return count


def variant_of(where: str, spec: TransformerSpec, name: str) -> tuple[str, ImageInput]:
    """By channels: noise alone; noise, 4 of mask and the image's."""
    channels, out = spec.in_channels, spec.out_channels
    if channels == 2 * out + 4:
        return ("flf2v" if spec.image_positions else "i2v"), "concat"
    if channels == out and not spec.image_dim:
        if out == TI2V_CHANNELS:
            return "ti2v", "first-frame"
        return ("df" if spec.fps_embedding or _is_forcing(name) else "t2v"), ""
    kind = "a Fun-Control model: " if channels in (3 * out, 3 * out + 4) else ""
    raise WeightError(
        where,
        f"{kind}in_channels {channels}, out_channels {out}"
        + (" and image features" if spec.image_dim else ""),
        f"{out} in_channels, as text-to-video models have, or {2 * out + 4} for images",
        "this variant cannot be run yet",
    )


def _is_forcing(name: str) -> bool:
    """SkyReels' diffusion-forcing models, by their names alone."""
    words = name.lower()
    return "skyreels" in words and bool(
        re.search(r"(?<![a-z0-9])df(?![a-z0-9])|diffusion[-_ ]?forcing", words)
    )

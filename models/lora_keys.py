"""Names of LoRA entries: which layer of the transformer a stored name means, and what it holds.

Trainers write the same entry under a dozen names. One is read from its end, which tells what it
holds, and from its front, where a tool's prefix is taken off until a layer of the transformer
remains. Names whose dots became underscores are looked up among the layers' names written that
way. It knows neither shapes nor whether a model has the layer (`lora`).

Source: the names that ComfyUI, kijai's wrapper, diffusers and lightx2v read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .keys import to_diffusers, transformer_tensors
from .spec import TransformerSpec

# What an entry holds, by how its name ends. peft puts the adapter's name before `.weight`; `_lora`
# and `lora_linear_layer` are older diffusers; w_norm and b_norm are LyCORIS' differences of norms.
_ADAPTER = r"(?:\.[^.]+){0,2}"
_FACTOR = r"(?:lora_[AB]|lora_up|lora_down|lora\.up|lora\.down)"
_KINDS = {
    "scaled": rf"[._]{_FACTOR}(?:\.[^.]+){{0,2}}\.(?:scale_weight|weight_scale)",
    "up_bias": r"\.(?:lora_B|lora_up)(?:\.[^.]+)?\.bias",
    "down": rf"[._](?:lora_A|lora_down|lora\.down|lora_linear_layer\.down){_ADAPTER}",
    "up": rf"[._](?:lora_B|lora_up|lora\.up|lora_linear_layer\.up){_ADAPTER}",
    "alpha": r"\.alpha",
    "diff_m": r"\.diff_m",
    "diff_b": r"\.(?:diff_b|b_norm)",
    "diff": r"\.(?:diff|w_norm)",
    "dora": r"\.(?:dora_scale|lora_magnitude_vector(?:\.[^.]+){0,2})",
    "set_weight": r"\.(?:set_weight|reshape_weight)",
    "loha": r"\.hada_(?:w|t)\w*",
    "lokr": r"\.lokr_(?:w|t)\w*",
    "tucker": r"\.lora_mid(?:\.weight)?",
    "oft": r"\.(?:oft_blocks|oft_diag|oft_R\S*)",
}
_ENDINGS = {kind: re.compile(rf"(.+?){pattern}") for kind, pattern in _KINDS.items()}

_DOTTED = (
    "base_model.model.",
    "_orig_mod.",
    "module.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "transformer_2.",
    "pipe.",
    "dit.",
    "unet.",
)
_LOW = re.compile(r"(?:base_model\.model\.)?transformer_2\.")
_UNDERSCORED = re.compile(r"(?:lora_unet|lora_transformer|lora_dit|lycoris)_+(.+)")
_BLOCK = re.compile(r"blocks[._](\d{1,9})[._](.+)")

MAX_NAME = 500  # characters; prefixes are taken off one by one, and names met have up to 100

_TEXT = re.compile(
    r"(?:lora_)?(?:te\d?|text_encoders?\w*|text_model|cond_stage_model|conditioner)[._]"
)
# Layers that other models have and no Wan transformer has.
_OTHERS = {
    r"vace_blocks": "VACE's control branch, which this version does not run",
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux or HunyuanVideo",
    r"down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks": "Stable Diffusion",
    r"transformer_blocks": "another model: its blocks are called transformer_blocks",
}


@dataclass(frozen=True)
class LoraKey:
    """What one stored name means.

    name: as stored.
    kind: "down", "up", "up_bias", "alpha", "diff" (of a weight, a norm or a modulation), "diff_b"
        (of a bias), one that is refused: "dora", "set_weight", "loha", "lokr", "tucker", "oft",
        "scaled" (a scale of an fp8 factor); "" when it is no entry of a LoRA.
    target: the canonical layer, such as blocks.3.self_attn.q or blocks.3.modulation; "" when it
        means none.
    problem: why there is no target or no kind, else "".
    """

    name: str
    kind: str
    target: str
    problem: str = ""

    @property
    def is_low(self) -> bool:
        """Whether its name says the low-noise expert, which diffusers calls transformer_2."""
        return _LOW.match(self.name) is not None


@dataclass(frozen=True)
class LayerNames:
    """Every way to write a layer's name, dots and underscores, and the canonical one it means.

    outer: layers outside of the blocks. inner: those of a block, without the block's prefix.
    """

    outer: Mapping[str, str]
    inner: Mapping[str, str]


def layer_names() -> LayerNames:
    """The names of all layers that Wan transformers have, those for images and frame rate too."""
    spec = TransformerSpec(
        1, 1, 1, 1, 1, 1, image_dim=1, image_positions=1, fps_embedding=True, cross_norm=True
    )
    outer: dict[str, str] = {}
    inner: dict[str, str] = {}
    for tensor in transformer_tensors(spec):
        target = layer_of(tensor)
        for name in (target, layer_of(to_diffusers(tensor))):
            table, ours = (outer, target)
            if name.startswith("blocks.0."):
                table, name, ours = inner, name[9:], target[9:]
            table |= {name: ours, name.replace(".", "_"): ours}
    for part in ("attn1", "attn2"):  # trainers leave the index of to_out away
        inner |= {f"{part}{dot}to_out": inner[f"{part}.to_out.0"] for dot in "._"}
    return LayerNames(outer, inner)


def layer_of(tensor: str) -> str:
    """The layer that a canonical tensor belongs to.

    >>> layer_of("blocks.3.self_attn.q.weight"), layer_of("blocks.3.modulation")
    ('blocks.3.self_attn.q', 'blocks.3.modulation')
    """
    return tensor.removesuffix(".weight").removesuffix(".bias")


def read_key(name: str, names: LayerNames) -> LoraKey:
    """Read one stored name.

    >>> names = layer_names()
    >>> read_key("lora_unet_blocks_3_self_attn_q.lora_down.weight", names).target
    'blocks.3.self_attn.q'
    >>> read_key("transformer.blocks.12.attn2.to_out.0.lora_B.weight", names).target
    'blocks.12.cross_attn.o'
    >>> read_key("lora_te_text_model_layers_0_mlp_fc1.alpha", names).problem
    'a layer of a text encoder'
    """
    kind, path = _ending(name) if len(name) <= MAX_NAME else ("", name)
    if not kind:
        return LoraKey(name, "", "", "no entry of a LoRA")
    if kind == "diff_m":  # of a block or the head: it changes their modulation
        kind, path = "diff", f"{path.removesuffix('.modulation')}.modulation"
    target = _target(path, names)
    if target:
        return LoraKey(name, kind, target)
    return LoraKey(name, kind, "", _stranger(path))


def _ending(name: str) -> tuple[str, str]:
    """What the entry holds and the name in front of that; "" and the name if nothing known."""
    for kind, pattern in _ENDINGS.items():
        match = pattern.fullmatch(name)
        if match:
            return kind, match[1]
    return "", name


def _target(path: str, names: LayerNames) -> str:
    """The canonical layer a path means, "" if none."""
    underscored = _UNDERSCORED.fullmatch(path)
    if underscored:
        return _plain(underscored[1], names)
    found = _plain(path, names)
    while not found:
        prefix = next((p for p in _DOTTED if path.startswith(p)), "")
        if not prefix:
            return ""
        path = path.removeprefix(prefix)
        found = _plain(path, names)
    return found


def _plain(path: str, names: LayerNames) -> str:
    match = _BLOCK.fullmatch(path)
    if match:
        inner = names.inner.get(match[2], "")
        return inner and f"blocks.{int(match[1])}.{inner}"
    return names.outer.get(path, "")


def _stranger(path: str) -> str:
    """What a path without a layer of ours belongs to."""
    if _TEXT.match(path):
        return "a layer of a text encoder"
    for pattern, owner in _OTHERS.items():
        if re.search(rf"(?:^|[._])(?:{pattern})[._]", path):
            return f"a layer of {owner}"
    return "no layer of a Wan transformer"

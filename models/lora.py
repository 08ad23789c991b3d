"""LoRA files: opened, and matched with the layers of a model.

A LoRA is applied as a side branch, y = x Wᵀ + s · (alpha / rank) · (x downᵀ) upᵀ, and never merged:
so it works the same on plain and quantised weights, and another strength reloads nothing. What
cannot run beside a product, a difference of a norm, a bias or a modulation, is added to a copy of
that vector. Here entries are read, checked against a model's geometry and reported; how they get
onto weights is in `lora_weights`.

Source: the loaders of diffusers, ComfyUI and lightx2v.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reelpool.errors import WeightError

from .catalogue import is_weights
from .files import files_digest
from .finite import check_finite
from .keys import transformer_tensors
from .lora_keys import LoraKey, layer_names, read_key
from .lora_scaling import ADAPTER, Scaling, read_scaling
from .open_weights import open_weights
from .spec import TransformerSpec
from .weights import WeightSource

# Entries that a side branch cannot stand for: what they are, and what to do.
_REFUSED = {
    "dora": ("DoRA entries, which rescale the merged weight", "use a LoRA without DoRA"),
    "set_weight": (
        "entries that replace or reshape a weight (set_weight, reshape_weight)",
        "use a file of differences, or the whole changed model",
    ),
    "loha": ("LoHa entries (hada_*), products of two low-rank matrices", "convert it to a LoRA"),
    "lokr": ("LoKr entries (lokr_*), Kronecker products", "convert it to a LoRA"),
    "tucker": ("entries with a middle factor (lora_mid)", "convert it to a plain LoRA"),
    "oft": ("OFT entries, which rotate the weight", "use a LoRA"),
    "scaled": ("fp8 factors that have scales of their own", "use a 16-bit one"),
}
_FACTORS = ("down", "up", "up_bias", "alpha")
_ALONE = {
    "down": "a down factor without its up factor",
    "up": "an up factor without its down factor",
    "": "an alpha or a bias without factors",
}
_SIZES = {1536: "1.3B", 3072: "5B", 5120: "14B"}  # Wan's widths
_SQUARE = tuple(f"{part}_attn.{layer}" for part in ("self", "cross") for layer in "qkvo")


@dataclass(frozen=True)
class LoraLayer:
    """Stored names of what a file holds for one layer, "" for what it does not.

    scale: of the factors and of `up_bias`, at strength 1.
    """

    down: str = ""
    up: str = ""
    up_bias: str = ""
    diff: str = ""
    diff_b: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Unmatched:
    """An entry that is not applied, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class LoraReport:
    """What of a LoRA applies to a model.

    layers: by canonical name.
    is_low: its names say that it was made for the low-noise expert.
    """

    where: str
    layers: Mapping[str, LoraLayer]
    unmatched: tuple[Unmatched, ...]
    num_keys: int
    is_low: bool = False

    @property
    def share(self) -> float:
        """Share of the file's entries that are applied, 0 to 1."""
        return 1 - len(self.unmatched) / self.num_keys

    def describe(self) -> list[str]:
        """The report in lines: what is applied, then each reason with its number of entries.

        A file whose names say that it is for the low-noise expert is applied as the user says.
        """
        applied = self.num_keys - len(self.unmatched)
        lines = [
            f"{self.where}: {applied} of {self.num_keys} entries applied, to "
            f"{len(self.layers)} layers"
        ]
        if self.is_low:
            lines.append(
                "its names say that it is for the low-noise expert: FILE:0,1 leaves the other alone"
            )
        counts = Counter(entry.reason for entry in self.unmatched)
        first = {entry.reason: entry.key for entry in reversed(self.unmatched)}
        return lines + [
            f"not applied: {count} x {reason} ({first[reason]})"
            for reason, count in counts.most_common()
        ]


@dataclass(frozen=True, eq=False)
class LoraFile:
    """An opened LoRA: nothing but headers is read until its tensors are asked for.

    digest: tells LoRAs apart.
    keys: every stored name, read.
    """

    where: str
    source: WeightSource
    digest: str
    keys: tuple[LoraKey, ...]
    scaling: Scaling

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor in a type.

        Raises:
            WeightError: if it has values that are not finite.
        """
        return check_finite(self.source, name, self.source.get(name).to(dtype))

    def match(self, spec: TransformerSpec) -> LoraReport:
        """Find the layers of a model that the entries are for. Reads alphas, no factors.

        Raises:
            WeightError: if none of them fits, or none of those for blocks: what the file seems to
                be made for.
        """
        shapes = transformer_tensors(spec)
        unmatched: list[Unmatched] = []
        found: dict[str, dict[str, str]] = {}
        for key in self.keys:
            entries = found.setdefault(key.target, {})
            problem = key.problem or _absent(key.target, spec, shapes)
            if not problem and key.kind in entries:
                problem = "a second entry for the same layer"
            if problem:
                unmatched.append(Unmatched(key.name, problem))
            else:
                entries[key.kind] = key.name
        layers = {}
        for target, entries in found.items():
            layer, rest = self._layer(target, entries, shapes)
            unmatched += rest
            if layer != LoraLayer():
                layers[target] = layer
        # the head's bias and the image embedding have the same size in models of any width
        has_blocks = any(target.startswith("blocks.") for target in found)
        if not any(target.startswith("blocks.") or not has_blocks for target in layers):
            raise self._nothing_fits(spec, unmatched)
        is_low = any(key.is_low for key in self.keys)
        return LoraReport(self.where, layers, tuple(unmatched), len(self.keys), is_low)

    def _layer(
        self, target: str, entries: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[LoraLayer, list[Unmatched]]:
        """What applies to one layer, and what does not."""
        groups = [
            (
                [entries[kind] for kind in _FACTORS if kind in entries],
                self._factor_problem(target, entries, shapes),
            ),
            *(
                ([entries[kind]], self._difference_problem(target, kind, entries[kind], shapes))
                for kind in ("diff", "diff_b")
                if kind in entries
            ),
        ]
        rest = [Unmatched(n, problem) for names, problem in groups if problem for n in names]
        kept = {n for names, problem in groups if not problem for n in names}
        used = {kind: name for kind, name in entries.items() if name in kept}
        scale = 1.0
        if "down" in used:
            rank = self._shape(used["down"])[0]
            alpha = float(self.source.get(used["alpha"]).item()) if "alpha" in used else None
            scale = self.scaling.factor(used["down"], alpha, rank)
        down, up, up_bias, diff, diff_b = (
            used.get(kind, "") for kind in ("down", "up", "up_bias", "diff", "diff_b")
        )
        return LoraLayer(down, up, up_bias, diff, diff_b, scale), rest

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.source.info(name).shape

    def _type_problem(self, name: str) -> str:
        """Why a tensor's type cannot be applied, "" if it is floating point."""
        info = self.source.info(name)
        if info.dtype.is_floating_point and not info.quant:
            return ""
        return f"of type {info.quant or str(info.dtype).removeprefix('torch.')}, not floating point"

    def _factor_problem(
        self, target: str, entries: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> str:
        """Why a layer's factors cannot be applied, "" if they can or if there are none."""
        if not any(kind in entries for kind in _FACTORS):
            return ""
        for kind in ("down", "up", "up_bias"):
            if kind in entries and (problem := self._type_problem(entries[kind])):
                return problem
        if "down" not in entries or "up" not in entries:
            return _ALONE[next((kind for kind in ("down", "up") if kind in entries), "")]
        weight = shapes.get(f"{target}.weight", ())
        if len(weight) < 2 or target == "fps_embedding":
            return "low-rank factors of something that is no matrix"
        problem = _shape_problem(self._shape(entries["down"]), self._shape(entries["up"]), weight)
        if problem:
            return problem
        if "up_bias" in entries and self._shape(entries["up_bias"]) != weight[:1]:
            return f"a bias of {list(self._shape(entries['up_bias']))}, this layer has {weight[0]}"
        if "alpha" in entries:
            values = self.source.get(entries["alpha"])
            if values.numel() != 1 or not math.isfinite(values.item()):
                return "an alpha that is no finite number"
        return ""

    def _difference_problem(
        self, target: str, kind: str, name: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> str:
        """Why a difference cannot be added, "" if it can."""
        tensor = f"{target}.bias" if kind == "diff_b" else f"{target}.weight"
        expected = shapes.get(tensor) or (shapes.get(target) if kind == "diff" else None)
        if expected is None:
            return "a difference of a bias, of which this layer has none"
        if problem := self._type_problem(name):
            return problem
        shape = self._shape(name)
        if shape == expected or (1, *shape) == expected:  # tools drop a leading 1 of modulations
            return ""
        return f"a difference of shape {list(shape)}, this layer has {list(expected)}"

    def _nothing_fits(self, spec: TransformerSpec, unmatched: list[Unmatched]) -> WeightError:
        """The error that says what the file seems to be made for."""
        expected = f"a LoRA for a Wan model of {_size(spec.dim)}"
        advice = "use one that was made for this model"
        if not self.keys:
            return WeightError(self.where, "no tensors", expected, "download it again")
        shapes = {(key.target, key.kind): self._shape(key.name) for key in self.keys}
        for (target, kind), shape in shapes.items():
            up = shapes.get((target, "up"), ()) if kind == "down" else shape
            is_square = kind in ("down", "diff") and target.endswith(_SQUARE)
            if is_square and len(shape) == 2 and up[:1] == shape[1:] != (spec.dim,):
                found = f"entries for a model of {_size(shape[1])}"
                return WeightError(self.where, found, expected, advice)
        reason, count = Counter(entry.reason for entry in unmatched).most_common(1)[0]
        example = next(entry.key for entry in unmatched if entry.reason == reason)
        found = f"no entry that fits, {count} of {len(self.keys)} being {reason} ({example})"
        return WeightError(self.where, found, expected, advice)


@dataclass(frozen=True)
class Lora:
    """An opened LoRA and its strength: what its changes are multiplied by; 0 turns it off."""

    file: LoraFile
    strength: float = 1.0


def open_lora(path: Path) -> LoraFile:
    """Open a LoRA: a safetensors or torch file, or the folder that peft saved one in.

    Raises:
        WeightError: if the file is missing or damaged, or is of a kind that this version cannot
            apply: DoRA, LoHa, LoKr, OFT, scaled fp8, entries that replace weights, or entries for
            both experts.
    """
    _check_exists(path)
    source = open_weights(path, ADAPTER)
    names = layer_names()
    keys = tuple(read_key(name, names) for name in source.names())
    for key in keys:
        if key.kind in _REFUSED:
            found, advice = _REFUSED[key.kind]
            raise WeightError(
                source.where, f"{found}, such as {key.name}", "low-rank factors", advice
            )
    _check_one_expert(source.where, keys)
    files = [Path(file) for file in sorted({source.info(key.name).file for key in keys})]
    scaling, settings = read_scaling(source)
    files += settings
    # by number, not by name: a copy is the same LoRA
    digest = files_digest({str(number): file for number, file in enumerate(files)})
    return LoraFile(source.where, source, digest, keys, scaling)


def _check_exists(path: Path) -> None:
    """Refuse a path where no file of weights is, in a LoRA's words."""
    if not os.path.exists(path):
        raise WeightError(str(path), "no such file", "a LoRA there", "correct the path")
    try:
        names = os.listdir(path) if os.path.isdir(path) else [ADAPTER]
    except OSError as error:
        raise WeightError(str(path), f"an unreadable folder ({error})", "its files") from None
    if os.path.isdir(path) and not any(map(is_weights, names)):
        expected = f"{ADAPTER}.safetensors or another LoRA's file"
        raise WeightError(str(path), "no file of weights", expected, "give the path of a file")


def _check_one_expert(where: str, keys: Iterable[LoraKey]) -> None:
    """Refuse a file for both experts: on each, half of its entries would be the other's."""
    first = {key.is_low: key.name for key in reversed(list(keys)) if key.target}
    if len(first) == 2:
        raise WeightError(
            where,
            f"entries for both experts, such as {first[False]} and {first[True]}",
            "those of one",
            "split it into two files, and give them as HIGH:1,0 and LOW:0,1",
        )


def _absent(target: str, spec: TransformerSpec, shapes: Mapping[str, object]) -> str:
    """Why a model does not have a layer, "" if it has it."""
    if f"{target}.weight" in shapes or target in shapes:
        return ""
    parts = target.split(".")
    if parts[0] == "blocks" and int(parts[1]) >= spec.num_layers:
        return f"a block that this model of {spec.num_layers} blocks does not have"
    if parts[0] == "img_emb" or target.endswith("_img"):
        return "an image layer, and this model takes no image features"
    return f"a layer that this model does not have, {target}"


def _shape_problem(down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...]) -> str:
    """Why two factors do not make a weight's shape, "" if they do.

    Factors of a convolution are (rank, in, 1, 2, 2) and (out, rank, 1, 1, 1), or flat.
    """
    shapes = f"down {list(down)} and up {list(up)}"
    if len(down) < 2 or len(up) < 2:
        return f"factors that are no matrices: {shapes}"
    rows, columns = weight[0], math.prod(weight[1:])
    found = (down[0], math.prod(down[1:]), up[0], math.prod(up[1:]))
    rank = down[0]
    if rank and found == (rank, columns, rows, rank):
        return ""
    if found == (columns, found[1], found[1], rows):
        return f"factors the wrong way round: {shapes} for a layer of {[rows, columns]}"
    if rank != found[3]:
        return f"factors of different rank: {shapes}"
    return f"factors for a layer of {[found[2], found[1]]}, and this one is {[rows, columns]}"


def _size(dim: int) -> str:
    name = _SIZES.get(dim)
    return f"width {dim} ({name})" if name else f"width {dim}"

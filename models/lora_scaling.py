"""What is said about a LoRA's scales outside of its tensors, beside the file or in its header.

Trainers store alpha with each layer. peft writes it to adapter_config.json, and diffusers puts what
that says into the safetensors header. Only there it is said, too, that a LoRA is rank-stabilised.

Source: peft (LoraConfig: lora_alpha, alpha_pattern, use_rslora), diffusers (loaders/lora_base.py,
lora_adapter_metadata).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reelpool.errors import WeightError

from .jsonfile import read_json
from .weights import SafetensorsSource, WeightSource

ADAPTER = "adapter_model"  # peft's stem: the settings beside it are of this file and no other's
_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Scaling:
    """What is said about scales outside of the tensors, by peft and by diffusers.

    alpha: for layers that store none. patterns: alpha of single layers, by the end of their name.
    rank_stabilised: the factor is alpha / sqrt(rank) instead of alpha / rank.
    """

    alpha: float | None = None
    patterns: tuple[tuple[str, float], ...] = ()
    rank_stabilised: bool = False

    def factor(self, stored: str, alpha: float | None, rank: int) -> float:
        """What a product of factors is multiplied by; 1 when nobody tells alpha.

        Args:
            stored: name of the down factor in the file.
            alpha: the layer's own.
            rank: rows of the down factor.
        """
        if alpha is None:
            named = [value for end, value in self.patterns if f".{end}.lora_" in f".{stored}"]
            alpha = named[0] if named else self.alpha
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_scaling(source: WeightSource) -> tuple[Scaling, list[Path]]:
    """Read what is said of a file's scales, and name the files beside it that say so.

    Raises:
        WeightError: if the settings are broken, or an alpha in them is no number.
    """
    file = Path(source.where)
    config = file.with_name(_CONFIG)
    if file.stem == ADAPTER and config.exists():
        return _scaling(str(config), read_json(config)), [config]
    if isinstance(source, SafetensorsSource):
        return _scaling(source.where, _from_metadata(source.metadata)), []
    return Scaling(), []


def _from_metadata(metadata: Mapping[str, object]) -> dict[str, object]:
    """What a safetensors header says about scales in diffusers' JSON.

    Plain entries such as lora_alpha are what trainers note down for people: diffusers and ComfyUI
    take a layer without alpha as alpha = rank, and so must we.
    """
    stored = metadata.get("lora_adapter_metadata")
    try:
        loaded = json.loads(stored) if isinstance(stored, str) else None
    except (ValueError, RecursionError):
        loaded = None
    said = loaded if isinstance(loaded, dict) else {}
    return {
        name.removeprefix("transformer.").removeprefix("transformer_2."): value
        for name, value in said.items()
    }


def _scaling(where: str, said: Mapping[str, object]) -> Scaling:
    patterns = said.get("alpha_pattern")
    return Scaling(
        _number(where, said.get("lora_alpha")),
        tuple(
            (str(name).strip("^$"), number)
            for name, value in (patterns if isinstance(patterns, dict) else {}).items()
            if (number := _number(where, value)) is not None
        ),
        str(said.get("use_rslora", "")).lower() in ("true", "1"),
    )


def _number(where: str, value: object) -> float | None:
    if value is None:
        return None
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise WeightError(where, f"an alpha of {value!r} in its settings", "a number")
    return number

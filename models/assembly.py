"""A whole model's geometry and defaults from those of its parts. Free of torch.

What the transformer's weights do not tell comes from a diffusers folder's JSON, else from the
number of experts and from names.
"""

from __future__ import annotations

import re
from pathlib import Path

from .catalogue import without_suffix
from .defaults import defaults_for
from .detect import ModelTraits
from .model_index import ModelIndex, folder_defaults
from .parts import ModelParts
from .presets import usual_boundary
from .spec import ImageEncoderSpec, ModelSpec, TextSpec, TransformerSpec, VaeSpec

_NAMED_PARTS = 5  # of a path: the cache keeps `org--name` up to four folders above the file
_DIGEST = re.compile(r"[0-9a-f]{40,64}")  # of a commit, or of a file in the cache


def words_of(found: ModelParts) -> str:
    """The words of a model's path: they may say 480p, SkyReels, or 4 steps."""
    return path_words(found.folder or found.transformers[0])


def path_words(path: Path) -> str:
    """The last names of a path, without those that the Hugging Face cache makes up.

    Examples:
        >>> path_words(Path("hub/models--org--name/snapshots") / ("3df0" * 10) / "wan.gguf")
        'hub/models--org--name/wan.gguf'
    """
    said = [name for name in path.parts if name != "snapshots" and not _DIGEST.fullmatch(name)]
    return "/".join(said[-_NAMED_PARTS:])


def assemble(
    found: ModelParts,
    index: ModelIndex,
    transformer: TransformerSpec,
    traits: ModelTraits,
    vae: VaeSpec,
    text: TextSpec,
    image_encoder: ImageEncoderSpec | None,
) -> ModelSpec:
    """The spec of a model.

    Args:
        found: its parts; with two transformers it has two experts.
        index: of its diffusers folder; an empty one without.
        transformer: geometry of an expert.
        traits: its variant, image input and quantisation by its weights.
        vae: its VAE's geometry.
        text: its text encoder's.
        image_encoder: its image encoder's, if it has one.

    Raises:
        WeightError: if the folder's own defaults are not what they should be.
    """
    variant, image = traits.variant, traits.image
    if index.is_first_frame and variant == "t2v":
        variant, image = "ti2v", "first-frame"
    if index.is_forcing and variant == "t2v":
        variant = "df"
    num_experts = len(found.transformers)
    path = found.folder or found.transformers[0]
    defaults = defaults_for(variant, transformer, num_experts, words_of(found))
    if found.folder:
        defaults = folder_defaults(found.folder, defaults)
    return ModelSpec(
        without_suffix(Path(found.name).name) or path.name,
        transformer,
        vae,
        text,
        defaults,
        variant=variant,
        image=image,
        num_experts=num_experts,
        boundary=(index.boundary or usual_boundary(transformer)) if num_experts > 1 else 0.0,
        image_encoder=image_encoder,
        quant=traits.quant,
    )

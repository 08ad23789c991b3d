"""A whole model's geometry and defaults from those of its parts. Free of torch.

What the transformer's weights do not tell comes from a diffusers folder's JSON, else from the
number of experts and from names.
"""

from __future__ import annotations

from pathlib import Path

from .catalogue import without_suffix
from .defaults import defaults_for
from .detect import ModelTraits
from .model_index import ModelIndex, folder_defaults
from .parts import ModelParts
from .presets import usual_boundary
from .spec import ImageEncoderSpec, ModelSpec, TextSpec, TransformerSpec, VaeSpec

NAMED_PARTS = 5  # of a path: the cache keeps `org--name` four folders above the file


def words_of(found: ModelParts) -> str:
    """The words of a model's name and path: they may say 480p, SkyReels, or 4 steps."""
    path = found.folder or found.transformers[0]
    return "/".join((found.name, *path.parts[-NAMED_PARTS:]))


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

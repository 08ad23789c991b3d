"""What a job gets when it does not say: the settings that a model's publishers recommend.

By variant and geometry, and by the words of the name where the weights do not tell (480p or 720p,
SkyReels, a distilled model). Free of torch.
Source: the official scripts and configurations of Wan2.1, Wan2.2, SkyReels-V2 and lightx2v.
"""

from __future__ import annotations

import re
from dataclasses import replace

from .spec import ModelDefaults, TransformerSpec

# Text width of UMT5-XXL. The default negative prompt is Chinese: only that encoder reads it, and
# the demo model, whose words are few and English, must not get it.
UMT5_XXL_DIM = 4096
LOW_RES, HIGH_RES = (832, 480), (1280, 720)
_SKYREELS_FPS = 24

# Wan2.1 wan/configs/shared_config.py, the same text in SkyReels-V2 generate_video_df.py; diffusers
# has "" instead. Image-to-video models put words of their own before it (shaking camera, cuts).
# fmt: off
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
# fmt: on
# a number of lines: with p, or as a word or half of a size; not a part of a date or a digest
_LINES = re.compile(r"(?<!\d)(480|540|720)p(?![0-9a-z])|(?<![0-9a-wyz])(480|540|720)(?![0-9a-wyz])")
_FEW_STEPS = re.compile(
    r"lightx2v|lightning|(?:^|[_\-. ])4[_\- ]?steps?(?![a-z])|step[_\-]?distill"
)
# folders that are called like a model: of the Hugging Face cache, or copies of a repository
_CACHED = re.compile(r"models--(?:.*?--)?")  # and the organisation
_MODEL_FOLDER = re.compile(r"models--|.*wan[ _.\-]?2|.*skyreels")
_FIRST_WORDS = {"i2v": "镜头晃动，", "flf2v": "镜头切换，"}  # noqa: RUF001


def defaults_for(
    variant: str, transformer: TransformerSpec, num_experts: int, name: str = ""
) -> ModelDefaults:
    """Recommended settings of a model.

    Args:
        variant: as `ModelSpec.variant`.
        transformer: of one expert.
        num_experts: 1 or 2.
        name: of the file or folder, for what the weights do not tell; the names of folders above
            may stand before it. The last name that says a thing decides.

    Examples:
        >>> from reelpool.models.spec import TransformerSpec
        >>> large = TransformerSpec(40, 128, 13824, 40, 16, 16)
        >>> defaults_for("t2v", large, 2).shift, defaults_for("t2v", large, 1).shift
        (12.0, 5.0)
    """
    words = name.lower()
    is_720p = _is_720p(words)
    if variant == "df" or "skyreels" in words:
        made = _skyreels(variant, is_720p)
    elif num_experts == 2:
        made = _two_experts(transformer)
    elif variant == "ti2v":
        made = ModelDefaults(width=1280, height=704, frames=121, fps=24)
    elif variant == "flf2v":
        made = ModelDefaults(width=1280, height=720, shift=16.0)
    elif variant == "i2v":
        made = _image_to_video(is_720p)
    else:
        made = ModelDefaults()
    if transformer.text_dim == UMT5_XXL_DIM:
        made = replace(made, negative=_negative(variant, transformer))
    return _distilled(made) if _is_distilled(words) else made


def _is_720p(words: str) -> bool:
    """Whether a model is for 720p: the last name that has a number of lines says it."""
    for name in reversed(words.split("/")):
        lines = ["".join(groups) for groups in _LINES.findall(name)]
        if lines:
            return "720" in lines and "480" not in lines
    return False


def _is_distilled(words: str) -> bool:
    """Whether a model was distilled to few steps: its file or its repository is called so.

    Other folders do not count, nor an organisation: lightx2v's folder holds whole models too.
    """
    *folders, own = words.split("/")
    names = [own, *(folder for folder in folders if _MODEL_FOLDER.match(folder))]
    return any(_FEW_STEPS.search(_CACHED.sub("", name)) for name in names)


def _image_to_video(is_720p: bool) -> ModelDefaults:
    """Wan 2.1: the shift goes with the size, 3 for 480p and 5 for 720p."""
    width, height = HIGH_RES if is_720p else LOW_RES
    shift = 5.0 if is_720p else 3.0
    return ModelDefaults(width=width, height=height, steps=40, shift=shift)


def _two_experts(transformer: TransformerSpec) -> ModelDefaults:
    """Wan 2.2 A14B; guidance of the high-noise and of the low-noise expert."""
    if transformer.in_channels == transformer.out_channels:
        return ModelDefaults(steps=40, guidance=4.0, guidance_low=3.0, shift=12.0)
    return ModelDefaults(steps=40, guidance=3.5, guidance_low=3.5, shift=5.0)


def _skyreels(variant: str, is_720p: bool) -> ModelDefaults:
    width, height, frames = (1280, 720, 121) if is_720p else (960, 544, 97)
    guidance, shift = (5.0, 5.0) if variant == "i2v" else (6.0, 8.0)
    return ModelDefaults(width, height, frames, _SKYREELS_FPS, guidance=guidance, shift=shift)


def _negative(variant: str, transformer: TransformerSpec) -> str:
    """Wan 2.2 has no words of its own for image to video."""
    return (_FIRST_WORDS.get(variant, "") if transformer.image_dim else "") + NEGATIVE


def _distilled(made: ModelDefaults) -> ModelDefaults:
    """A model distilled to few steps takes no guidance.

    UniPC with shift 5 steps through the very levels of lightx2v's training, 1000, 937, 833, 625
    (facts: a plain grid of the lcm solver would not).
    """
    low = None if made.guidance_low is None else 1.0
    return replace(made, steps=4, shift=5.0, guidance=1.0, guidance_low=low)

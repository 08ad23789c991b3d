"""What a job reads besides its model: images, parts, LoRAs; and what they and the model decide.

Everything is looked at before any work, with one sentence when it will not do. Nothing of weights
is opened. Free of Ray and torch.
"""

from __future__ import annotations

import math
from pathlib import Path

from reelpool.errors import ConfigError

from ..models.finder import given_file
from ..models.parts import PART_NAMES, Parts
from ..models.spec import ModelSpec
from ..runtime.types import LoraRef
from .job_schema import MAX_SIDE, Job, label

MAX_STRETCH = 16.0  # times that an image may be wider (or higher) for its height than the video


def part_files(job: Job) -> Parts:
    """What a job names for parts of its model: paths made absolute, names as they are."""
    given = {name: getattr(job, name) for name in PART_NAMES}
    return tuple(
        (name, str(path.absolute() if path.exists() else path))
        for name, path in given.items()
        if path is not None
    )


def lora_refs(job: Job, spec: ModelSpec, where: str) -> tuple[LoraRef, ...]:
    """A job's LoRAs, in the order given: absolute paths, both strengths.

    Raises:
        ConfigError: if a file is nowhere, or a strength is for an expert the model lacks.
    """
    refs = []
    for entry in job.lora or ():
        try:
            path = given_file("lora", str(entry.file))
        except ConfigError as error:  # it says --lora, whoever asked
            raise ConfigError(label(where, "lora"), error.problem, error.advice) from None
        if entry.low is not None and spec.num_experts == 1:
            raise ConfigError(
                label(where, "lora"),
                f"found two strengths for {entry.file.name}, but {spec.name} has one transformer",
                "give one",
            )
        low = entry.strength if entry.low is None else entry.low
        refs.append(LoraRef(str(path.absolute()), entry.strength, low))
    return tuple(refs)


def guidance_scales(job: Job, spec: ModelSpec, where: str) -> tuple[float, float]:
    """Guidance on the high-noise (or only) expert and on the low-noise one.

    One number given is for both, as in diffusers.

    Raises:
        ConfigError: if there are two for a model of one expert.
    """
    own, given = spec.defaults, job.guidance
    if given is None:
        low = own.guidance if own.guidance_low is None else own.guidance_low
        return float(own.guidance), float(low)
    if not isinstance(given, tuple):
        return float(given), float(given)
    if spec.num_experts == 1:
        problem = f"found two numbers, but {spec.name} has one transformer"
        raise ConfigError(label(where, "guidance"), problem, "give one")
    return float(given[0]), float(given[1])


def video_size(job: Job, spec: ModelSpec, where: str, need_image: bool) -> tuple[int, int]:
    """Width and height of the video, after the job's images were found to be what the model takes.

    Args:
        job: the job.
        spec: of its model.
        where: what stands before a field's name in a message.
        need_image: whether a model that cannot do without an image must get one.

    Returns:
        The size asked for; else the image's aspect; else the model's own.

    Raises:
        ConfigError: if an image is missing, not wanted or not readable, or its aspect cannot be.
    """
    _check_images_wanted(job, spec, where, need_image)
    sizes = {
        name: _image_size(path, label(where, name))
        for name in ("image", "last_image")
        if (path := getattr(job, name)) is not None
    }
    own = spec.defaults
    size = job.size or (own.width, own.height)
    if job.size is None and "image" in sizes:
        size = size_for_image(sizes["image"], own.width * own.height, spec.size_multiple)
    for name, (width, height) in sizes.items():
        stretch = (width / height) / (size[0] / size[1])
        if not 1 / MAX_STRETCH <= stretch <= MAX_STRETCH:
            raise ConfigError(
                label(where, name),
                f"found {width}x{height} pixels for a video of {size[0]}x{size[1]}",
                "cut the image to the shape of the video, or give another --size",
            )
    return size


def size_for_image(image: tuple[int, int], area: int, multiple: int) -> tuple[int, int]:
    """The video size of an image's aspect, of about `area` pixels; sides rounded down.

    >>> size_for_image((832, 480), 832 * 480, 16), size_for_image((1000, 1000), 832 * 480, 16)
    ((832, 480), (624, 624))

    Source: Wan2.1 wan/image2video.py.
    """

    def side(this: int, other: int) -> int:
        exact = math.isqrt(area * this // other)  # whole numbers: no side falls short by rounding
        return min(max(multiple, exact // multiple * multiple), MAX_SIDE // multiple * multiple)

    width, height = image
    return side(width, height), side(height, width)


def takes_last_image(spec: ModelSpec) -> bool:
    """Whether a video may end with a given image.

    Models that see images as channels can; of those that also see an image encoder's features only
    the ones trained with two images.
    """
    return spec.image == "concat" and (spec.image_encoder is None or spec.variant == "flf2v")


def _check_images_wanted(job: Job, spec: ModelSpec, where: str, need_image: bool) -> None:
    """Check which images are given against which the model takes."""
    first, last = job.image is not None, job.last_image is not None
    if (first or last) and not spec.image:
        name = "image" if first else "last_image"
        problem = f"{spec.name} makes videos from text alone"
        raise ConfigError(label(where, name), problem, "leave it out, or use an I2V model")
    if last and not takes_last_image(spec):
        problem = f"{spec.name} takes a first image only"
        advice = "leave it out, or use an FLF2V model or Wan 2.2 I2V"
        raise ConfigError(label(where, "last_image"), problem, advice)
    needed = first or last or need_image
    if needed and not first and (spec.image == "concat" or last):
        problem = f"is missing: {spec.name} makes a video from an image"
        raise ConfigError(label(where, "image"), problem, "give a PNG, JPEG or WebP file")
    if needed and not last and spec.variant == "flf2v":
        problem = f"is missing: {spec.name} makes a video between two images"
        raise ConfigError(label(where, "last_image"), problem, "give a PNG, JPEG or WebP file")
    if last and job.frames is not None and job.frames <= spec.vae.temporal_factor:
        problem = f"{job.frames} leaves no frame for the last image"
        raise ConfigError(
            label(where, "frames"), problem, f"the nearest is {spec.vae.temporal_factor + 1}"
        )


def _image_size(path: Path, where: str) -> tuple[int, int]:
    """Width and height of an image, which is decoded whole: a damaged one is told here."""
    from ..runtime.still import read_still

    try:
        height, width, _ = read_still(path).shape
    except ConfigError as error:  # it names the file, not the field
        raise ConfigError(where, f"{error.where} {error.problem}", error.advice) from None
    return width, height

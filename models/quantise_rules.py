"""Which type each tensor of a quantised transformer gets. Free of torch.

The matrices of the blocks are quantised. What lies outside of them is 1.6 % of a 14B model
and acts on all tokens alike: it stays in 16 bits, vectors and tables in float32.
Source: city96/ComfyUI-GGUF's converter and its patch of llama.cpp. By their lists of names all
matrices outside of Wan's blocks are kept but SkyReels' `fps_projection`, which is kept here too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from reelpool.errors import ConfigError

OPTION = "--type"
BLOCK = 32  # values of a block of every type of GGUF that is written here
SMALL = 1024  # tensors of at most so many values stay in float32


@dataclass(frozen=True)
class Target:
    """A form of file to quantise to.

    name: what a user calls it.
    kind: type of the blocks' matrices, one of `quant.KINDS`.
    down: type of those of `ffn.2`, the second half of a feed-forward layer. It adds straight to
        the hidden state, so mixes give it the next better type.
    """

    name: str
    kind: str
    down: str

    @property
    def is_gguf(self) -> bool:
        """Whether the file is GGUF; else it is safetensors."""
        return self.suffix == ".gguf"

    @property
    def suffix(self) -> str:
        """What the file's name ends in."""
        return ".safetensors" if self.kind == "F8_E4M3" else ".gguf"


TARGETS = {
    target.name: target
    for target in (
        Target("q8_0", "Q8_0", "Q8_0"),
        Target("q5_1", "Q5_1", "Q5_1"),
        Target("q5_0", "Q5_0", "Q5_1"),
        Target("q4_1", "Q4_1", "Q4_1"),
        Target("q4_0", "Q4_0", "Q4_1"),
        Target("fp8", "F8_E4M3", "F8_E4M3"),
    )
}


def find_target(name: str) -> Target:
    """The target of a type's name, in any case of letters.

    Raises:
        ConfigError: if there is none.

    Examples:
        >>> find_target("Q5_0").down
        'Q5_1'
    """
    wanted = name.strip().lower()
    if wanted in TARGETS:
        return TARGETS[wanted]
    near = get_close_matches(wanted, TARGETS, 1, 0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        OPTION, f"{name!r} is no type that can be written", f"{hint}use one of {', '.join(TARGETS)}"
    )


def check_out(target: Target, path: Path) -> None:
    """Check the name and folder of the new file, before anything is read.

    Raises:
        ConfigError: if the ending is not the target's, or the folder is not there.
    """
    if path.suffix != target.suffix:
        problem = f"a name that ends in {path.suffix!r} for {target.name}"
        raise ConfigError(str(path), problem, f"give a name that ends in {target.suffix}")
    if path.is_dir():
        raise ConfigError(str(path), "is a folder", "give the name of a file")
    if not path.parent.is_dir():
        raise ConfigError(str(path), f"there is no folder {path.parent}", "create it first")


def kind_of(target: Target, name: str, shape: tuple[int, ...], is_bf16: bool) -> str:
    """Type of one tensor in the new file.

    Args:
        target: what is written.
        name: its canonical name.
        shape: of its values.
        is_bf16: whether it is stored in bfloat16 now.

    Examples:
        >>> kind_of(TARGETS["q4_0"], "blocks.0.ffn.2.weight", (5120, 13824), True)
        'Q4_1'
        >>> kind_of(TARGETS["q4_0"], "head.head.weight", (64, 5120), True)
        'BF16'
    """
    if len(shape) != 2 or shape[0] * shape[1] <= SMALL:
        return "F32"
    if not name.startswith("blocks."):
        return "BF16" if is_bf16 else "F16"
    if target.is_gguf and shape[1] % BLOCK:
        return "F16"
    return target.down if name.endswith(".ffn.2.weight") else target.kind


def bits_of(kind: str) -> int:
    """Bits of a value by a type's name, its scales not counted.

    Examples:
        >>> bits_of("q4_k"), bits_of("fp8_e4m3 scaled"), bits_of("bf16")
        (4, 8, 16)
    """
    match = re.search(r"\d+", kind)
    return int(match[0]) if match else 0

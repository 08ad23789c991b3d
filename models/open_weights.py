"""Any file or folder of weights as one `WeightSource` under the names it was stored with.

What a file is is told by its first bytes, not only by its name. Opening reads headers.
`.pth` files are pickles: only torch's restricted reader sees them, which makes tensors and
containers and nothing else, and maps their bytes like the others'.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import torch

from reelpool.errors import MissingTensor, WeightError

from .gguf_source import GgufSource
from .jsonfile import read_json
from .quant import Matrix
from .weights import MergedSource, SafetensorsSource, TensorInfo, WeightSource

INDEX = ".index.json"
# stems that publishers use, in the order in which they are looked for
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SAFETENSORS, GGUF, TORCH = (".safetensors", ".sft"), (".gguf",), (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (*SAFETENSORS, *GGUF, *TORCH)
MAX_SHARDS = 1000
AGAIN = "download or copy the file again"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_OUTER_KEYS = ("state_dict", "model", "module", "model_state_dict", "params_ema", "params")
_MAGICS = {  # first bytes: what such a file is, and what to do
    b"GGUF": ("a GGUF file", "rename it to .gguf"),
    b"PK\x03\x04": ("a torch (zip) file", "rename it to .pth"),
    b"version https://git-lfs": ("a Git LFS pointer, not the weights", "run git lfs pull"),
    b"<!DOCTYPE": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
}


def open_weights(path: Path, stem: str = "") -> WeightSource:
    """Open a file of weights, an index of shards, one of its shards, or a folder of them.

    Args:
        path: a safetensors, GGUF or torch file, an index, or the folder of one model part.
        stem: of the file names to prefer in a folder, such as "model".

    Raises:
        WeightError: if there is no such file, a shard is missing, or a file is damaged or is not
            what its name says.
    """
    if os.path.isdir(path) and path.suffix not in SUFFIXES:
        return _open_folder(path, stem)
    _refuse_special(path)
    if path.name.endswith(INDEX):
        return _open_index(path)
    match = _SHARD.fullmatch(path.name)
    if match and match[4] in SUFFIXES:
        return _open_shards(path.parent, match)
    return _open_file(path)


def _open_folder(folder: Path, stem: str) -> WeightSource:
    """One model part: an index, else a single file, else shards without an index."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise WeightError(str(folder), f"an unreadable folder ({error})", "its files") from None
    families: dict[str, str] = {}  # an index before the single file, and that before its shards
    for name in sorted(names, key=lambda name: (not name.endswith(INDEX), "-of-" in name, name)):
        if _family(name).endswith(SUFFIXES):
            families.setdefault(_family(name), name)
    for each in (stem, *STEMS) if stem else STEMS:
        for suffix in SUFFIXES:
            if f"{each}{suffix}" in families:
                return open_weights(folder / families[f"{each}{suffix}"])
    if len(families) == 1:
        return open_weights(folder / next(iter(families.values())))
    if families:
        found = f"several files of weights ({', '.join(sorted(families)[:3])})"
        raise WeightError(str(folder), found, "one", "give the path of one file")
    wanted = folder / f"{stem or STEMS[0]}.safetensors"
    raise WeightError(str(wanted), "no such file", "the model's weights there", AGAIN)


def _family(name: str) -> str:
    """A file's name without what tells shards, and their index, apart."""
    name = name.removesuffix(INDEX)
    match = _SHARD.fullmatch(name)
    return f"{match[1]}{match[4]}" if match else name


def _open_index(index: Path) -> WeightSource:
    """The shards that an index names; tensors that it does not name are not seen."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(str(index), "no weight_map", "a map of tensor names to shard files")
    shards: dict[str, WeightSource] = {}
    for file in weight_map.values():
        if not isinstance(file, str) or not _is_file_name(file):
            raise WeightError(str(index), f"shard name {file!r}", "a file name in the same folder")
        if file not in shards:
            if len(shards) == MAX_SHARDS:
                raise WeightError(str(index), f"more than {MAX_SHARDS} shards", "fewer")
            shards[file] = _open_file(index.parent / file)
    return MergedSource(str(index), {name: shards[file] for name, file in weight_map.items()})


def _is_file_name(text: str) -> bool:
    return bool(text) and text.isprintable() and Path(text).name == text


def _open_shards(folder: Path, match: re.Match[str]) -> WeightSource:
    """All shards of a family by the numbers in their names."""
    stem, total, suffix = match[1], int(match[3]), match[4]
    if not 0 < total <= MAX_SHARDS:
        raise WeightError(str(folder / match[0]), f"{total} shards", f"1 to {MAX_SHARDS}")
    paths = [folder / f"{stem}-{n:05}-of-{total:05}{suffix}" for n in range(1, total + 1)]
    for path in paths:
        if not os.path.exists(path):
            expected = f"all {total} shards of {stem}{suffix}"
            raise WeightError(str(path), "no such file", expected, "download or copy it too")
    merged: dict[str, WeightSource] = {}
    for path in paths:
        source = _open_file(path)
        for name in source.names():
            if name in merged:
                found = f"tensor {name}, which {merged[name].where} has too"
                raise WeightError(str(path), found, "each tensor in one shard")
            merged[name] = source
    return MergedSource(str(folder / f"{stem}{suffix}"), merged)


def _open_file(path: Path) -> WeightSource:
    """One file, by what its first bytes and its name say."""
    kinds: dict[tuple[str, ...], Callable[[Path], WeightSource]] = {
        SAFETENSORS: SafetensorsSource,
        GGUF: GgufSource,
        TORCH: TorchSource,
    }
    own = {SAFETENSORS: b"", GGUF: b"GGUF", TORCH: b"PK\x03\x04"}
    suffix = path.suffix.lower()
    _refuse_special(path)
    for suffixes, source in kinds.items():
        if suffix in suffixes:
            _check_magic(path, own[suffixes])
            return source(path)
    if not os.path.exists(path):  # also of a name that is too long for one
        raise WeightError(str(path), "no such file", "the model's weights there", AGAIN)
    raise WeightError(str(path), f"a name that ends in {suffix!r}", "one of " + ", ".join(SUFFIXES))


def _refuse_special(path: Path) -> None:
    """Refuse a pipe, socket or device: opening one may wait for ever, and none can be mapped."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise WeightError(str(path), "a pipe or a device", "a file of weights", AGAIN)


def _check_magic(path: Path, own: bytes) -> None:
    """Refuse a file that begins as one of another kind does."""
    start = _first_bytes(path)
    for magic, (kind, advice) in _MAGICS.items():
        if magic != own and start.startswith(magic):
            raise WeightError(str(path), kind, f"what {path.suffix} says", advice)
    if own and start[8:9] == b"{" and not start.startswith(own):
        raise WeightError(
            str(path), "a safetensors file", f"what {path.suffix} says", "rename it to .safetensors"
        )


def _first_bytes(path: Path) -> bytes:
    """The first bytes; none of a file that cannot be read, which its reader says better."""
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError:
        return b""


class TorchSource:
    """One torch file (`.pth`), mapped. Safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        """Read the pickle with torch's restricted reader.

        Raises:
            WeightError: if the file is missing, damaged, made by an old torch, or holds anything
                else than tensors in plain containers.
        """
        self.path = path
        self._tensors = _state_dict(path, _load(path))

    @property
    def where(self) -> str:
        """The file."""
        return str(self.path)

    def names(self) -> Iterator[str]:
        """All tensor names."""
        return iter(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor, its place not told; raises MissingTensor."""
        tensor = self._tensor(name)
        shape = tuple(tensor.shape)
        num_bytes = tensor.numel() * tensor.itemsize
        return TensorInfo(name, str(self.path), tensor.dtype, shape, 0, num_bytes)

    def get(self, name: str) -> torch.Tensor:
        """A view of the mapped bytes; raises MissingTensor."""
        return self._tensor(name).contiguous()

    def matrix(self, name: str) -> Matrix:
        """The same: nothing is quantised here."""
        return self.get(name)

    def _tensor(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise MissingTensor(self.where, name, "it among the file's tensors") from None


def _load(path: Path) -> object:
    start = _first_bytes(path)
    if start and not start.startswith(b"PK\x03\x04"):
        raise WeightError(
            str(path),
            f"a file that begins with {start[:4]!r}",
            "a torch file in the zip form that torch has written since 1.6",
            "is it whole? save an old one again, or use a .safetensors file",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old files, about storages; they load well
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise WeightError(str(path), "no such file", "the model's weights there", AGAIN) from None
    except Exception as error:  # torch raises many kinds for damage, and quotes itself at length
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            _refuse_pickle(path, error)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise WeightError(str(path), f"a broken file ({reason})", "a torch file", AGAIN) from None


def _refuse_pickle(path: Path, error: Exception) -> NoReturn:
    """Refuse a pickle that wants more than tensors: reading it would run its code."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    found = f"a pickle that calls {match[1]}" if match else "a pickle of more than tensors"
    raise WeightError(
        str(path), found, "tensors only", "it could run any code: use a .safetensors file"
    ) from None


def _state_dict(path: Path, loaded: object) -> dict[str, torch.Tensor]:
    """The tensors by name, taken out of the one container that they may lie in."""
    content = loaded
    for _ in range(2):  # {"state_dict": {"model": {...}}} has been seen
        if not isinstance(content, Mapping) or any(
            isinstance(value, torch.Tensor) for value in content.values()
        ):
            break
        inner = [key for key in _OUTER_KEYS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = content[inner[0]]
    tensors = {
        name: value.detach()
        for name, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise WeightError(str(path), "no tensors by name", "a state dict", "is it a model?")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            found = f"tensor {name} as {tensor.layout} on {tensor.device}"
            raise WeightError(str(path), found, "a plain tensor")
        num_bytes, stored = tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()
        if num_bytes > stored:
            found = f"tensor {name} of {num_bytes} bytes that are {stored} repeated"
            raise WeightError(str(path), found, "all of them", AGAIN)
    return tensors

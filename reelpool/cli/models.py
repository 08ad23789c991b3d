"""The command that says which models are on the disks, and what each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reelpool.cli.generate import Json, Verbose
from reelpool.cli.output import printable

if TYPE_CHECKING:
    from reelpool.models.listing import ListedModel, Listing
    from reelpool.models.spec import ModelSpec

VARIANTS = {
    "t2v": "text to video",
    "i2v": "image to video",
    "flf2v": "first and last frame to video",
    "ti2v": "text or image to video",
    "df": "text to video, diffusion forcing",
}


def models(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A model, or a geometry's name.")
    ] = None,
    presets: Annotated[
        bool, typer.Option("--presets", help="List the geometries that need no weights.")
    ] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List the model files found, or say all about one.

    Looks in ComfyUI's folders, the Hugging Face cache, and the folders of REELPOOL_MODELS and of
    ~/.config/reelpool/config.yaml (model_folders, comfyui).
    """
    from reelpool.runtime import log

    log.setup()
    if name is not None:
        _show_one(context, name)
    elif presets:
        _show_presets(context)
    else:
        from reelpool.models.listing import list_models
        from reelpool.models.search_folders import search_folders

        folders = search_folders()
        listing = list_models(folders)
        places = list(dict.fromkeys(folder.label for folder in folders))
        content: dict[str, object] = {
            "models": [_row(model) for model in listing.models],
            "parts": [
                {"what": p.what, "path": str(p.path), "bytes": p.num_bytes, "where": p.label}
                for p in listing.parts
            ],
            "refused": [{"path": str(r.path), "reason": r.reason} for r in listing.refused],
            "folders": [str(folder.path) for folder in folders],
        }
        context.obj.result(content, "\n".join(_lines(listing, places)))


def _show_presets(context: typer.Context) -> None:
    from reelpool.models.presets import PRESETS

    rows = [
        (spec.name, VARIANTS[spec.variant], _parameters(spec), _experts(spec))
        for spec in PRESETS.values()
    ]
    first = "geometries for `reelpool plan` and `reelpool models NAME`; @q4_k_m and such may follow"
    content = {"presets": [_geometry(spec) for spec in PRESETS.values()]}
    context.obj.result(content, "\n".join([first, *_table(rows)]))


def _lines(listing: Listing, places: list[str]) -> list[str]:
    """What was found, as lines: models, parts, and how many files were neither."""
    from reelpool.runtime.log import format_bytes

    rows = []
    for model in listing.models:
        lacks = ", ".join(lack.name for lack in model.lacks)
        state = f"missing: {lacks}" if lacks else "complete"
        size, traits = format_bytes(model.num_bytes), model.traits
        rows.append((model.name, traits.variant, traits.quant, size, model.label, state))
    lines = _table(rows)
    if not lines:
        lines = [f"no models found in {', '.join(places[:5]) or 'any usual folder'}"]
        lines.append("name folders in REELPOOL_MODELS, or see reelpool models --help")
    parts = [(p.what, p.path.name, format_bytes(p.num_bytes), p.label) for p in listing.parts]
    lines += ["", "parts", *_table(parts)] if parts else []
    if listing.refused:
        count = len(listing.refused)
        files = "1 other file is" if count == 1 else f"{count} other files are"
        lines += ["", f"{files} no Wan transformer that can be run; --json says why"]
    return lines


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, columns aligned; names of files may hold anything."""
    rows = [tuple(printable(cell.replace("\n", "\\n")) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _row(model: ListedModel) -> dict[str, object]:
    return {
        "name": model.name,
        "variant": model.traits.variant,
        "quant": model.traits.quant,
        "bytes": model.num_bytes,
        "where": model.label,
        "transformers": [str(path) for path in model.parts.transformers],
        "parts": _paths(model),
        "missing": [
            {"what": k.what, "name": k.name, "folder": str(k.folder), "option": k.option}
            for k in model.lacks
        ],
    }


def _paths(model: ListedModel) -> dict[str, str]:
    """Parts that were found, by name."""
    parts = model.parts
    paths = {
        "text_encoder": parts.text_encoder,
        "tokenizer": parts.tokenizer,
        "vae": parts.vae,
        "image_encoder": parts.image_encoder,
    }
    return {name: str(path) for name, path in paths.items() if path and path != Path()}


def _show_one(context: typer.Context, name: str) -> None:
    """All about a preset, or about a model on the disks."""
    from reelpool.models.finder import existing, model_path
    from reelpool.models.presets import find_preset

    spec = None if existing(name) else find_preset(name, "NAME")
    content: dict[str, object]
    if spec:
        content, rows = _geometry(spec), [*_geometry_rows(spec), *_usual_rows(spec)]
    else:
        from reelpool.models.listing import inspect_model, spec_of

        model = inspect_model(name, model_path(name, "NAME"))
        spec = replace(spec_of(model), quant=model.traits.quant)
        content = {**_geometry(spec), **_row(model), "name": spec.name}
        rows = [*_geometry_rows(spec, model.num_bytes), *_part_rows(model)]
    lines = [f"{spec.name}: {VARIANTS[spec.variant]}", *_table(rows)]
    context.obj.result(content, "\n".join(lines))


def _geometry(spec: ModelSpec) -> dict[str, object]:
    """Sizes, counts, bytes, FLOPs of the default video, and defaults, as data."""
    from reelpool.models.quant_mix import block_bytes, transformer_bytes

    t = spec.transformer
    return {
        "name": spec.name,
        "variant": spec.variant,
        "image": spec.image,
        "quant": spec.quant,
        "experts": spec.num_experts,
        "boundary": spec.boundary,
        "parameters": t.num_params,
        "block_parameters": t.block_params,
        "transformer_bytes": transformer_bytes(t, spec.quant),
        "block_bytes": block_bytes(t, spec.quant),
        "tokens": _tokens(spec),
        "block_flops": t.block_flops(_tokens(spec)),
        "transformer": asdict(t),
        "size_multiple": spec.size_multiple,
        "vae_channels": spec.vae.z_dim,
        "defaults": asdict(spec.defaults),
    }


def _tokens(spec: ModelSpec) -> int:
    """Of the default video."""
    own = spec.defaults
    return spec.transformer.num_tokens(spec.latent_shape(own.width, own.height, own.frames))


def _parameters(spec: ModelSpec) -> str:
    count = spec.transformer.num_params
    return f"{count / 1e9:.1f} B parameters" if count >= 1e8 else f"{count / 1e6:.1f} M parameters"


def _experts(spec: ModelSpec) -> str:
    return f"2 experts, boundary {spec.boundary:g}" if spec.num_experts == 2 else "1 transformer"


def _geometry_rows(spec: ModelSpec, num_bytes: int | None = None) -> list[tuple[str, ...]]:
    """Sizes, counts, bytes and defaults in words."""
    from reelpool.models.quant_mix import block_bytes, transformer_bytes
    from reelpool.runtime.log import format_bytes

    t, own = spec.transformer, spec.defaults
    expected = format_bytes(transformer_bytes(t, spec.quant))
    size = f"2 x {expected}" if spec.num_experts == 2 else expected
    block = f"{format_bytes(block_bytes(t, spec.quant))} a block"
    tera = t.block_flops(_tokens(spec)) / 1e12
    low = "" if own.guidance_low is None else f" (low noise {own.guidance_low:g})"
    return [
        ("  experts", f"{_experts(spec)}, {_parameters(spec)} each"),
        ("  blocks", f"{t.num_layers} of {t.block_params / 1e6:.1f} M, {block}"),
        ("  bytes", f"{size if num_bytes is None else format_bytes(num_bytes)}, "
         f"{spec.quant or '16 bits'}"),
        ("  width", f"{t.dim} in {t.num_heads} heads, ffn {t.ffn_dim}"),
        ("  channels", f"{t.in_channels} in, {t.out_channels} out"),
        ("  default", f"{own.width}x{own.height}, {own.frames} frames, {own.fps} fps, "
         f"{_tokens(spec)} tokens, {tera:.3g} TFLOP a block"),
        ("  steps", f"{own.steps}, {own.solver}, shift {own.shift:g}, "
         f"guidance {own.guidance:g}{low}"),
        ("  sizes", f"multiples of {spec.size_multiple}, {spec.vae.temporal_factor}n+1 frames"),
        ("  negative", own.negative or "none"),
    ]  # fmt: skip


def _usual_rows(spec: ModelSpec) -> list[tuple[str, ...]]:
    """The parts that a geometry's model needs, by usual names."""
    from reelpool.models.companions import usual_parts

    return [
        (f"  {usual.part.replace('_', ' ')}", f"usually {usual.name} in ComfyUI's {usual.folder}")
        for usual in usual_parts(spec.transformer)
    ]


def _part_rows(model: ListedModel) -> list[tuple[str, ...]]:
    """The parts that were found, and what is missing."""
    rows = [("  transformer", str(path)) for path in model.parts.transformers]
    rows += [(f"  {part.replace('_', ' ')}", path) for part, path in _paths(model).items()]
    rows += [
        ("  missing", f"{k.what}: put {k.name} into {k.folder}, or give {k.option} FILE")
        for k in model.lacks
    ]
    return list(rows)

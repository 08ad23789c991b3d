"""Peak activation memory of one forward, ours and diffusers', at real sizes without weights.

    python benchmarks/activations.py                     # all cases, a few minutes
    python benchmarks/activations.py --only 1280x720     # the cases whose name contains "1280x720"
    python benchmarks/activations.py --diffusers wan2.1-t2v-14b 832x480 81    # diffusers' alone

Both run on the meta device, one forward of one branch in bfloat16, attention fused, weights not
counted (nor views of them), everything that is kept for the next forward counted. The prompt fills
all 512 rows. "per frame" gives every latent frame its own timestep, as diffusion forcing does;
diffusers' Wan class takes one per token then. `reelpool bench activations` calls this script for
diffusers' figure.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import machine, table

from reelpool.models.presets import PRESETS
from reelpool.models.registry import find_spec
from reelpool.models.spec import TEXT_LENGTH, LatentShape, ModelSpec, NumericsProfile
from reelpool.runtime.activations import META, measure_forward
from reelpool.runtime.meter import meter

RESULTS = Path(__file__).parent / "results" / "activations.json"
GROUPS = 8
FP32_PARTS = ("time_embedder", "scale_shift_table", "norm2")  # what diffusers keeps in float32
FLF2V = "flf2v"


@dataclass(frozen=True)
class Case:
    """One geometry and size.

    targets: most bytes of ours, whole heads and head groups, in GiB; 0 for none.
    """

    model: str
    size: str
    frames: int
    per_frame: bool = False
    targets: tuple[float, float] = (0.0, 0.0)

    @property
    def name(self) -> str:
        """Key in the results."""
        end = " per frame" if self.per_frame else ""
        return f"{self.model} {self.size} {self.frames} frames{end}"


CASES = (
    Case("wan2.1-t2v-14b", "832x480", 81, targets=(1.65, 0.85)),
    Case("wan2.1-t2v-14b", "1280x720", 81, targets=(3.75, 1.95)),
    Case("skyreels-v2-df-14b-540p", "832x480", 81, per_frame=True, targets=(1.70, 0.90)),
    Case("skyreels-v2-df-14b-540p", "960x544", 97, per_frame=True),
    Case("wan2.1-i2v-14b-480p", "832x480", 81),
    Case("wan2.1-t2v-1.3b", "832x480", 81),
    Case("wan2.1-t2v-1.3b", "1280x720", 81),
    Case("wan2.2-ti2v-5b", "1280x704", 121),
    Case("wan2.2-ti2v-5b", "1280x704", 121, per_frame=True),
)


def latent_shape(spec: ModelSpec, size: str, frames: int) -> LatentShape:
    width, height = map(int, size.split("x"))
    return spec.latent_shape(width, height, frames)


def diffusers_peak(spec: ModelSpec, shape: LatentShape, dtype: torch.dtype, per_frame: bool) -> int:
    """Peak bytes of diffusers' own class, called as its pipeline does."""
    transformer = spec.transformer
    model = diffusers_model(spec, dtype)
    count = shape.frames
    if not per_frame:
        steps = torch.zeros(1, device=META)
    elif spec.variant == "df":
        steps = torch.zeros(1, count, device=META)
    else:
        steps = torch.zeros(1, transformer.num_tokens(shape), device=META)
    dims = (1, transformer.in_channels, *shape.dims[2:])
    given: dict[str, Any] = {
        "hidden_states": torch.zeros(dims, dtype=dtype, device=META),
        "timestep": steps,
        "encoder_hidden_states": torch.zeros(
            1, TEXT_LENGTH, transformer.text_dim, dtype=dtype, device=META
        ),
    }
    if transformer.image_dim:
        rows = (1, transformer.image_rows, transformer.image_dim)
        if spec.variant == FLF2V:  # the pipeline gives two images
            rows = (2, rows[1] // 2, rows[2])
        given["encoder_hidden_states_image"] = torch.zeros(rows, dtype=dtype, device=META)
    if spec.variant == "df":
        given["enable_diffusion_forcing"] = per_frame
    with torch.no_grad(), meter(META) as count_bytes:
        model(**given, return_dict=False)
    return count_bytes.peak_bytes


def diffusers_model(spec: ModelSpec, dtype: torch.dtype) -> torch.nn.Module:
    """The class on the meta device, in the types that its loader keeps."""
    from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel

    t = spec.transformer
    kind = SkyReelsV2Transformer3DModel if spec.variant == "df" else WanTransformer3DModel
    with META:
        model = kind(
            num_attention_heads=t.num_heads,
            attention_head_dim=t.head_dim,
            ffn_dim=t.ffn_dim,
            num_layers=t.num_layers,
            in_channels=t.in_channels,
            out_channels=t.out_channels,
            text_dim=t.text_dim,
            freq_dim=t.freq_dim,
            image_dim=t.image_dim or None,
            added_kv_proj_dim=t.dim if t.image_dim else None,
            pos_embed_seq_len=t.image_positions or None,
            **({"inject_sample_info": t.fps_embedding} if spec.variant == "df" else {}),
        ).eval()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in FP32_PARTS):
            parameter.data = parameter.data.to(dtype)
    return model


def measure(case: Case) -> dict[str, Any]:
    """Ours with whole heads and with groups of them, and diffusers'."""
    spec = PRESETS[case.model]
    shape = latent_shape(spec, case.size, case.frames)
    record: dict[str, Any] = {"tokens": spec.transformer.num_tokens(shape)}
    for key, groups in (("peak_bytes", 1), ("peak_bytes_lean", GROUPS)):
        numerics = NumericsProfile("bfloat16", head_groups=groups)
        ours = measure_forward(spec.transformer, shape, numerics, per_frame=case.per_frame)
        record[key] = ours.peak_bytes
        record["kept_bytes"] = ours.kept_bytes
        record[f"{key}_at"] = [
            [piece.num_bytes, piece.operator, list(piece.shape), str(piece.dtype)]
            for piece in ours.pieces
            if piece.num_bytes >= ours.peak_bytes / 200
        ]
    record["diffusers_peak_bytes"] = diffusers_peak(spec, shape, torch.bfloat16, case.per_frame)
    return record


def report(records: dict[str, dict[str, Any]]) -> str:
    targets = {case.name: case.targets for case in CASES}
    rows = []
    for name, record in records.items():
        keys = ("peak_bytes", "peak_bytes_lean", "diffusers_peak_bytes")
        sizes = [f"{record[key] / 2**30:.3f}" for key in keys]
        wanted = " / ".join(f"{target:.2f}" for target in targets[name] if target)
        rows.append((name, record["tokens"], *sizes, wanted))
    header = ("case", "tokens", "ours GiB", "head groups", "diffusers", "targets")
    return table(rows, header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="measure the cases whose name contains this")
    parser.add_argument("--diffusers", nargs=3, metavar=("MODEL", "WxH", "FRAMES"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--per-frame", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if given.diffusers:
        spec = find_spec(given.diffusers[0])
        shape = latent_shape(spec, given.diffusers[1], int(given.diffusers[2]))
        dtype = getattr(torch, given.dtype)
        print(json.dumps(diffusers_peak(spec, shape, dtype, given.per_frame)))
        return
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": {}}
    for case in (case for case in CASES if given.only in case.name):
        stored["results"][case.name] = measure(case)
        stored = {"machine": machine(), "results": stored["results"]}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        print(report({case.name: stored["results"][case.name]}), flush=True)
    print(report(stored["results"]))


if __name__ == "__main__":
    main()

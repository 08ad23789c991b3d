"""The VAE in tiles: memory, time over diffusers' tiled decode, colour of half types.

    python benchmarks/decode.py [--rounds 3] [--threads 2]

Memory is counted on the meta device at the real sizes of Wan's VAEs, weights excluded.
Time is that of the Wan 2.1 VAE at its real width with random float32 weights: 2 latent frames of
288x144 pixels, tiles of at most 192, a quarter of overlap. Both decode as many pixels, we 168
columns twice, diffusers 192 and 144; at other sizes it mostly decodes more. With fewer rows its
convolutions would take torch's slow path, see SLOW_CONV3D_SIZE. They take turns.
Colour is what decoding the demo VAE's latents of drawn clips in half types does to each channel, in
levels of 255, against float32; `all half` are weights of which none stay float32.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from measure import machine, paired, table
from torch import Tensor

from reelpool.models.demo import clips
from reelpool.models.files import open_model
from reelpool.models.presets import PRESETS
from reelpool.models.wan_vae import WanVae, load_vae
from reelpool.runtime.vae_memory import measure_vae
from reelpool.runtime.vae_stream import VaeStream

RESULTS = Path(__file__).parent / "results" / "decode.json"
WAN21 = replace(PRESETS["wan2.1-t2v-1.3b"].vae, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
SIZES = {  # name: (spec, sizes in pixels)
    "wan2.1": (WAN21, ((480, 832), (720, 1280))),
    "wan2.2": (PRESETS["wan2.2-ti2v-5b"].vae, ((480, 832), (704, 1280))),
}
TILES = (0, 256, 384, 448)  # pixels
TYPES = (torch.float32, torch.bfloat16)
TIMED_TILE, TIMED_SIZE, TIMED_LATENTS = 192, (18, 36), 2  # pixels, latents
NUM_CLIPS, CLIP_FRAMES = 16, 17
AT_MOST = {"time": 0.9, "720p bfloat16 card_gib": 1.5}


def memory() -> list[dict[str, Any]]:
    """Peaks on the card and caches on the host for sizes, tiles and types."""
    rows = []
    for name, (spec, sizes) in SIZES.items():
        cases = [
            (size, tile, dtype, encodes)
            for encodes in (False, True)
            for size in sizes
            for dtype in TYPES
            for tile in TILES
        ]
        for (height, width), tile, dtype, encodes in cases:
            latents = (height // spec.spatial_factor, width // spec.spatial_factor)
            found = measure_vae(spec, *latents, tile, dtype, encodes=encodes)
            rows.append(
                {
                    "vae": name,
                    "does": "encode" if encodes else "decode",
                    "size": f"{width}x{height}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "tile": tile,
                    "num_tiles": found.num_tiles,
                    "card_gib": round(found.card_bytes / 2**30, 3),
                    "host_gib": round(found.host_bytes / 2**30, 3),
                }
            )
    return rows


@torch.inference_mode()
def times(rounds: int, threads: int) -> dict[str, Any]:
    """Our tiled decode over diffusers', with the same weights."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    oracle = AutoencoderKLWan(
        latents_mean=list(WAN21.latents_mean), latents_std=list(WAN21.latents_std)
    ).eval()
    oracle.enable_tiling(*[TIMED_TILE] * 2, *[TIMED_TILE * 3 // 4] * 2)
    vae = WanVae(WAN21).requires_grad_(False)
    vae.load_state_dict(oracle.state_dict())
    latents = torch.randn(1, 16, TIMED_LATENTS, *TIMED_SIZE)

    def ours() -> Tensor:
        return torch.cat(list(VaeStream(vae, *TIMED_SIZE, TIMED_TILE).decode(latents)), 2)

    def theirs() -> Tensor:
        sample: Tensor = oracle.decode(latents).sample
        return sample

    assert ours().shape == theirs().shape
    return paired(ours, theirs, rounds, threads).as_json()


@torch.inference_mode()
def colours() -> dict[str, dict[str, Any]]:
    """Mean shift of red, green and blue, and the root mean square of the difference."""
    files, cpu = open_model("demo"), torch.device("cpu")
    vae = load_vae(files.spec.vae, files.vae, torch.float32, cpu)
    drawn = [
        clips.render(clips.sample_clip(random.Random(i), held_out=True), CLIP_FRAMES)
        for i in range(NUM_CLIPS)
    ]
    latents, _ = vae.encode(torch.stack(drawn))
    exact, _ = vae.decode(latents)
    makers: dict[str, Callable[[torch.dtype], WanVae]] = {
        "": lambda dtype: load_vae(files.spec.vae, files.vae, dtype, cpu),
        ", all half": lambda dtype: load_vae(files.spec.vae, files.vae, dtype, cpu).to(dtype),
    }
    shifts = {}
    for dtype in (torch.bfloat16, torch.float16):
        for name, make in makers.items():
            difference = 127.5 * (make(dtype).decode(latents)[0] - exact)
            shifts[str(dtype).removeprefix("torch.") + name] = {
                "mean": [round(x, 4) for x in difference.mean((0, 2, 3, 4)).tolist()],
                "worst_clip": round(difference.mean((2, 3, 4)).abs().max().item(), 4),
                "rms": round(difference.square().mean().sqrt().item(), 4),
            }
    return shifts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="0 leaves the time out")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    rows = memory()
    print(table([row.values() for row in rows], rows[0]))
    records: dict[str, Any] = {"at_most": AT_MOST, "memory": rows, "colour": colours()}
    print("colour", json.dumps(records["colour"]))
    if given.rounds:
        records["time"] = times(given.rounds, given.threads)
        print("time", json.dumps(records["time"]))
    RESULTS.write_text(json.dumps({"machine": machine(), "results": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()

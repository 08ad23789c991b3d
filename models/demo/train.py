"""The demo model's trainer on the command line: `python -m reelpool.models.demo.train --help`.

The whole recipe, on two CPU cores (how long each took stands in README.md):

    train-vae --out work/vae                       encoder and decoder, from nothing
    encode --start work/vae --out work/set.pt      draw and encode clips
    train --set work/set.pt --out work/ckpt.pt     transformer and text encoder
    refine-vae --start work/vae --out work/better  the decoder only; latents stay valid
    export --vae work/better --transformer work/ckpt.pt --out work/model

`--start` takes a model folder (or one that holds a `vae/` only), by default the one that ships.
Every training resumes from its checkpoint when called again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.multiprocessing.spawn import spawn

from ..files import open_model
from ..jsonfile import read_json
from ..open_weights import open_weights
from ..registry import DEMO_FOLDER
from ..vae_config import vae_spec_from_config
from ..wan_vae import WanVae
from . import export, latent_set, network, optimiser, train_vae
from .latent_set import encode_clips, load_sets, save_set
from .train_transformer import (
    DemoNetwork,
    TransformerSettings,
    split_average,
    train_transformer,
)
from .train_vae import VaeSettings

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    args = build_parser().parse_args(arguments)
    if args.command == "encode":
        _start_process()
        save_set(encode_clips(load_own_vae(args.start), args.count, args.seed), args.out)
    elif args.command == "export":
        _start_process()
        run_export(args)
    elif args.processes == 1:
        run_training(0, args)
    else:
        spawn(run_training, (args,), args.processes)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m reelpool.models.demo.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_argument("--out", type=Path, required=True, help="what to write")
        return command

    def add_start(command: argparse.ArgumentParser) -> None:
        command.add_argument("--start", type=Path, default=DEMO_FOLDER, help="folder to start from")

    def add_training(command: argparse.ArgumentParser, steps: int) -> None:
        command.add_argument("--steps", type=int, default=steps, help="updates in all")
        command.add_argument("--processes", type=int, default=1, help="of one thread each")
        command.add_argument("--port", type=int, default=29611, help="where processes meet")
        command.add_argument("--muon-lr", type=float, default=0.01, help="for matrices")
        command.add_argument("--adam-lr", type=float, default=1e-3, help="for the rest")
        command.add_argument("--decay-from", type=float, default=0.35, help="share of the steps")

    encode = add("encode", "draw clips and encode them: a training set")
    add_start(encode)
    encode.add_argument("--count", type=int, default=9600, help="clips")
    encode.add_argument("--seed", type=int, default=0, help="sets of other seeds differ")
    train = add("train", "train transformer and text encoder")
    add_start(train)
    add_training(train, 3000)
    train.add_argument("--set", type=Path, nargs="+", required=True, help="files of encode")
    train.add_argument("--fresh", action="store_true", help="from random weights, not --start's")
    train.add_argument("--batch", type=int, default=40, help="clips a process and step")
    train.add_argument("--compile", action="store_true", help="by torch.compile, 1.3 times faster")
    add_training(add("train-vae", "train a VAE from nothing"), 3000)
    refine = add("refine-vae", "train the decoder only, on --start's latents")
    add_start(refine)
    add_training(refine, 2000)
    out = add("export", "write a model folder")
    add_start(out)
    out.add_argument("--transformer", type=Path, help="checkpoint of train, else --start's")
    out.add_argument("--vae", type=Path, help="folder with another vae/, else --start's")
    return parser


def run_training(rank: int, args: argparse.Namespace) -> None:
    """One process of a training command."""
    _start_process()
    optimiser.join(rank, args.processes, args.port)
    if args.command == "train":
        demo = fresh_network() if args.fresh else load_network(args.start)
        settings = TransformerSettings(
            args.steps,
            batch=args.batch,
            muon_lr=args.muon_lr,
            adam_lr=args.adam_lr,
            decay_from=args.decay_from,
            compile=args.compile,
        )
        train_transformer(demo, load_sets(args.set), settings, args.out, rank, args.processes)
    else:
        _train_vae(rank, args)
    optimiser.leave()


def _train_vae(rank: int, args: argparse.Namespace) -> None:
    """Train a VAE, write `vae/` into the folder `--out` and log what became better."""
    is_refining = args.command == "refine-vae"
    torch.manual_seed(0)
    vae = load_own_vae(args.start) if is_refining else WanVae(train_vae.SPEC)
    settings = VaeSettings(
        args.steps,
        freeze_encoder=is_refining,
        muon_lr=args.muon_lr,
        adam_lr=args.adam_lr,
        decay_from=args.decay_from,
    )
    if rank == 0:
        log.info("before: %.2f dB on held-out clips", _held_out_psnr(vae))
    checkpoint = args.out / "checkpoint.pt"
    training = train_vae.train_vae(vae, settings, checkpoint, rank, args.processes)
    if rank == 0:
        vae.load_state_dict({**vae.state_dict(), **training.average})
        vae.spec = vae.spec if is_refining else train_vae.measure_statistics(vae)
        log.info("after: %.2f dB", _held_out_psnr(vae))
        export.export_vae(args.out, vae.spec, vae.state_dict(), torch.float32)


def _held_out_psnr(vae: WanVae) -> float:
    _, videos, decoded = train_vae.reconstruct(vae, 48, latent_set.NUM_FRAMES)
    return train_vae.mean_psnr(videos, decoded)


def run_export(args: argparse.Namespace) -> None:
    """Write a whole model folder."""
    demo = load_network(args.start)
    checkpoint = args.transformer
    average = optimiser.load(checkpoint)["average"] if checkpoint else demo.parameters()
    weights, text = split_average(average)
    export.export_transformer(args.out, demo.spec, weights, torch.bfloat16)
    export.export_text(args.out, text, demo.tokenizer, torch.bfloat16)
    vae = load_own_vae(args.vae or args.start)
    export.export_vae(args.out, vae.spec, vae.state_dict(), torch.float32)
    has_own = (args.start / "demo.json").exists()
    defaults = open_model(str(args.start)).spec.defaults if has_own else export.DEFAULTS
    export.export_index(args.out, defaults)


def fresh_network() -> DemoNetwork:
    """Random weights and the grammar's own vocabulary."""
    torch.manual_seed(0)
    weights = network.random_weights(network.SPEC, torch.Generator().manual_seed(0))
    return DemoNetwork(network.SPEC, weights, None, network.build_tokenizer())


def load_network(folder: Path) -> DemoNetwork:
    """Transformer, text encoder and tokenizer of a model folder; new words get random rows."""
    torch.manual_seed(0)
    files = open_model(str(folder))
    weights = {name: files.transformer.get(name) for name in files.transformer.names()}
    text = {name: files.text_encoder.get(name) for name in files.text_encoder.names()}
    stored = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).get_vocab()
    tokenizer = network.build_tokenizer(sorted(stored, key=stored.__getitem__))
    return DemoNetwork(files.spec.transformer, weights, text, tokenizer)


def load_own_vae(folder: Path) -> WanVae:
    """The VAE of a folder, float32, with parameters of its own that may be trained."""
    vae = WanVae(vae_spec_from_config(read_json(folder / "vae" / "config.json")))
    source = open_weights(folder / "vae", "diffusion_pytorch_model")
    vae.load_state_dict({name: source.get(name).float().clone() for name in vae.state_dict()})
    return vae


def _start_process() -> None:
    torch.set_num_threads(1)
    logging.basicConfig(
        stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", force=True
    )


if __name__ == "__main__":
    main()

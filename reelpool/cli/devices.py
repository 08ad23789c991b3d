"""The command that says what this machine has."""

from __future__ import annotations

import dataclasses

import typer

from reelpool.cli.generate import Json, Verbose


def devices(context: typer.Context, json: Json = False, verbose: Verbose = False) -> None:
    """Show the cards, memory and cores that reelpool finds on this machine."""
    from reelpool.runtime import log

    log.setup()
    from reelpool.runtime.device import detect_cards, detect_host

    host, cards = detect_host(), detect_cards()
    lines = [
        f"{host.name}: {host.num_cores} cores, {log.format_bytes(host.ram_bytes)} of memory, "
        f"{log.format_bytes(host.ram_free_bytes)} free"
    ]
    width = max(len(card.name) for card in cards)
    for card in cards:
        memory, dtypes = log.format_bytes(card.memory_bytes), ", ".join(card.dtypes)
        lines.append(f"  {card.name:<{width}}  {memory} free  {card.description}  {dtypes}")
    if not any(card.is_cuda for card in cards):
        lines.append("no NVIDIA card found: the CPU does the work, slowly")
    content: dict[str, object] = {"host": dataclasses.asdict(host)}
    content["cards"] = [dataclasses.asdict(card) for card in cards]
    context.obj.result(content, "\n".join(lines))

"""The command line. Each command imports what it needs, so `info` and `--help` are quick and need little installed."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

import fused_rnn
from fused_rnn.commands.bench.command import bench


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(fused_rnn.__version__, prog_name="fused_rnn")
def cli() -> None:
    """Fused LSTM, GRU and RNN time loops for PyTorch."""


cli.add_command(bench)


@cli.command()
def info() -> None:
    """Print what was built, which backends can run here, and why the others cannot."""
    from fused_rnn.commands.info import collect

    console = Console()
    for section, facts in collect().items():
        table = Table(title=section, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in facts.items():
            colour = "green" if value.startswith("available") else "red" if value.startswith("not available") else ""
            table.add_row(name, f"[{colour}]{value}[/]" if colour else value)
        console.print(table)
        console.print()


@cli.command(context_settings={"ignore_unknown_options": True}, add_help_option=False, options_metavar="")
@click.argument("name", required=False, metavar="[NAME]")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]")
def demo(name: str | None, arguments: tuple[str, ...]) -> None:
    """Train a model with torch.nn and with fused_rnn, side by side. Without a name: which there are."""
    from fused_rnn.commands.demo import PROGRAMS, folder, run

    if name in (None, "-h", "--help"):
        table = Table(title="python -m fused_rnn demo NAME [--quick] [--help]", title_justify="left", show_header=False)
        for program, what in PROGRAMS.items():
            table.add_row(program, what)
        Console().print(table)
        return
    if name not in PROGRAMS:
        raise click.BadParameter(f"got {name!r}, expected one of {', '.join(PROGRAMS)}", param_hint="NAME")
    try:
        place = folder()
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error
    run(place / f"{name}.py", arguments)

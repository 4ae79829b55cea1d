"""`python -m fused_rnn info | bench | demo`."""

from __future__ import annotations

import sys

USAGE = """\
python -m fused_rnn info     what was built, which backends can run here, and why the others cannot
python -m fused_rnn bench    measure against torch.nn      } with pip install click rich matplotlib numpy,
python -m fused_rnn demo     train six whole models        } and --help after each"""


def main() -> None:
    """Run the command line; without click and rich, `info` still works and the others say what to install."""
    try:
        from fused_rnn.commands.cli import cli
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        if sys.argv[1:] == ["info"]:
            from fused_rnn.commands.info import as_text

            print(as_text())
            return
        if not sys.argv[1:] or "--help" in sys.argv:
            print(USAGE)
            return
        sys.exit(f"this command needs {error.name}: pip install click rich matplotlib numpy")
    cli(prog_name="python -m fused_rnn")


if __name__ == "__main__":
    main()

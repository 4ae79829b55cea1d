"""`python -m fused_rnn info | bench | demo`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without click and rich, `info` still works and the others say what to install."""
    try:
        from fused_rnn.cli import cli
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        if sys.argv[1:] == ["info"]:
            from fused_rnn.info import as_text

            print(as_text())
            return
        sys.exit(f"this command needs {error.name}: pip install 'fused_rnn[demo]' brings all that bench and demo use")
    cli(prog_name="python -m fused_rnn")


if __name__ == "__main__":
    main()

"""Entry point of `skin-resnet` and of `python -m skin_resnet`."""

import sys
from pathlib import Path
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    try:
        from skin_resnet.cli import main as run
    except ImportError as error:  # too early for `doctor`
        advice = "run `make setup`, then `source .venv/bin/activate`"
        print(f"error: {sys.executable} lacks required packages ({error}); {advice}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    # `python -m` looks for modules in the current folder first: a search.py there must not replace ours.
    root = str(Path(__file__).parents[1])
    if not sys.flags.safe_path and sys.path[0] != root:
        del sys.path[0]
    main()

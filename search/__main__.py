"""Makes `python -m search` run a search."""

import sys

from search.config import SearchConfig
from skin_resnet.cli import parse_options, run_and_exit


def main(arguments: list[str] | None = None) -> None:
    """Read the options, search, and exit."""
    run_and_exit(lambda: _search(sys.argv[1:] if arguments is None else arguments))


def _search(arguments: list[str]) -> None:
    config = parse_options(SearchConfig, arguments, prog="python -m search")
    # Here and not above: `--help` should not wait for torch, MLflow and Optuna.
    from search.run import search

    search(config)


if __name__ == "__main__":
    main()

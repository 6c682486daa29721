"""Makes `python -m skin_resnet` run the command line."""

import sys

if __name__ == "__main__":
    try:
        from skin_resnet.cli import main
    except ImportError as error:  # too early for the doctor to tell it
        print(
            f"error: {sys.executable} must have the packages of requirements.lock, but got: {error}; "
            "run `make setup`, then use .venv/bin/python.",
            file=sys.stderr,
        )
        sys.exit(2)
    main()

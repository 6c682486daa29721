"""Makes `python -m skin_resnet` run the command line."""

from skin_resnet.cli import main

if __name__ == "__main__":
    main()

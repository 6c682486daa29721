"""`python -m search`: the same as `skin-resnet search`."""

import sys

from skin_resnet.cli import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])

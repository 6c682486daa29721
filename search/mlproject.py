"""Writes `MLproject`, the search's entry point included: `python -m search.mlproject > MLproject`."""

from collections.abc import Mapping

from search.config import SearchConfig
from skin_resnet import mlproject
from skin_resnet.config import FrozenConfig

ENTRY_POINTS: Mapping[str, tuple[str, type[FrozenConfig]]] = {
    **mlproject.ENTRY_POINTS,
    "search": ("python -m search", SearchConfig),
}

if __name__ == "__main__":
    print(mlproject.render_mlproject(ENTRY_POINTS), end="")

"""Training; here what has to be known before Lightning is imported: which processes are our own."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Set in the environment of a process that we started for a further device.
_VARIABLE = "SKIN_RESNET_WORKER"
# By these, Lightning takes a process for one of a group that torchrun, Slurm or JSM has started.
_RANKS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "JSM_NAMESPACE_RANK"),
)


def get_worker_task() -> dict[str, str] | None:
    """Return the training that this process takes part in; None in the first process of a training."""
    text = os.environ.get(_VARIABLE)
    return json.loads(text) if text else None


@contextmanager
def start_workers_with(task: dict[str, str]) -> Iterator[None]:
    """Mark processes that are started in this block as workers of this training."""
    os.environ[_VARIABLE] = json.dumps(task)
    try:
        yield
    finally:
        del os.environ[_VARIABLE]


def ignore_foreign_ranks() -> None:
    """Forget ranks that a scheduler, another launcher or an earlier training has left in the environment."""
    if get_worker_task() is None:
        for name in _RANKS:
            os.environ.pop(name, None)

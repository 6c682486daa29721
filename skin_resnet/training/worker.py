"""Processes of a training on several devices: which ones are ours, and what they take part in."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Set in the environment of a process that we started for a further device.
_VARIABLE = "SKIN_RESNET_WORKER"
# By these, Lightning takes a process for one that torchrun, Slurm or JSM has started as part of a group.
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


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
    """Forget ranks that a scheduler or another launcher has left in the environment.

    Only our own launch decides ranks. To be called before Lightning is imported, which reads them then.
    """
    if get_worker_task() is None:
        for name in _FOREIGN:
            os.environ.pop(name, None)

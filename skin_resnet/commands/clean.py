"""The command `clean`: list checkpoints and decoded images, and remove those that no run needs."""

import math
import re
import shutil
import time
from pathlib import Path

from filelock import FileLock

from skin_resnet.commands.config import CleanConfig
from skin_resnet.errors import UserError, expand, expand_cache
from skin_resnet.tracking.history import read_state
from skin_resnet.training.checkpoint import RunFolder


def clean(config: CleanConfig) -> None:
    """List what is there and why it is kept; with `remove`, remove the rest.

    Raises:
        UserError: The tracking store cannot be used, or something cannot be removed.
    """
    checkpoints, stores = expand(config.checkpoint_dir), expand_cache(config.cache_dir) / "stores"
    removes, total_mb, needed_since_s = config.remove == "true", 0.0, math.inf
    runs = {file.parent for name in ("*.lock", "*.pt") for file in checkpoints.glob(f"*/{name}")}
    keys = {each.name[:32] for each in stores.glob("*") if re.match("[0-9a-f]{32}", each.name)}
    try:
        for path in [*sorted(runs), *sorted(stores / key for key in keys)]:
            files = [file for each in path.parent.glob(f"{path.name}*") for file in (each, *each.rglob("*"))]
            size_mb = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
            if path in runs:
                why, since_s = _clean_run(path, removes)
                needed_since_s = min(needed_since_s, since_s)
            else:
                why = _clean_images(path, needed_since_s, config.days, removes)
            total_mb += 0 if why else size_mb
            verdict = f"kept: {why}" if why else "removed" if removes else "not needed"
            print(f"{size_mb:7,.0f} MB  {path}\n{'':12}{verdict}")
    except OSError as error:
        raise UserError(f"cannot remove {error.filename}: {error.strerror}") from None
    print(f"{total_mb:7,.0f} MB  {'removed' if removes else 'not needed; --remove true removes it'}")


def _clean_run(path: Path, removes: bool) -> tuple[str, float]:
    """Return why a run's checkpoints are kept (empty: they are not), and since when it may need images."""
    folder, had_lock = RunFolder(path), (path / "running.lock").exists()
    status, start_s = read_state(path.name)
    try:
        folder.acquire()
    except UserError as error:
        return str(error), start_s
    can_resume = folder.last.exists() and status not in {"FINISHED", "DELETED"}
    is_kept = can_resume or status in {"", "RUNNING"}
    if removes and not is_kept:
        folder.remove()
    else:
        folder.release(keep_lock_file=had_lock)
    why = f"run {status or 'unknown to this tracking store'}" + ", can be resumed" * can_resume
    return why * is_kept, start_s if can_resume else math.inf


def _clean_images(path: Path, needed_since_s: float, days: float, removes: bool) -> str:
    """Return why decoded images are kept (empty: they are not)."""
    file = path / "store.json"
    used_s = max(file.stat().st_atime, file.stat().st_mtime) if file.exists() else 0.0
    days_ago = (time.time() - used_s) / 86_400
    if used_s >= needed_since_s or days_ago < days:
        return f"last used {days_ago:.0f} days ago" + ", a run may need it" * (used_s >= needed_since_s)
    try:
        with FileLock(f"{path}.lock", timeout=0):
            for each in path.parent.glob(f"{path.name}*") if removes else ():
                shutil.rmtree(each) if each.is_dir() else each.unlink()
    except TimeoutError:
        return "a process is decoding these images"
    return ""

"""The command audit: does a split leak, and what does that cost?"""

import json
import logging
from dataclasses import replace
from pathlib import Path

from skin_resnet.config import AuditConfig
from skin_resnet.data.extract import extract
from skin_resnet.data.leakage import LeakPassport, audit_split, read_split
from skin_resnet.data.split import split_lesions
from skin_resnet.data.store import open_store
from skin_resnet.errors import UserError
from skin_resnet.evaluation.passport import format_passport
from skin_resnet.tracking import log_setting
from skin_resnet.tracking import run as mlflow_run

LEAKS = 1  # the command's exit code for a split that does

_logger = logging.getLogger(__name__)


def audit(config: AuditConfig) -> int:
    """Print the leak passport of a split.

    Returns:
        The exit code: 0 when it is clean, 1 when it leaks.

    Raises:
        UserError: The data or the split cannot be used, or the passport cannot be written.
    """
    table = extract(config.data, config.cache_dir)
    split = None if config.split == "own" else read_split(Path(config.split).expanduser(), table.image_id)
    store = open_store(table, "auto", config.cache_dir, config.on_bad_image)
    table = table[table.image_id.isin(store.image_ids)].reset_index(drop=True)
    split = split or split_lesions(
        table,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
    )
    passport = audit_split(table, split, store.pixels)
    if config.split == "own":  # the split that train makes never has them
        passport = replace(passport, unread=len(store.skipped))
    page = format_passport(passport)
    if mlflow_run.is_project_run():
        with mlflow_run.open_run("leak audit"):
            mlflow_run.log_params(config)
            log_setting.log_passport(passport.to_dict(), page)
            mlflow_run.log_note(page)
            if passport.leaks:
                mlflow_run.set_tags(
                    {"failure": "the split leaks"}
                )  # `mlflow run` ends the run FAILED for exit 1
    if config.report != "none":
        _write_passport(passport, Path(config.report).expanduser())
    print(page)
    return LEAKS if passport.leaks else 0


def _write_passport(passport: LeakPassport, file: Path) -> None:
    try:
        file.write_text(json.dumps(passport.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"passport must be a file that can be written, but {file}: {error.strerror}; choose another."
        ) from None
    _logger.info("wrote the passport with all pairs to %s", file)

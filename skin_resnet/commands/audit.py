"""The command `audit`: check whether a split leaks, and how many test images that affects."""

import json
import logging
from dataclasses import replace

from skin_resnet.commands.config import AuditConfig
from skin_resnet.data.extract import extract
from skin_resnet.data.leakage import LeakageReport, audit_split
from skin_resnet.data.split import read_split, split_lesions
from skin_resnet.data.store import open_store
from skin_resnet.errors import UserError, expand
from skin_resnet.evaluation.page import format_leakage, print_markdown
from skin_resnet.tracking import run as mlflow_run

LEAKS = 1  # exit code for a split that leaks

_logger = logging.getLogger(__name__)


def audit(config: AuditConfig) -> int:
    """Print the leakage report of a split.

    Returns:
        The exit code: 0 when the split is clean, 1 when it leaks.

    Raises:
        UserError: The data or the split cannot be used, or the report cannot be written.
    """
    table = extract(config.data, config.cache_dir)
    split = None if config.split == "own" else read_split(expand(config.split), table.image_id)
    store = open_store(table, "auto", config.cache_dir, config.on_bad_image)
    table = table[table.image_id.isin(store.image_ids)].reset_index(drop=True)
    split = split or split_lesions(
        table,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
    )
    report = audit_split(table, split, store)
    if config.split == "own":  # the split that train makes leaves them out
        report = replace(report, unread=len(store.skipped))
    page = format_leakage(report)
    if mlflow_run.is_project_run():
        with mlflow_run.open_run(f"audit · {config.data}") as run:
            run.log_params(config)
            run.log_artifacts({"data/leakage.json": report.to_dict(), "data/leakage.md": page})
            run.set_tags({"split.leaks": str(report.leaks).lower()})
            run.describe(page)
            if report.leaks:  # `mlflow run` ends the run FAILED for exit code 1
                run.set_tags({"failure": "the split leaks"})
    if config.report != "none":
        _write_report(report, config.report)
    print_markdown(page)
    return LEAKS if report.leaks else 0


def _write_report(report: LeakageReport, path: str) -> None:
    file = expand(path)
    try:
        file.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write report={file}: {error.strerror}; choose another file.") from None
    _logger.info("wrote the leakage report with all pairs to %s", file)

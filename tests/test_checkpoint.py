"""Checkpoints are whole or not there, and reading one runs no code."""

import pickle
from pathlib import Path

import pytest
import torch

from skin_resnet.errors import UserError
from skin_resnet.training.checkpoint import read_checkpoint, save_checkpoint


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    content = {"network": {"w": torch.arange(3.0)}, "classes": ["a", "b"], "epoch": 3}
    save_checkpoint(tmp_path / "runs" / "best.pt", content)
    back = read_checkpoint(tmp_path / "runs" / "best.pt")
    assert torch.equal(back["network"]["w"], content["network"]["w"])
    assert (back["classes"], back["epoch"]) == (["a", "b"], 3)
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["best.pt"]


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(AttributeError):
        save_checkpoint(path, {"epoch": 2, "bad": lambda: None})  # cannot be written: fails half-way
    assert read_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["best.pt"]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "truncated", "bomb", "other", "format"])
def test_anything_else_is_refused_in_one_line_and_no_code_runs(tmp_path: Path, content: object) -> None:
    path = tmp_path / "best.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        save_checkpoint(path, {"w": torch.zeros(1000)})
        path.write_bytes(path.read_bytes()[:2000])
    elif content == "bomb":
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    else:
        torch.save([1, 2] if content == "other" else {"format": 99}, path)
    with pytest.raises(UserError, match="not a checkpoint") as told:
        read_checkpoint(path)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "ran").exists()


def test_a_missing_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint .*nowhere\.pt"):
        read_checkpoint(tmp_path / "nowhere.pt")

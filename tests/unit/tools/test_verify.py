"""``swift-lora-fix verify`` without its runs (tests/real/swift/test_verify.py has those): mistakes, and the verdict."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from swift_lora_fix.tools.verify import view
from swift_lora_fix.tools.verify.facts import Result, Side, Sync
from tests.support.environments import Environment, swift_lora_fix


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def verify(model: object, adapter: object, out: Path) -> str:
    """What it says of a mistake, without having started a run."""
    done = swift_lora_fix("verify", "--model", model, "--adapter", adapter, "--out", out)
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    assert not (out / "ours").exists(), "nothing was started"
    return " ".join(done.stderr.split())


def test_a_model_that_is_not_there(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").touch()
    assert "The model /nowhere/model is no local folder." in verify("/nowhere/model", adapter, tmp_path / "out")
    assert "The model ./model-7b is no local folder." in verify("./model-7b", adapter, tmp_path / "out")
    assert "a-file is no local folder." in verify(tmp_path / "a-file", adapter, tmp_path / "out")
    assert "empty has no config.json" in verify(tmp_path / "empty", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_there(tmp_path: Path, model: Path) -> None:
    assert "The adapter /nowhere/adapter is no local folder." in verify(model, "/nowhere/adapter", tmp_path / "out")


def test_a_folder_that_cannot_be_written(tmp_path: Path, model: Path, adapter: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    said = verify(model, adapter, file / "out")
    assert f"{file / 'out'} cannot be written: Not a directory. Name another folder with --out." in said
    (tmp_path / "taken" / "prompts.jsonl").mkdir(parents=True)
    assert "cannot be written: Is a directory." in verify(model, adapter, tmp_path / "taken")


def test_the_package_alone(tmp_path: Path, model: Path, adapter: Path) -> None:
    missing = ("swift", "ms_swift-*", "trl", "trl-*", "torch", "torch-*", "numpy")
    environment = Environment(tmp_path / "environment").without(*missing)
    done = environment.run("verify", "--model", model, "--adapter", adapter, "--out", tmp_path / "out")
    assert done.returncode == 2 and "pip install ms-swift" in done.stderr, done.stderr


def test_trl_alone_is_asked_for(tmp_path: Path, model: Path, adapter: Path) -> None:
    environment = Environment(tmp_path / "environment").without("trl", "trl-*")
    named = environment.run("verify", "--framework", "trl", "--model", model, "--adapter", adapter)
    assert named.returncode == 2 and "pip install trl" in named.stderr, named.stderr


def test_without_matplotlib_there_is_a_verdict_and_no_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Sync(0, 0.1, 0.01, 0.02, 0.0, 0.01, 1.0, 1.0, 1.0, True, True, None, 0, 3, 0, 4)
    result = Result(Side("fixed", (right,) * 2, "", tmp_path), Side("stock", (right,) * 2, "", tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    view.show(result, tmp_path, Console(highlight=False, width=100))
    captured = capsys.readouterr()
    assert "Proved: with the plugin all 2 syncs served the adapter" in captured.out and result.exit_code == 0
    assert "No chart" in captured.err and "pip install matplotlib" in captured.err
    assert not list(tmp_path.glob("*.png"))

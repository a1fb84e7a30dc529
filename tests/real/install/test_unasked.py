"""Installed alone, the package changes nothing: vLLM loads its entry point in every process, asked for or not.

Real processes: ms-swift's trainer, its rollout server, and a program that uses vLLM's ``LLM``. A witness
(tests/support/witness) notes who imports the package, in whatever process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from swift_lora_fix.install import releases
from swift_lora_fix.install.instrumentor import INTERNAL, PARENT_ARMED
from tests.real.install.test_arming import FAMILY
from tests.support import driver, forks, hangs
from tests.support.driver import PLUGINS, REPOSITORY, Run, this_python
from tests.support.environments import Environment, clean_environment
from tests.support.rollout_server import RolloutServer, running

PACKAGE = "swift_lora_fix"
ENTRY_POINT = "swift_lora_fix_vllm"  # the module that vLLM loads
WITNESS = PLUGINS.parent / "witness"


@dataclass(frozen=True)
class Seen:
    """What a program printed, and which of its processes imported the module of the entry point and the package."""

    log: str
    reached: set[str]
    imported: set[str]

    @classmethod
    def of(cls, log: str, folder: Path) -> Seen:
        lines = [line.split() for line in (folder / "witness").read_text().splitlines()]
        reached, imported = ({pid for pid, name in lines if name == module} for module in (ENTRY_POINT, PACKAGE))
        return cls(log, reached, imported)


def environment(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True)
    (folder / "witness").touch()
    return {
        "VLLM_PLUGINS": PACKAGE,
        "SLF_WITNESS": str(folder / "witness"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(WITNESS), os.environ.get("PYTHONPATH")])),
    }


def trainer(model: Path, folder: Path, asked: bool) -> Seen:
    """A step of GRPO with a colocated engine; asked for by the plugin's flag."""
    run = Run("trainer", this_python(), model, folder, fixed=asked, environment=environment(folder), probe=False)
    run.arguments = {"max_steps": 1, "save_steps": 100}
    run.start()
    assert run.returncode == 0, run.log[-4000:]
    return Seen.of(run.log, folder)


def rollout_server(model: Path, folder: Path, asked: bool) -> Seen:
    """Until it answers; asked for by the plugin's flag."""
    server = RolloutServer(model, folder, environment=environment(folder), fixed=asked)
    with running([server]):
        pass
    return Seen.of(server.log, folder)


def llm(model: Path, folder: Path, asked: bool) -> Seen:
    """A program with an engine in a process of its own, which inherits no module; asked for by an import."""
    program = folder / "program.py"
    variables = environment(folder)
    program.write_text(
        textwrap.dedent(f"""
            if __name__ == "__main__":
                if {asked}:
                    import swift_lora_fix
                from vllm import LLM, SamplingParams
                llm = LLM({str(model)!r}, enforce_eager=True, max_model_len=128)
                print(llm.generate("Hello", SamplingParams(max_tokens=2))[0].outputs[0].token_ids)
        """)
    )
    with open(folder / "log.txt", "w") as log:
        spawned = {**variables, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
        process = driver.launch([sys.executable, str(program)], spawned, folder, log)
        try:
            status = hangs.wait(process, folder)
        finally:
            process.kill()
    text = (folder / "log.txt").read_text()
    assert status == 0, text[-4000:]
    return Seen.of(text, folder)


@pytest.fixture(autouse=True)
def nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has imported the package, which its children are not to know."""
    for variable in INTERNAL:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forks.tiny_model(tmp_path_factory.mktemp("unasked"))


# vLLM's side does not depend on ms-swift's release; a run takes half a minute.
newest = pytest.mark.skipif(FAMILY is not releases.FAMILIES[-1], reason="shown with the newest release")
programs = pytest.mark.parametrize(
    "program", [trainer, pytest.param(rollout_server, marks=newest), pytest.param(llm, marks=newest)]
)


@pytest.mark.e2e
@programs
def test_installed_and_not_asked_for_nothing_changes(
    program: Callable[[Path, Path, bool], Seen], model: Path, tmp_path: Path
) -> None:
    seen = program(model, tmp_path / "unasked", False)
    assert not seen.imported, f"imported in {len(seen.imported)} processes\n{seen.log[-3000:]}"
    assert "swift.lora_fix" not in seen.log
    assert seen.reached, "vLLM did not load the entry point, so this proves nothing"


@pytest.mark.e2e
@newest
@programs
def test_asked_for_it_is_in_every_process_that_vllm_starts(
    program: Callable[[Path, Path, bool], Seen], model: Path, tmp_path: Path
) -> None:
    seen = program(model, tmp_path / "asked", True)
    assert seen.imported >= seen.reached and seen.reached, seen
    if program is llm:
        assert len(seen.reached) > 1, "the engine was to have a process of its own"
    else:
        assert "patched swift." in seen.log or "takes adapters below" in seen.log


ALONE = """
    import sys
    from importlib.metadata import entry_points
    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "swift_lora_fix"]
    entry.load()()
    entry.load()()
    ours = sys.modules.get("swift_lora_fix")
    print("found", "absent" if ours is None else ours.status().armed)
"""


def loaded_alone(python: object, **asked: str) -> str:
    """Loaded and called twice, as vLLM does in the process that starts an engine."""
    command = [str(python), "-c", textwrap.dedent(ALONE)]
    done = subprocess.run(command, env=clean_environment(**asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "asked, found",
    [
        ({}, "found absent"),
        ({PARENT_ARMED: "1"}, "found True"),
    ],
    ids=["nobody", "the package"],
)
def test_the_entry_point_does_what_its_parent_asked_for(asked: dict[str, str], found: str) -> None:
    assert loaded_alone(sys.executable, **asked).endswith(found)


def test_a_wheel_and_a_source_distribution_have_the_entry_point(tmp_path: Path) -> None:
    """The environments of the suite have an editable installation; here is a wheel, built from an sdist."""
    source = tmp_path / "source"
    shutil.copytree(REPOSITORY / PACKAGE, source / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    sdist = build("sdist", source)
    shutil.unpack_archive(sdist, tmp_path)
    wheel = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"))
    environment = Environment(tmp_path / "environment").without(f"{PACKAGE}*", f"__editable__*{PACKAGE}*")
    shutil.unpack_archive(wheel, environment.site, "zip")
    python = tmp_path / "environment" / "bin" / "python"
    assert loaded_alone(python) == "found absent"
    assert loaded_alone(python, **{PARENT_ARMED: "1"}) == "found True"


def build(what: str, folder: Path) -> Path:
    """By the project's own build backend; returns the file."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.split()[-1]

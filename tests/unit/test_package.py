"""The package as it would be published: built, checked, and installed where there is neither ms-swift nor vLLM."""

from __future__ import annotations

import email
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import swift_lora_fix
from swift_lora_fix.install import releases
from tests.support import hangs

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".venv-docs" / "bin" / "python"
# what a user's machine has of the package: nothing but what pip put there
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
pytestmark = pytest.mark.skipif(
    not (releases.installed_swift() or "0").startswith(releases.NEWEST_KNOWN),
    reason="the same everywhere: in the newest environment",
)


def run(*command: object, cwd: Path = ROOT, expect: int = 0) -> str:
    done = hangs.run(list(map(str, command)), env=CLEAN, cwd=cwd)
    assert done.returncode == expect and "Traceback" not in done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it. Made from the tracked files alone."""
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    assert TOOLS.exists(), "scripts/setup --docs makes it"
    run(TOOLS, "-m", "build", "--no-isolation", "--outdir", source / "dist", cwd=source)
    return source / "dist"


@pytest.fixture(scope="session")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment into which pip installed the wheel, with what it asks for and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    (wheel,) = built.glob("*.whl")
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    return folder / "bin"


def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_twine_accepts_both(built: Path) -> None:
    said = run(TOOLS, "-m", "twine", "check", "--strict", *sorted(built.iterdir()))
    assert said.count("PASSED") == 2, said


def test_the_sdist_holds_what_a_packager_and_a_reader_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "README.md", "setup.py", "mkdocs.yml",
        "docs/index.md", "scripts/test", "scripts/check", "tests/unit/test_package.py", "requirements/newest.txt",
        "swift_lora_fix/py.typed", "demo/__main__.py", "bench/sync.py", "examples/README.md",
    }  # fmt: skip
    assert wanted <= names, wanted - names
    tracked = {name for name in names if name.endswith((".pyc", ".log"))}
    assert not tracked


def test_the_wheel_holds_the_package_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    info = f"swift_lora_fix-{swift_lora_fix.__version__}.dist-info"
    assert tops == {"swift_lora_fix", "swift_lora_fix_vllm.py", info}
    for name in ("py.typed", "plugin/swift_lora_fix_plugin.py", "tools/verify/plugin/swift_lora_fix_verify.py"):
        assert f"swift_lora_fix/{name}" in names


def test_what_the_index_page_shows(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_string(archive.read(name).decode())
    page = str(metadata.get_payload())
    assert "# swift_lora_fix" in page and "--external_plugins" in page
    assert not re.findall(r"\]\((?!https?:|#)[^)]+\)", page), "nothing relative: there are no files beside the page"
    assert metadata["Version"] == swift_lora_fix.__version__ and metadata.get_all("Project-URL")
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_links_of_a_published_readme_are_absolute() -> None:
    module = setup_py()
    text = "![a chart](docs/a.png) and [a page](docs/b.md#x), [away](https://x.org), [here](#part)"
    there = "https://github.com/someone/swift_lora_fix"
    assert module.for_the_index(text, there) == (
        f"![a chart]({there}/raw/main/docs/a.png) and [a page]({there}/blob/main/docs/b.md#x), "
        "[away](https://x.org), [here](#part)"
    )
    assert module.for_the_index(text, "") == (
        "*a chart* (`docs/a.png` in the source) and a page, [away](https://x.org), [here](#part)"
    )
    assert module.addresses(there)["Issues"] == f"{there}/issues" and "Source" not in module.addresses("")


def test_installed_alone_it_says_what_is_missing(installed: Path, tmp_path: Path) -> None:
    code = "import swift_lora_fix as s; print(s.__version__, s.__file__, s.status().ms_swift)"
    said = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert said[0] == swift_lora_fix.__version__ and str(ROOT) not in said[1] and said[2] == "None"
    script = installed / "swift-lora-fix"
    assert run(script, "--version", cwd=tmp_path) == f"swift-lora-fix {swift_lora_fix.__version__}\n"
    assert run(installed / "python", "-m", "swift_lora_fix", "--version", cwd=tmp_path).startswith("swift-lora-fix ")
    report = json.loads(run(script, "doctor", "--json", cwd=tmp_path, expect=2))
    missing = ["ms-swift", "vllm", "torch", "peft", "transformers", "trl"]
    told = [f"{name} is not installed in this environment: pip install {name}" for name in missing]
    assert report["problems"] == told
    assert "pip install ms-swift" in run(script, "doctor", cwd=tmp_path, expect=2)
    (tmp_path / "adapter").mkdir()
    assert "numpy and torch are not" in run(script, "fork", tmp_path / "adapter", tmp_path / "new", expect=2)
    (tmp_path / "adapter" / "config.json").write_text("{}")
    verify = ("verify", "--model", tmp_path / "adapter", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "pip install ms-swift" in run(script, *verify, expect=2)
    code = "import swift_lora_fix; swift_lora_fix.apply()"
    done = hangs.run([str(installed / "python"), "-c", code], env=CLEAN, cwd=tmp_path)
    assert "MissingPackageError: ms-swift is not installed in this environment: pip install ms-swift" in done.stderr


def test_a_consumers_mypy_sees_the_types(installed: Path, tmp_path: Path) -> None:
    consumer = tmp_path / "consumer.py"
    consumer.write_text(
        "import swift_lora_fix\nfrom swift_lora_fix import errors\n"
        "reveal_type(swift_lora_fix.status().applied)\nreveal_type(errors.RolloutServerError().status)\n"
        "swift_lora_fix.apply(mode=1)\n"
    )
    checker = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--python-executable"]
    said = run(*checker, installed / "python", consumer, cwd=tmp_path, expect=1)
    assert 'consumer.py:3: note: Revealed type is "bool"' in said and "consumer.py:4: note: " in said, said
    assert 'consumer.py:5: error: Argument "mode" to "apply"' in said and "Found 1 error in 1 file" in said, said

"""What README and docs say is what the code does: tables, links, anchors, commands; and both languages say the same."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from swift_lora_fix import cli
from swift_lora_fix.common.settings import Settings
from swift_lora_fix.install import releases
from swift_lora_fix.tools.doctor.variables import known_settings
from swift_lora_fix.tools.doctor.view import MORE
from tests.support import doc_tables

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [str(page.relative_to(ROOT)) for page in doc_tables.pages()]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CHINESE = sorted(page.name for page in (ROOT / "docs/zh").glob("*.md"))
TWINS = [("README.md", "README_zh.md"), *((f"docs/{name}", f"docs/zh/{name}") for name in CHINESE)]
ENGLISH_ONLY = {"how-it-works.md", "contributing.md", "servers.md"}  # for who changes the code


def prose(text: str) -> str:
    return FENCE.sub("", text)


def blocks(text: str) -> list[tuple[str, str]]:
    """Fenced code: language and content, without comments."""
    return [(kind, re.sub(r" {2,}# .*", "", code)) for kind, code in FENCE.findall(text)]


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of blocks without a language, as words. A log, which begins with "[", or a drawing is none."""
    for kind, code in blocks(text):
        if kind or code.startswith((" ", "[")):
            continue
        for line in filter(None, code.replace("\\\n", " ").splitlines()):
            yield shlex.split(line.replace("[", "").replace("]", ""), comments=True)


def slug(heading: str) -> str:
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def anchors(text: str) -> list[str]:
    """In order. A Chinese heading has the English one's anchor in the line before it."""
    found = []
    for before, heading in re.findall(r"(?:^<a id=\"([\w-]+)\"></a>\n\n?)?^#{2,3} (.+)$", prose(text), re.MULTILINE):
        found.append(before or slug(heading))
    return found


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells, without heads."""
    found = re.findall(r"(?:^\|.*\|\n)+", prose(text) + "\n", re.MULTILINE)
    return [
        [re.split(r"(?<!\\) *\| *", row.strip().strip("|").strip()) for row in table.strip().splitlines()[2:]]
        for table in found
    ]


def verdicts(found: list[list[list[str]]]) -> list[list[list[str]]]:
    """The cells of each row that are nothing but a yes or a no, in English."""
    said = {"yes": "yes", "是": "yes", "no": "no", "否": "no"}
    return [[[said[cell] for cell in row if cell in said] for row in table] for table in found]


def names(found: list[list[list[str]]]) -> list[list[list[str]]]:
    """Code and numbers of each row's first cell."""
    return [[sorted(re.findall(r"`[^`]+`|\d[\d.]*", row[0])) for row in table] for table in found]


# ---- each page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_the_codes(page: str) -> None:
    text = (ROOT / page).read_text()
    assert text == doc_tables.rewritten(text), "run scripts/tables"


def test_what_a_row_is_missing_is_noticed() -> None:
    table = "<!-- table: swift_lora_fix.install.releases.markdown_table() -->\n| old |\n<!-- end of table -->"
    assert "| 4.0.2 to 4.1.1 |" in doc_tables.rewritten(table)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose((ROOT / page).read_text())):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES)
def test_scripts_and_settings_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for script in set(re.findall(r"(?<![\w/])scripts/\w+", text)):
        assert (ROOT / script).is_file(), script
    for variable in set(re.findall(r"\bSWIFT_LORA_FIX\w*", text)):
        assert variable in known_settings(), variable
    for file in set(re.findall(r"`((?:bench|tests|swift_lora_fix|requirements)/[\w./]+)`", text)):
        assert (ROOT / file).exists(), file


def our_flags() -> dict[str, set[str]]:
    flags = {}
    for verb, module in cli.VERBS.items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        flags[verb] = {flag for action in parser._actions for flag in action.option_strings}
    return flags


def flags_of_swift() -> set[str]:
    """Every field of a class of arguments in the installed ms-swift, transformers and TRL, none of them imported."""
    import importlib.util

    found = set()
    for package, patterns in (
        ("swift", ("**/argument*/**/*.py", "**/*args*.py", "**/*argument*.py")),
        ("transformers", ("training_args.py",)),
        ("trl", ("trainer/grpo_config.py",)),
    ):
        spec = importlib.util.find_spec(package)
        assert spec and spec.submodule_search_locations
        for pattern in patterns:
            for file in Path(spec.submodule_search_locations[0]).glob(pattern):
                for node in ast.walk(ast.parse(file.read_text())):
                    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                        found.add(f"--{node.target.id}")
    return found


def test_every_command_can_be_given() -> None:
    ours, swifts, seen = our_flags(), flags_of_swift(), 0
    for page in PAGES:
        for words in commands((ROOT / page).read_text()):
            words = [word for word in words if not re.fullmatch(r"\w+=.*", word)]
            flags = {word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)}
            if words[0] == "swift-lora-fix":
                own, _, rest = " ".join(words).partition(" -- ")
                assert set(re.findall(r" (--[\w-]+)", own)) <= ours[words[1]], words
                assert set(re.findall(r"(--[\w-]+)", rest)) <= swifts, words
            elif words[0] == "swift":
                assert words[1] in ("rlhf", "rollout") and flags <= swifts, (words, flags - swifts)
            elif words[0] == "vllm":
                assert words[1] == "serve", words
            else:
                assert words[0] in ("pip", "python3", ".venv-docs/bin/python") or (ROOT / words[0]).is_file(), words
            seen += 1
    assert seen > 40


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile_and_name_what_is_there(page: str) -> None:
    for kind, code in blocks((ROOT / page).read_text()):
        if kind != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("swift_lora_fix"):
                module = __import__(node.module, fromlist=["_"])
                assert all(hasattr(module, name.name) for name in node.names), code


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}" in navigation, "a page that nobody finds"


# ---- what is quoted ------------------------------------------------------------------------------------------------


def test_quoted_log_lines_are_the_codes() -> None:
    code = "".join(path.read_text() for path in (ROOT / "swift_lora_fix").rglob("*.py"))
    start = (ROOT / "docs/quickstart.md").read_text()
    for quoted in (
        "armed: the engine gets the unmerged base once and the adapter once, the trainer is only read.",
        "the adapter goes straight into vLLM's LoRA slots: ",
        "proved against vLLM's own loader.",
        "the trainer's tensors equal the file's",
        "lora_B is not zero",
        "engine and trainer agree at ",
    ):
        assert quoted in code and quoted in " ".join(README.split()) and quoted in " ".join(start.split()), quoted
    for quoted in ("chain of custody: ", "answers to "):
        assert quoted in code and quoted in start
    assert MORE in start and 'Use it: swift rlhf ... --external_plugins "$(swift-lora-fix plugin)"' in start


def test_the_readme_keeps_the_two_commands_and_fits_a_screen_or_two() -> None:
    given = {words[0] for words in commands(README)}
    assert {"scripts/demo", "scripts/test"} <= given and len(README.splitlines()) <= 130


def test_every_setting_is_in_the_table() -> None:
    for page in ("docs/settings.md", "docs/zh/settings.md"):
        rows = tables((ROOT / page).read_text())[0]
        assert [row[0].strip("`") for row in rows] == list(known_settings()), page
    assert len(known_settings()) == len(Settings.__dataclass_fields__)


def test_every_metric_is_in_the_table() -> None:
    from swift_lora_fix import metrics

    code = Path(metrics.__file__).read_text()
    value = r"(?:float\()?(?:session|write|verdict|seen|distance|1\.0|batch)"
    written = {*re.findall(rf'"(\w+)": {value}', code), *re.findall(r'(?:found|numbers)\["(\w+)"\]', code)}
    assert {"seconds", "mismatch_mean", "agrees", "batch_kl", "lost_share", "slope"} <= written
    for page in ("docs/proof.md", "docs/zh/proof.md"):
        told = (ROOT / page).read_text()
        assert not {name for name in written if f"`{name}`" not in told}, page


# ---- two languages -------------------------------------------------------------------------------------------------


def test_every_user_page_is_there_in_both_languages() -> None:
    english = {page.name for page in (ROOT / "docs").glob("*.md")} - ENGLISH_ONLY
    assert english == {page.name for page in (ROOT / "docs/zh").glob("*.md")}


@pytest.mark.parametrize("english, chinese", TWINS)
def test_both_languages_say_the_same(english: str, chinese: str) -> None:
    one, other = (ROOT / english).read_text(), (ROOT / chinese).read_text()
    assert blocks(one) == blocks(other), "commands and quoted output"
    assert anchors(one) == anchors(other)
    assert [[len(row) for row in table] for table in tables(one)] == [
        [len(row) for row in table] for table in tables(other)
    ]
    assert names(tables(one)) == names(tables(other)), "what a row is about: its code and numbers"
    assert verdicts(tables(one)) == verdicts(tables(other))
    numbers = [set(re.findall(r"\d+(?:\.\d+)?", prose(text))) for text in (one, other)]
    assert numbers[0] == numbers[1], numbers[0] ^ numbers[1]


def test_releases_are_spelt_in_the_table_as_in_the_code() -> None:
    assert f"{releases.OLDEST_SUPPORTED} to {releases.NEWEST_KNOWN}" in (ROOT / "docs/compatibility.md").read_text()

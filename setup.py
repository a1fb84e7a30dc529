"""What setup.cfg cannot say: the links of an index page, which has no files beside it.

REPOSITORY is the one place to fill in before the package is published.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = ""  # the public address without a slash at the end, as https://github.com/OWNER/swift_lora_fix
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")


def for_the_index(readme: str, repository: str) -> str:
    """README for an index page: relative links become absolute ones. Without an address only their words are left."""

    def replace(link: re.Match[str]) -> str:
        image, words, path = link.groups()
        if not repository:
            return f"*{words}* (`{path}` in the source)" if image else words
        return f"{image}[{words}]({repository}/{'raw' if image else 'blob'}/main/{path})"

    return RELATIVE.sub(replace, readme)


def addresses(repository: str) -> dict[str, str]:
    """Project URLs; those of the package itself only where it has an address."""
    upstream = {"Upstream issue": "https://github.com/modelscope/ms-swift/issues/8233"}
    pages = {"Source": "", "Documentation": "tree/main/docs", "Changelog": "blob/main/CHANGELOG.md", "Issues": "issues"}
    own = {name: f"{repository}/{page}".rstrip("/") for name, page in pages.items()} if repository else {}
    return {**own, **upstream}


if __name__ == "__main__":
    setup(
        long_description=for_the_index(Path(__file__).with_name("README.md").read_text(encoding="utf-8"), REPOSITORY),
        long_description_content_type="text/markdown",
        project_urls=addresses(REPOSITORY),
    )

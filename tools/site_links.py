"""A hook of mkdocs (mkdocs.yml): links from docs/ to files outside of it, which a site does not hold.

They lead into the repository where mkdocs.yml names one (`repo_url`), else only their text is left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def on_page_markdown(markdown: str, *, config: Mapping[str, Any], **_: Any) -> str:
    """Return a page's text without relative links out of docs/, which has no folders with pages."""
    repository = (config["repo_url"] or "").rstrip("/")
    link = rf"[\1]({repository}/blob/HEAD/\2)" if repository else r"\1"
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./([^\s()]+)\)", link, markdown)

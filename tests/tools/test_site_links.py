"""Links of the site to files that it does not hold."""

from __future__ import annotations

import pytest

from tools.site_links import on_page_markdown

TEXT = "A [b](../configs/x.yaml), [`c`](../README.md#d), [e](f.md#g), ![h](i.png), [j](https://k.org/../l)."


@pytest.mark.parametrize(
    ("repository", "first", "second"),
    [
        (None, "b", "`c`"),
        (
            "https://x.org/a/b/",
            "[b](https://x.org/a/b/blob/HEAD/configs/x.yaml)",
            "[`c`](https://x.org/a/b/blob/HEAD/README.md#d)",
        ),
    ],
)
def test_links_out_of_the_pages(repository: str | None, first: str, second: str) -> None:
    expected = TEXT.replace("[b](../configs/x.yaml)", first).replace("[`c`](../README.md#d)", second)
    assert on_page_markdown(TEXT, config={"repo_url": repository}, page=None, files=None) == expected

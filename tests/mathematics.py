"""Pages without MathJax, which takes long to load."""

from __future__ import annotations

from playwright.sync_api import Page


def leave_out_mathematics(page: Page) -> None:
    """Let a page that is opened from its file get an empty script instead of MathJax, as plain_site does."""
    page.route("**/tex-chtml.js*", lambda route: route.fulfill(body="", content_type="text/javascript"))

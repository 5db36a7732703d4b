"""Pages of our own in a real browser."""

import pytest


@pytest.fixture
def visit(browser, tmp_path):
    """visit(html, …) opens a page from a file; afterwards, no error was reported and nothing else was asked for."""
    contexts, problems = [], []

    def visit(html: str, width: int = 1440, height: int = 900, framed: bool = False, **settings):
        """framed: the lineage is in the page's only frame; otherwise it is the page itself."""
        file = tmp_path / f"page{len(contexts)}.html"
        file.write_text(html, encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if request.url != file.as_uri() else None)
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(file.as_uri())
        shown = page.query_selector("iframe").content_frame() if framed else page
        shown.wait_for_function("window.lineage && window.lineage.frames().count > 0")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []

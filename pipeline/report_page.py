"""The report as one HTML file that can be sent: made of its Markdown, with pictures and formulas inside."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import re
from collections.abc import Mapping
from pathlib import Path

from markdown_it import MarkdownIt

TEMPLATE = Path(__file__).parent / "pages" / "report.html"


def formula_svg(latex: str, size: float = 15.0) -> str:
    """A formula as SVG in the colour of the text around it; size: of its letters, points."""
    import matplotlib
    from matplotlib import mathtext
    from matplotlib.font_manager import FontProperties

    with matplotlib.rc_context({"mathtext.fontset": "cm", "svg.fonttype": "path", "svg.hashsalt": "autoprune"}):
        buffer = io.BytesIO()
        properties = FontProperties(size=size)
        depth = mathtext.math_to_image(f"${latex}$", buffer, prop=properties, format="svg", dpi=72)
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, flags=re.DOTALL)  # its background, which is white
    svg = svg.replace("#000000", "currentColor")
    style = f'style="vertical-align: {-depth:.1f}pt" role="img" aria-label="{html.escape(latex, quote=True)}"'
    return svg.replace("<svg ", f"<svg {style} ", 1)


def report_html(markdown: str, pictures: Mapping[str, bytes], title: str) -> str:
    """markdown: `report_markdown`. pictures: PNG by file name, as the Markdown names them. What a language model wrote
    is text in the Markdown and stays text here: HTML in it is not passed on."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(tokens, index, options, environment):
        token = tokens[index]
        name, words = token.attrs["src"], html.escape(token.content)
        if name not in pictures:
            return words
        data = base64.b64encode(pictures[name]).decode()
        return f'<img alt="{words}" title="{words}" src="data:image/png;base64,{data}">'

    def fence(tokens, index, options, environment):
        token = tokens[index]
        if token.info.strip() == "math":
            with contextlib.suppress(RecursionError, ValueError):  # too deep to be drawn: as it is written
                return f'<p class="formula">{formula_svg(token.content.strip())}</p>\n'
        return f"<pre><code>{html.escape(token.content)}</code></pre>\n"

    def formula(tokens, index, options, environment):
        return formula_svg(tokens[index].content, 11.0)

    reader.renderer.rules |= {"image": image, "fence": fence, "formula": formula}
    reader.core.ruler.push("formulas", _find_formulas)
    page = TEMPLATE.read_text().replace("{{title}}", html.escape(title))
    return page.replace("{{body}}", reader.render(markdown))


def _find_formulas(state) -> None:
    """Code between dollar signs, $`…`$, is a formula within a line. What a language model wrote has no code in it: its
    backquotes are escaped."""
    for block in state.tokens:
        children = block.children or []
        for before, code, after in zip(children, children[1:], children[2:], strict=False):
            if code.type == "code_inline" and before.content.endswith("$") and after.content.startswith("$"):
                code.type, before.content, after.content = "formula", before.content[:-1], after.content[1:]

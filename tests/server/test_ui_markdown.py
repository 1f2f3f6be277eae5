"""server/ui/markdown.js: what the page makes of Markdown, under node: cases, hostile texts, half-written ones."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

UI = Path(__file__).parents[2] / "sfumato" / "server" / "ui"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node; none is on the path")

SCRIPT = """
import { readFileSync } from "node:fs";
import { parse } from "%s/markdown.js";
const results = JSON.parse(readFileSync(0, "utf8")).map((text) => {
  const start = performance.now();
  const tree = parse(text);
  return [%s, performance.now() - start];
});
console.log(JSON.stringify(results));
"""


def run(texts: list[str], shown: str = "tree") -> list[Any]:
    """For each text its tree (or what `shown` makes of it), and the milliseconds that took."""
    # The script stands on the command line, as the texts come by standard input.
    command = [str(NODE), "--no-warnings", "--input-type=module", "--eval", SCRIPT % (UI.as_uri(), shown)]
    child = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    results: list[Any] = json.loads(child.stdout)
    return results


def as_html(node: Any) -> str:
    """A tree in CommonMark's own notation, without its line breaks; images, which are not fetched, are links."""
    if isinstance(node, str):
        return html.escape(node, quote=False)
    if isinstance(node[0], list):
        return "".join(map(as_html, node))
    tag, attributes, *children = node
    inside = "".join(map(as_html, children))
    if tag == "tight":
        return inside
    listed = "".join(f' {name}="{html.escape(str(value))}"' for name, value in attributes.items())
    return f"<{tag}{listed}>" if tag in ("br", "hr", "task") else f"<{tag}{listed}>{inside}</{tag}>"


CASES: dict[str, str] = {
    # Headings, rules, paragraphs.
    "# a": "<h1>a</h1>",
    "###### a ##": "<h6>a</h6>",
    "####### a": "<p>####### a</p>",
    "#a": "<p>#a</p>",
    "## a ##b": "<h2>a ##b</h2>",
    "a\n===": "<h1>a</h1>",
    "a\nb\n---": "<h2>a\nb</h2>",
    "a\n# b": "<p>a</p><h1>b</h1>",
    "a\n\nb": "<p>a</p><p>b</p>",
    "***\n- - -\n___": "<hr><hr><hr>",
    "a  \nb\\\nc\nd": "<p>a<br>b<br>c\nd</p>",
    "    a\n\n      b": "<pre>a\n\n  b</pre>",
    "a\n    b": "<p>a\nb</p>",
    "\tcode": "<pre>code</pre>",
    # Lists.
    "- a\n- b": "<ul><li>a</li><li>b</li></ul>",
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "- a\n  - b\n    1. c": "<ul><li>a<ul><li>b<ol><li>c</li></ol></li></ul></li></ul>",
    "3) a\n4) b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "* a\n+ b": "<ul><li>a</li></ul><ul><li>b</li></ul>",
    "a\n- b": "<p>a</p><ul><li>b</li></ul>",
    "a\n2. b": "<p>a\n2. b</p>",
    "-\n- a": "<ul><li></li><li>a</li></ul>",
    "- a\nb": "<ul><li>a\nb</li></ul>",
    "- a\n\n  b": "<ul><li><p>a</p><p>b</p></li></ul>",
    "1. a\n\n   ```\n   x\n   ```\n2. b": "<ol><li><p>a</p><pre>x</pre></li><li><p>b</p></li></ol>",
    "- [ ] a\n- [x] b": (
        '<ul><li class="task"><task checked="False">a</li><li class="task"><task checked="True">b</li></ul>'
    ),
    "1.a": "<p>1.a</p>",
    # Quotes.
    "> a\n> b": "<blockquote><p>a\nb</p></blockquote>",
    "> a\nb": "<blockquote><p>a\nb</p></blockquote>",
    "> > a\n> b": "<blockquote><blockquote><p>a\nb</p></blockquote></blockquote>",
    "> - a\n\nb": "<blockquote><ul><li>a</li></ul></blockquote><p>b</p>",
    "> ```\n> x\n> ```": "<blockquote><pre>x</pre></blockquote>",
    # Code.
    "```py\nx=1\n\n*y*\n```\nz": '<pre data-language="py">x=1\n\n*y*</pre><p>z</p>',
    "~~~\na\n```\n~~~": "<pre>a\n```</pre>",
    "````\n```\n````": "<pre>```</pre>",
    "`a` ``b`c`` ` d `": "<p><code>a</code> <code>b`c</code> <code>d</code></p>",
    "*a`*`": "<p>*a<code>*</code></p>",
    "`a": "<p>`a</p>",
    # Emphasis.
    "*a* _b_ **c** __d__ ***e***": (
        "<p><em>a</em> <em>b</em> <strong>c</strong> <strong>d</strong> <em><strong>e</strong></em></p>"
    ),
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "snake_case_name a*b*c": "<p>snake_case_name a<em>b</em>c</p>",
    "* a": "<ul><li>a</li></ul>",
    "a * b * c 5*6": "<p>a * b * c 5*6</p>",
    "**a": "<p>**a</p>",
    "**a*": "<p>*<em>a</em></p>",
    "***a** b*": "<p><em><strong>a</strong> b</em></p>",
    "**foo*bar**": "<p><strong>foo*bar</strong></p>",
    "*foo**bar*": "<p><em>foo**bar</em></p>",
    "*a _b* c_": "<p><em>a _b</em> c_</p>",
    "**“a”**b": "<p>**“a”**b</p>",
    "~~a~~ ~b~ ~5": "<p><del>a</del> ~b~ ~5</p>",
    "\\*a\\* \\# \\q": "<p>*a* # \\q</p>",
    # Links.
    '[a](http://x.y "t")': '<p><a href="http://x.y" title="t">a</a></p>',
    "[a *b*](<http://x/(y>)": '<p><a href="http://x/(y">a <em>b</em></a></p>',
    "[a](http://x/y_(z))": '<p><a href="http://x/y_(z)">a</a></p>',
    "*[a*](http://x)": '<p>*<a href="http://x">a*</a></p>',
    "[a [b](http://x)](/y)": '<p>[a <a href="http://x">b</a>](/y)</p>',
    "[http://x](http://y) (http://z)a": '<p><a href="http://y">http://x</a> (<a href="http://z">http://z</a>)a</p>',
    "[a][b] [b]\n\n[B]: http://x": '<p><a href="http://x">a</a> <a href="http://x">b</a></p>',
    "[a] (http://x": '<p>[a] (<a href="http://x">http://x</a></p>',
    "See https://x.y/z_(q), or **http://x**.": (
        '<p>See <a href="https://x.y/z_(q)">https://x.y/z_(q)</a>, '
        'or <strong><a href="http://x">http://x</a></strong>.</p>'
    ),
    "<http://x> <me@x.org>": '<p><a href="http://x">http://x</a> <a href="mailto:me@x.org">me@x.org</a></p>',
    "![a](http://x/p.png)": '<p><a href="http://x/p.png" class="picture">a</a></p>',
    "[![a](http://x/p.png)](http://y)": '<p><a href="http://y"><span>a</span></a></p>',
    # Addresses that a click must not open are text.
    "[a](javascript:alert(1))": "<p><span>a</span></p>",
    "[a](JaVa\u0001Script:alert(1)) [b](&#106;avascript:x)": "<p><span>a</span> <span>b</span></p>".replace(
        "<span>a</span>", "[a](JaVa\u0001Script:alert(1))"
    ),
    "[a](data:text/html,x) [b](//x.y) [c](file:///etc) [d](/v1/models)": (
        "<p><span>a</span> <span>b</span> <span>c</span> <span>d</span></p>"
    ),
    "<javascript:x>": "<p>&lt;javascript:x&gt;</p>",
    # HTML is text; entities are signs.
    '<b onclick="x">y</b>': '<p>&lt;b onclick="x"&gt;y&lt;/b&gt;</p>',
    "<script>\n*a*": "<p>&lt;script&gt;\n<em>a</em></p>",
    "&amp; &lt; &#65; &#x41; &foo; &#0;": "<p>&amp; &lt; A A &amp;foo; \ufffd</p>",
    # Tables.
    "|a|b|\n|:-|-:|\n|1|*2*|\nc": (
        '<table><thead><tr><th class="left">a</th><th class="right">b</th></tr></thead>'
        '<tbody><tr><td class="left">1</td><td class="right"><em>2</em></td></tr>'
        '<tr><td class="left">c</td></tr></tbody></table>'
    ),
    "a | b\n--|--": "<table><thead><tr><th>a</th><th>b</th></tr></thead></table>",
    "text\n| a |\n|---|\n| x \\| y |": (
        "<p>text</p><table><thead><tr><th>a</th></tr></thead><tbody><tr><td>x | y</td></tr></tbody></table>"
    ),
    "|a|b|\n|--|": "<p>|a|b|\n|--|</p>",
    "a | b": "<p>a | b</p>",
    # Mathematics is not emphasis, and money no mathematics.
    "$a_1 * b_2$ *c*": "<p><math>a_1 * b_2</math> <em>c</em></p>",
    "\\(a*b*c\\)": "<p><math>a*b*c</math></p>",
    "It costs $5 or $6.": "<p>It costs $5 or $6.</p>",
    "$5-$6 `$` $a `b$`": "<p>$5-$6 <code>$</code> $a <code>b$</code></p>",
    "$$\nx_1\n= y\n$$\nz": "<mathblock>x_1\n= y</mathblock><p>z</p>",
    "\\[ a \\]": "<mathblock>a</mathblock>",
    # What is still being written.
    "```py\nx = 1": '<pre data-language="py">x = 1</pre>',
    "$$\nx^2 + ": "<mathblock>x^2 +</mathblock>",
    "| a | b |\n|--": "<p>| a | b |\n|--</p>",
    "| a |\n|---|\n| x": "<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>x</td></tr></tbody></table>",
    "[a](http://x": '<p>[a](<a href="http://x">http://x</a></p>',
    "a\n-": "<p>a\n-</p>",
}


@cache
def trees() -> dict[str, str]:
    return {text: as_html([*tree, ""]) for text, (tree, _) in zip(CASES, run(list(CASES)), strict=True)}


@pytest.mark.parametrize("text", list(CASES))
def test_a_text_becomes_its_elements(text: str) -> None:
    assert trees()[text] == CASES[text]


LONG = 100_000
UNITS = """* **a *a_b [ [a](b [a]( [](b) `_` `a``b > - 1._ $ $a_ $a` \\( \\[ $$ | |- a|b # #x# ~~ ~~a_
<a &# https:// http://a)
![ *a* **a* $` [[ ]] [a][b] \\ 😀* *( x** > >_ *_ - _a_ [a](b_"c_ [a](b_(c""".split()
LINES = [
    "- a",
    "* a",
    "> a",
    "a",
    "```",
    "===",
    "$$a",
    "\\[a",
    "|a|",
    "|-|",
    "- a\n\n",
    "[a]: b\n\n[a]",
    "    - a",
    "- a\n  > b",
]
HOSTILE = [
    *((unit.replace("_", " ") * LONG)[:LONG] for unit in UNITS),
    *(f"{line}\n" * (LONG // (len(line) + 1)) for line in LINES),
    "[" * (LONG // 2) + "]" * (LONG // 2),
    "*" * (LONG // 2) + "a" + "*" * (LONG // 2),
    "*a _b " * (LONG // 12) + "_ *" * (LONG // 12),
    "[a" * (LONG // 5) + "](b)" * (LONG // 5),
    "[x]: y\n\n" + "[a" * (LONG // 5) + "]" * (LONG // 5),
    "- " * 30 + "a\n" * 30_000,
    "> " * 25 + "a\n" * 30_000,
    " ".join("`" * length for length in range(1, 440)),
    "|" * 1000 + "\n" + "|-" * 1000 + "|\n" + "|a\n" * 30_000,
    "-" + " " * LONG + "x",
]


def test_a_hostile_text_takes_no_longer_than_its_length_allows() -> None:
    """What is quadratic takes minutes here; the bound leaves room for a busy machine."""
    depth = "(function deep(node) {"
    depth += " return Array.isArray(node) ? 1 + Math.max(0, ...node.slice(0, 50).map(deep)) : 0; })(tree)"
    for text, (nested, milliseconds) in zip(HOSTILE, run(HOSTILE, depth), strict=True):
        assert milliseconds < 8000, (text[:30], milliseconds)
        assert nested < 120, text[:30]  # an element in an element a thousand times is what a browser cannot draw


def test_every_beginning_of_an_answer_can_be_shown() -> None:
    """While it streams, a text ends anywhere: nothing is thrown, and what is not markup stays."""
    whole = "\n\n".join(CASES)
    results = run([whole[:end] for end in range(len(whole))], "JSON.stringify(tree).length")
    assert len(results) == len(whole) and results[-1][0] > len(whole)

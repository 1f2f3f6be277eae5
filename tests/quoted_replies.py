"""More raw calls and what each means: strings that hold quotes, as code does, and other models' ways to name a tool.

The notation is that of `raw_replies`: a `§` stands for `<|"|>`, the tools are its tools.
"""

from __future__ import annotations

from typing import Any

CALLS: dict[str, list[tuple[str, Any]]] = {
    "quotes within strings": [
        (
            'call:f{zip:"def g():\n    print("hi, you")\n    return {"a": 1}\n",linked:"g.py"}',
            {"zip": 'def g():\n    print("hi, you")\n    return {"a": 1}\n', "linked": "g.py"},
        ),
        ("call:f{zip:§SELECT a, b FROM t WHERE c = §x§ AND d=1§}", {"zip": 'SELECT a, b FROM t WHERE c = "x" AND d=1'}),
        ('call:f{"zip": "{"a": {"b": "c"}}", "linked": "x"}', {"zip": '{"a": {"b": "c"}}', "linked": "x"}),
        (
            'call:f{zip:"<p lang="en" style="a: b; c: d">x</p>", linked:"x"}',
            {"zip": '<p lang="en" style="a: b; c: d">x</p>', "linked": "x"},
        ),
        ("call:f{zip:'WHERE a = ''x''',linked:'q.sql'}", {"zip": "WHERE a = ''x''", "linked": "q.sql"}),
        ("call:f{zip:§x = §a§ + §b§; y§,count:5}", {"zip": 'x = "a" + "b"; y', "count": 5}),
        ("call:f{zip:§a§ and §b§ or {c: §d§}§,linked:§z§}", {"zip": 'a" and "b" or {c: "d"}', "linked": "z"}),
        (
            'call:f{zip:"print("hi")\\nprint("a, b")\\n", count: 5}',
            {"zip": 'print("hi")\nprint("a, b")\n', "count": 5},
        ),
        ('call:f(zip="g("a, b")", count=3)', {"zip": 'g("a, b")', "count": 3}),
        (
            'call:f{zip:"if x == "a":\n  y("b, c\\n", {"d": 1})",count:3}call:f{zip:"x"}',
            [("f", {"zip": 'if x == "a":\n  y("b, c\\n", {"d": 1})', "count": 3}), ("f", {"zip": "x"})],
        ),
        ('call:f{"a":"x\\"}', {"a": "x\\"}),
    ],
    "threefold quotes": [
        ('call:f{a:"""x = "y"\n""",b:1}', {"a": 'x = "y"\n', "b": 1}),
        ("call:f(a='''it's''', b=1)", {"a": "it's", "b": 1}),
        ('call:f{a:"""""",b:1}', {"a": "", "b": 1}),
        ('call:f{a:"""a\\"""",b:1}', {"a": 'a"', "b": 1}),
        ('call:f{a:"",b:"x"}', {"a": "", "b": "x"}),
    ],
    "names with the space they are from": [
        ("call:default_api.f{zip:1}", {"zip": "1"}),
        ("call:default_api:f{zip:1}", {"zip": "1"}),
        ("default_api.f(zip=1 count=2)", {"zip": "1", "count": 2}),
        ('functions.f{"zip": 1}', {"zip": "1"}),
        ("call:default_api.g{a:1}", [("default_api.g", {"a": 1})]),
        ("<b>{a:1}", None),
        ('<tool_call>{"name": "f", "arguments": {"zip": 1}}</tool_call>', {"zip": "1"}),
        ('[TOOL_CALLS][{"name": "f", "arguments": {"zip": 1}}]', {"zip": "1"}),
    ],
    "arguments in a record of their own": [
        ("call:f{arguments:{zip:1}}", {"zip": "1"}),
        ('call:f{"parameters":{"zip":1}}', {"zip": "1"}),
        ("call:g{arguments:{zip:1}}", [("g", {"arguments": {"zip": 1}})]),
        ("call:f{arguments:5}", {"arguments": 5}),
    ],
}

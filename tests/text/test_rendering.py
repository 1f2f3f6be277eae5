"""text/rendering.py: jinja set up as in transformers, and hostile templates stopped, through `ChatTemplate`."""

from __future__ import annotations

from typing import Any

import pytest
from chats import TEMPLATE, TOKENIZER, model, user

from sfumato.errors import CheckpointError, InputError
from sfumato.system import confined
from sfumato.text.template import ChatTemplate

PLAIN_TEMPLATE = """\
{# blocks on lines of their own, as many templates write them #}
{% for message in messages %}
    {% generation %}
    {{ message | tojson }} {{ message.content | tojson(indent=1) }} {{ strftime_now('%Y') | length }}
    {% endgeneration %}
    {% for letter in message.content %}
        {% if loop.index > 2 %}
            {% break %}
        {% endif %}
{{ loop.index }}{{ letter }}{{ "," if not loop.last }}
    {% endfor %}
{% endfor %}
{{ undefined_name }}{{ bos_token }}
"""


def test_jinja_is_set_up_as_in_transformers(oracle: Any) -> None:
    messages = [user("é<|&"), model("")]
    theirs = oracle.apply_chat_template(messages, chat_template=PLAIN_TEMPLATE, tokenize=False)
    assert ChatTemplate(PLAIN_TEMPLATE, TOKENIZER.special).render(messages) == theirs
    assert "<bos>" in theirs and '"é<|&"' in theirs


# --- hostile templates ---

SLOW = "takes longer than the 1 seconds allowed; make it simpler"
LARGE = "takes more than the 512 MiB of memory allowed; make it smaller"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", SLOW),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "characters of prompt"),
        ("{{ 'x' * 10**12 }}", LARGE),
        ("{% set x = [0] * 10**10 %}", LARGE),
        ("{{ 10 ** 100000000 }}", SLOW),
        ("{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(30) }}", "nest too deeply"),
        ("{% macro f(n) %}{% if n %}{% set a = f(n-1) ~ f(n-1) %}{% endif %}{% endmacro %}{{ f(40) }}", SLOW),
        ("{% for i in range(0, 9999) recursive %}{{ loop(range(0, 9999)) if loop.depth < 5 }}{% endfor %}", SLOW),
        # Filters, methods and operators, which have no loop of their own.
        ("{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", LARGE),
        ("{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", LARGE),
        ("{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", SLOW),
        (
            "{% set ns = namespace(x=[]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
            f"{SLOW}|{LARGE}",
        ),
        (
            "{% set ns = namespace(x=[]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
            "{{ ns.x == ns.x[:] + [] }}{{ ns.x|tojson }}",
            f"{SLOW}|{LARGE}",
        ),
        ("{{ 'x'|center(10**11) }}", LARGE),
        ("{{ '%*d' % (10**11, 1) }}", LARGE),
        ("{{ '%0100000000000d'|format(1) }}", LARGE),
        ("{{ '{:{}}'.format(1, 10**11) }}", LARGE),
        ("{{ 'x'.zfill(10**11) }}", LARGE),
        ("{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}", LARGE),
        ("{{ ('x' * 10**6).split('x')|join('y' * 10**6) }}", LARGE),
        ("{{ [1]|batch(10**11, 0)|list }}", LARGE),
        ("{{ [[1]]|tojson(indent=10**11) }}", LARGE),
        ("{{ ('a ' * 10**7)|wordwrap(1)|indent(99, true) }}", f"{LARGE}|{SLOW}|characters of prompt"),
        ("{{ (range(99999)|list * 200)|map('string')|sort|unique|list|length }}", f"{SLOW}|{LARGE}"),
        (
            "{% set s = 'a' * 5 * 10**6 %}{% for i in range(99999) %}{% if s ~ 'b' in s ~ 'c' %}{% endif %}"
            "{% endfor %}",
            SLOW,
        ),
        ("{{ messages.__class__.__mro__ }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__ }}{{ cycler.__init__.__globals__.os.system('true') }}", "refuses"),
        ("{% include '/etc/passwd' %}", "fails on these messages: TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
    ],
)
def test_hostile_template_is_stopped(monkeypatch: pytest.MonkeyPatch, source: str, why: str) -> None:
    """By the clock and in bytes, whatever it does it with; and the next one is rendered."""
    monkeypatch.setattr(confined, "SECONDS", 1)
    with pytest.raises(InputError, match=why) as caught:  # some are computed as they are compiled
        ChatTemplate(source).render([user("x")])
    assert "\n" not in str(caught.value)
    assert TEMPLATE.render([user("x")])


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("x" * (256 * 1024 + 1), "262145 characters, more than the 262144 allowed"),
        ("{% for %}", "no jinja: .* line 1"),
        ("\n{% if x %}", "line 2"),
        ("{{ x | no_such_filter }}", "no_such_filter"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "cannot be compiled"),
    ],
)
def test_template_that_cannot_be_used(source: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        ChatTemplate(source)

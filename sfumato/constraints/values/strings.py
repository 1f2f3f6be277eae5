"""The strings that facets allow, as an expression: length, patterns and formats together."""

from __future__ import annotations

import re

from sfumato.constraints.expressions import ANY, ENDLESS, NEVER, Expression, both, literal, other_than, repeat
from sfumato.constraints.patterns import NotSupported, parse
from sfumato.constraints.shortest import shortest
from sfumato.constraints.values.document import Place
from sfumato.constraints.values.facets import Facets
from sfumato.constraints.values.formats import HTTP_LENGTH, form_node, http_node
from sfumato.constraints.values.rules import RuleWriter

_MARKS = "@ . : - / T Z P D"
"""What texts of a format are made of, as hints for the search."""
_LONGEST = 1_000_000
"""A maxLength above it is none."""


def text_node(rules: RuleWriter, facets: Facets) -> Expression:
    """The strings that the facets allow."""
    high = ENDLESS if facets.longest is None or facets.longest > _LONGEST else facets.longest
    parts = [repeat(ANY, facets.shortest, high)]
    for pattern, is_there, place in facets.patterns:
        node = pattern_node(rules, pattern, place)
        parts.append(node if is_there else other_than(node))
    for form in facets.formats:
        node_of_form = form_node(form)
        if node_of_form is not None:
            parts.append(node_of_form)
            rules.add_hints([_MARKS])
            if form == "uri" and facets.longest == HTTP_LENGTH:
                parts.append(http_node())
    parts += [other_than(literal(value)) for value in facets.excluded if isinstance(value, str)]
    return both(parts)


def pattern_node(rules: RuleWriter, pattern: str, place: Place) -> Expression:
    """The texts in which a pattern is; an InputError at its place where it cannot be read."""
    rules.add_hints(re.findall(r"[^\W_]+|[^\w\s\\^$()\[\]{}|*+?]|_", pattern))
    try:
        return parse(pattern)
    except NotSupported as error:
        place.refuse(f"the pattern {pattern[:80]!r} has {error}, which is not supported; write it without")


def has_text(node: Expression, place: Place) -> bool:
    """Whether an expression has any text."""
    if node.is_plain:
        return node.least < NEVER
    try:
        return shortest(node) is not None
    except NotSupported as error:
        place.refuse(f"the patterns here make {error}; make them simpler")

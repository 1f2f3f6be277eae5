"""The values of `format` that are enforced: the texts of each, as an expression.

A format that is not here is an annotation, as JSON Schema has it. What is here may be narrower than its standard, so
that the checkers of several languages agree with it.
"""

from __future__ import annotations

from functools import cache

from sfumato.constraints.expressions import Expression
from sfumato.constraints.patterns import parse

_DATE = (
    r"(?:[1-9]\d{3}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    r"|(?:[1-9]\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_IPV4_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_IN_URI = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*"
_EMAIL = rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@{_LABEL}(?:\.{_LABEL})+"
_URI = rf"[a-z][a-z0-9+.-]*://{_LABEL}(?:\.{_LABEL})*(?::\d{{1,4}})?(?:/{_IN_URI})?(?:\?{_IN_URI})?(?:#{_IN_URI})?"
_IPV4 = rf"{_IPV4_BYTE}(?:\.{_IPV4_BYTE}){{3}}"
_HOSTNAME = rf"{_LABEL}(?:\.{_LABEL}){{0,3}}"
_HEX = "[0-9a-f]"
_GROUP = "[0-9a-f]{1,4}"
_IPV6 = "|".join(
    [
        f"(?:{_GROUP}:){{7}}{_GROUP}",
        f"::(?:{_GROUP}:){{0,6}}{_GROUP}",
        *(f"(?:{_GROUP}:){{{n}}}(?::{_GROUP}){{1,{7 - n}}}" for n in range(1, 7)),
        f"(?:{_GROUP}:){{1,7}}:",
        "::",
    ]
)
_DAYS = r"(?:\d{1,4}Y(?:\d{1,4}M(?:\d{1,4}D)?)?|\d{1,4}M(?:\d{1,4}D)?|\d{1,4}D)"
_HOURS = r"T(?:\d{1,4}H(?:\d{1,4}M(?:\d{1,4}S)?)?|\d{1,4}M(?:\d{1,4}S)?|\d{1,4}S)"
_POINTER = r"(?:/(?:[^~/]|~[01])*)*"
_ATOM = r"(?:[A-Za-z0-9_ /@:;,=-]|\.|\\[dwsDWS.]|\[(?:\^?(?:[a-z]-[a-z]|[A-Z]-[A-Z]|0-9|[._])){1,3}\])[*+?]?"
FORMAT_PATTERNS = {
    "date": _DATE,
    "date-time": f"{_DATE}T{_TIME}",
    "time": _TIME,
    "email": _EMAIL,
    "hostname": _HOSTNAME,
    "ipv4": _IPV4,
    "uri": _URI,
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "duration": rf"P(?:{_DAYS}(?:{_HOURS})?|{_HOURS}|\d{{1,4}}W)",
    "ipv6": _IPV6,
    "idn-email": _EMAIL,
    "idn-hostname": _HOSTNAME,
    "iri": _URI,
    "uri-reference": rf"{_URI}|/?[A-Za-z0-9._~-]+(?:/{_IN_URI})?(?:\?{_IN_URI})?(?:#{_IN_URI})?",
    "uri-template": rf"(?:{_URI}|/{_IN_URI})(?:\{{[a-z_]+\}}{_IN_URI})*",
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9]\d{{0,5}})(?:#|{_POINTER})",
    "regex": rf"\^?(?:{_ATOM})+\$?",
    "byte": r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?",
    "base64url": r"(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-][AQgw]==|[A-Za-z0-9_-]{2}[AEIMQUYcgkosw048]=)?",
    "base16": r"(?:[0-9A-F]{2})*",
    "ipvanyaddress": f"{_IPV4}|{_IPV6}",
    "ipv4network": r"(?:\d{1,2}|1\d\d)\.0\.0\.0/8",
    "ipv4interface": rf"{_IPV4}/(?:[12]?\d|3[0-2])",
    "ipv6network": rf"{_GROUP}::/(?:1[6-9]|[2-9]\d|1[01]\d|12[0-8])",
    "ipv6interface": rf"(?:{_IPV6})/(?:\d{{1,2}}|1[01]\d|12[0-8])",
    "ipvanynetwork": r"(?:\d{1,2}|1\d\d)\.0\.0\.0/8",
    "ipvanyinterface": rf"{_IPV4}/(?:[12]?\d|3[0-2])",
    "name-email": rf"(?:[A-Z][a-z]+ [A-Z][a-z]+ <{_EMAIL}>)|{_EMAIL}",
    "color": r"#[0-9a-f]{6}|black|white|red|green|blue|yellow|orange|purple|pink|brown|grey",
    "multi-host-uri": rf"[a-z]{{2,12}}://{_LABEL}(?::\d{{1,4}})?/[a-z0-9_]*",
    **{
        f"uuid{version}": rf"{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-[89ab]{_HEX}{{3}}-{_HEX}{{12}}"
        for version in range(1, 9)
    },
}
FORMAT_PATTERNS["iri-reference"] = FORMAT_PATTERNS["uri-reference"]
FORMAT_PATTERNS["base64"] = FORMAT_PATTERNS["byte"]
"""The values of `format` and `contentEncoding` that are enforced, each with the pattern of its whole text."""

WHOLE_FORMATS = {
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (0, 2**bits - 1) for bits in (8, 16, 32, 64)},
}
"""Formats of whole numbers, and the least and greatest number of each."""
HTTP_LENGTH = 2083
"""The maxLength by which pydantic's HttpUrl is known: its `uri` has the scheme http or https."""


@cache
def form_node(form: str) -> Expression | None:
    """The texts of a format; None where it is an annotation."""
    return parse(FORMAT_PATTERNS[form], is_whole=True) if form in FORMAT_PATTERNS else None


@cache
def http_node() -> Expression:
    """The texts that begin as a URL of the web does."""
    return parse(r"https?://[^\s]+", is_whole=True)

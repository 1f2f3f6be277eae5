"""Triage a mailbox: the same questions about every mail, and those that the model is unsure of left to a person.

    python examples/triage.py [MAILBOX] [-m MODEL | --api URL] [-o answers.jsonl] [--csv table.csv]

MAILBOX is an export in mbox form, as Thunderbird, Gmail's Takeout and mutt write it; without one it is the made-up
examples/mailbox.mbox. MODEL is a checkpoint folder, a hub id or "nano", the default. The released model,
google/diffusiongemma-26B-A4B-it, reads mails. The small models of this package do not: what they answer here means
nothing, and shows only the form.

Several mails are asked about at once, so that they share passes; each is encoded once for all its questions. With -o
every answer is kept as it comes, and the same command goes on where it was cut off. `--questions FILE` takes your own
questions, in System One's form: {"urgent": {"type": "noul", "instructions": "Does it need an answer today?"}, …}.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import hashlib
import json
import mailbox
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from email import message_from_bytes
from email.header import decode_header
from email.message import Message
from html import unescape
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import track
from rich.text import Text

from sfumato import LLM, Decide, Decision, Decisions, InputError, LanguageModel, Options, SfumatoError

EXAMPLE = Path(__file__).with_name("mailbox.mbox")
QUESTIONS: dict[str, Any] = {
    "team": {
        "type": "choice",
        "instructions": "Which team should deal with this mail?",
        "criteria": {
            "Billing": "Payments, refunds and invoices",
            "Orders": "Delivery, returns and what is missing or broken",
            "Technical": "How a lamp works, accounts and manuals",
            "Sales": "Questions before a purchase, and offers to us",
            "Nobody": "Advertising, thanks and automatic notices",
        },
    },
    "urgent": {"type": "noul", "instructions": "Does this mail need an answer today?"},
    "anger": {
        "type": "score",
        "instructions": "How angry is the writer?",
        "criteria": ["Friendly or calm", "Annoyed", "Angry", "Threatens to leave, or with a lawyer"],
    },
    "asks": {"type": "noul", "instructions": "Does the writer want something done, or an answer?"},
    "request": {
        "type": "span",
        "instructions": "Which sentence says what the writer wants?",
        "depends_on": {"asks": True},
    },
}
MOST_BYTES = 1 << 18
"""Of a mail, that are read; what lies behind is attachments, as a rule."""
LONGEST_HEADER = 1000
"""Characters of a subject or a sender that are read."""
NO_CHARSETS = {"idna", "punycode"}
"""Encodings of names, not of letters: decoding a long text from them takes forever."""
BLOCKS = {"br", "p", "div", "tr", "li", "table", "h1", "h2", "h3", "h4", "blockquote"}
"""Elements of HTML that begin a line."""
UNSEEN = re.compile("[\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
"""Characters that turn what stands around them about, or hide."""
BAR = 6
"""Characters of a bar at its full length."""


# ---- a mail as a text --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mail:
    """A mail, as a person and as the model reads it."""

    sender: str
    date: str
    subject: str
    text: str


def mails_of(path: Path, longest: int) -> Iterator[Mail]:
    """The mails of an export in mbox form, one after the other."""
    with closing(mailbox.mbox(path, create=False)) as box:
        for key in box.iterkeys():
            yield read_mail(box.get_file(key).read(MOST_BYTES), longest)


def read_mail(content: bytes, longest: int) -> Mail:
    """The mail of these bytes, whatever they are; its text has about so many characters at most."""
    try:
        message = message_from_bytes(content)
        sender, date, subject = (header(message, name) for name in ("From", "Date", "Subject"))
        body = body_of(message)
    except Exception as error:  # a mail may be anything, and the library's parser may raise anything
        sender = date = subject = ""
        body = f"{decoded(content[: 4 * longest], None)}\n\n[not a mail: {type(error).__name__}]"
    text = tidy(f"From: {sender}\nDate: {date}\nSubject: {subject}\n\n{body}")
    if len(text) > longest:
        text = f"{text[:longest]}\n[… and {len(text) - longest:,} characters more]"
    return Mail(sender, date, subject, text)


def header(message: Message, name: str) -> str:
    """A header in one line, decoded as far as that goes."""
    value = message.get(name, "")
    try:
        pieces = decode_header(value[:LONGEST_HEADER] if isinstance(value, str) else value)
    except Exception:  # an encoded word that is cut, and others
        pieces = [(str(value), None)]
    return " ".join(tidy("".join(decoded(piece, charset) for piece, charset in pieces)).split())[:LONGEST_HEADER]


def decoded(content: bytes | str, charset: str | None) -> str:
    """Bytes as text; in a charset that there is not, as UTF-8, with a sign for what is none."""
    if isinstance(content, str):
        return content
    try:
        return content.decode("utf-8" if not charset or charset.lower() in NO_CHARSETS else charset, "replace")
    except (LookupError, ValueError):
        return content.decode("utf-8", "replace")


def body_of(message: Message) -> str:
    """Its plain text, or where there is none that of its HTML, and the names of what is attached."""
    texts: dict[str, list[str]] = {"plain": [], "html": []}
    attached = []
    for part in message.walk():
        kind = part.get_content_subtype()
        if part.is_multipart():
            continue
        if part.get_content_maintype() == "text" and part.get_content_disposition() != "attachment":
            content = part.get_payload(decode=True)
            assert isinstance(content, bytes)
            texts["html" if kind == "html" else "plain"].append(decoded(content, part.get_content_charset()))
        else:
            attached.append(f"[attached: {part.get_filename() or 'a file'}, {part.get_content_type()}]")
    plain = "\n\n".join(texts["plain"])
    return "\n".join([plain if plain.strip() else "\n\n".join(map(text_of_html, texts["html"])), *attached])


def text_of_html(page: str) -> str:
    """What a person would read of it: in one pass, as `html.parser` takes hours over what a mail may hold."""
    first, *parts = page.split("<")
    words = [first]
    is_remark = is_code = False
    for part in parts:
        tag, end, text = part.partition(">")
        name = re.sub(r"[\s/].*", "", tag[:20], flags=re.DOTALL).lower()
        if is_remark or tag.startswith("!--"):
            _, end, text = part.partition("-->")
            is_remark, name = not end, ""
        elif is_code:
            is_code = not tag[:7].lower().startswith(("/script", "/style"))
        elif name in ("script", "style"):
            is_code = True
        elif not end or not re.match("[a-zA-Z/!?]", tag):
            text = f"<{part}"  # a sign, and no tag
        if not is_remark and not is_code:
            words += ["\n" if name in BLOCKS else "", re.sub(r"\s+", " ", text)]
    return unescape("".join(words))


def tidy(text: str) -> str:
    """Without control characters, which a terminal would obey, and without wide gaps."""
    text = UNSEEN.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()


# ---- questions and answers ---------------------------------------------------------------------------------------


@dataclass
class Triage:
    """A run over a mailbox: what is asked, of whom, and where the answers are kept."""

    llm: LanguageModel
    questions: dict[str, Any]
    reading: dict[str, Any]
    """The arguments of `Decide`."""
    file: TextIO | None = None
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Records by their keys."""

    def key(self, mail: Mail) -> str:
        """The same for the same mail, questions and model alone."""
        whole = json.dumps([mail.text, self.questions, self.reading, self.llm.name])
        return hashlib.sha256(whole.encode("utf-8", "replace")).hexdigest()[:16]

    async def record_of(self, mail: Mail) -> dict[str, Any]:
        """The answers about a mail; one that the model cannot read has an error in their place."""
        record: dict[str, Any] = {"from": mail.sender, "date": mail.date, "subject": mail.subject}
        query = Decide(mail.text, self.questions, **self.reading, options=Options(seed=0))
        try:
            decisions: Decisions = await self.llm.arun(query)
        except InputError as error:
            if error.option == "questions":
                raise  # it is not the mail's fault
            return {**record, "answers": {}, "error": str(error)}
        return {**record, "answers": {id: as_record(one) for id, one in decisions.items()}}

    async def work(self, mails: Iterator[Mail]) -> None:
        """Ask about one mail after the other, until there is none left. Several of these share the iterator."""
        for mail in mails:
            key = self.key(mail)
            if key not in self.answers:
                self.answers[key] = {}  # the same mail a second time is not asked about again
                self.answers[key] = {"key": key, **await self.record_of(mail)}
                if self.file is not None:
                    self.file.write(json.dumps(self.answers[key], ensure_ascii=False) + "\n")
                    self.file.flush()

    def run(self, mails: list[Mail], together: int) -> list[dict[str, Any]]:
        """The records of these mails, in their order; `together` are asked about at once."""

        async def all_of_them() -> None:
            shared = track(mails, "asking", console=Console(stderr=True), transient=True)
            source = iter(shared)
            await asyncio.gather(*(self.work(source) for _ in range(together)))

        asyncio.run(all_of_them())
        return [self.answers[self.key(mail)] for mail in mails]


def as_record(decision: Decision) -> dict[str, Any]:
    """A decision as plain data."""
    record = {"type": decision.kind, "choice": decision.choice, "confidence": decision.confidence}
    if decision.kind == "score":
        record["score"] = decision.score
    if decision.kind != "span":  # its passages are the mail itself
        record["probabilities"] = decision.probabilities
    return record


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """The records that an earlier run left; a line that was cut off is dropped from the file."""
    if not path.exists():
        return {}
    whole, newline, rest = path.read_text(encoding="utf-8").rpartition("\n")
    if rest:
        path.write_text(whole + newline, encoding="utf-8")
    try:
        records = [json.loads(line) for line in whole.split("\n") if line]
        return {record["key"]: record for record in records if record["answers"] or record["error"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds other things than this program's answers; name another file") from None


def doubts(record: dict[str, Any], threshold: float) -> list[str]:
    """Why a person should see this mail: the questions whose answers are less sure than that. Quotes do not count."""
    if "error" in record:
        return [record["error"]]
    answers = record["answers"].items()
    return [id for id, one in answers if one["type"] != "span" and one["confidence"] < threshold]


# ---- tables ------------------------------------------------------------------------------------------------------


def place(record: dict[str, Any], ids: list[str]) -> list[tuple[str, float]]:
    """Where a mail stands: question by question, a choice by its name, else the likelier or higher first."""
    keys = []
    for answer in map(record["answers"].get, ids):
        if answer is None or answer["type"] == "span":
            keys.append(("", 1.0))  # what was not asked comes last
        else:
            keys.append((answer["choice"], 0.0) if answer["type"] == "choice" else ("", -length(answer)))
    return keys


def length(answer: dict[str, Any]) -> float:
    """How long the bar of an answer is, from 0 to 1."""
    if answer["type"] == "noul":
        return float(answer["probabilities"]["true"])
    if answer["type"] == "score":
        return float(answer["score"] / max(1, len(answer["probabilities"]) - 1))
    return float(answer["probabilities"][answer["choice"]])


def cell(answer: dict[str, Any] | None) -> Text:
    """An answer as a bar with its value."""
    if answer is None:
        return Text("–", "dim")
    eighths = round(length(answer) * BAR * 8)
    bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    value = {"noul": f"{length(answer):4.0%}", "score": f"{answer.get('score', 0):.1f}"}
    text = Text(bar, "magenta").append("·" * (BAR - len(bar)), "dim")
    return text.append(f" {value.get(answer['type'], answer['choice'])}", "default")


def show(title: str, records: list[dict[str, Any]], threshold: float, console: Console) -> None:
    """A line for each mail, and one below it for what is quoted, or why it is for a person."""
    if not records:
        return
    columns: dict[str, int] = {}
    for record in records:
        for id, answer in record["answers"].items():
            if answer["type"] != "span":
                values = [len(name) for name in answer["probabilities"]] if answer["type"] == "choice" else [4]
                columns[id] = min(18, max(len(id), BAR + 1 + max(values)))
    first = max(16, console.width - sum(width + 2 for width in columns.values()))

    def line(*cells: Text) -> Text:
        for one, width in zip(cells, (first, *columns.values()), strict=True):
            one.truncate(width, overflow="ellipsis", pad=True)
        return Text("  ").join(cells)

    console.print(f"\n[bold]{title}[/] ({len(records)})")
    console.print(line(Text("mail", "dim"), *(Text(id, "dim") for id in columns)), no_wrap=True, crop=True)
    for record in records:
        answers = record["answers"]
        cells = (cell(answers.get(id)) for id in columns)
        console.print(line(Text(record["subject"] or "(no subject)"), *cells), no_wrap=True, crop=True)
        quotes = [f"“{' '.join(one['choice'].split())}”" for one in answers.values() if one["type"] == "span"]
        reasons = doubts(record, threshold)
        note = reasons if "error" in record else [*quotes, *([f"unsure: {', '.join(reasons)}"] if reasons else [])]
        console.print(Text(f"  {'  '.join(note) or record['from']}", "dim"), no_wrap=True, overflow="ellipsis")


def write_csv(path: Path, records: list[dict[str, Any]], ids: list[str], threshold: float) -> None:
    """The answers for a spreadsheet. Mails are anybody's: what it would take for a formula begins with a quote."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        columns = [name for id in ids for name in (id, f"{id} confidence")]
        writer.writerow(["from", "date", "subject", "for a person", *columns])
        for record in records:
            cells = [record["from"], record["date"], record["subject"], "; ".join(doubts(record, threshold))]
            for id in ids:
                answer = record["answers"].get(id)
                cells += [answer["choice"], f"{answer['confidence']:.3f}"] if answer else ["", ""]
            writer.writerow([f"'{one}" if one[:1] in "=+-@\t\r" and one else one for one in cells])


def arguments_of(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("mailbox", nargs="?", type=Path, default=EXAMPLE, help="an export in mbox form")
    parser.add_argument("-m", "--model", default="nano", help="a folder, a hub id, or nano")
    parser.add_argument("--api", metavar="URL", help="ask a server instead: Sfumato's, or any of System One")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="your own, a JSON object of ids and questions")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="keep the answers here, a line a mail (JSONL)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table for a spreadsheet")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N mails")
    parser.add_argument("--threshold", type=float, default=0.5, help="confidence under which a person looks (0.5)")
    parser.add_argument("--samples", type=int, default=1, help="draws of noise that are averaged (1)")
    parser.add_argument("--think", choices=("never", "auto", "always"), default="never", help="think where unsure")
    parser.add_argument(
        "--longest", type=int, default=2000, metavar="N", help="characters of a mail that are read (2000)"
    )
    parser.add_argument("--together", type=int, default=16, metavar="N", help="mails that are asked about at once (16)")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    chosen = arguments_of(words)
    console = Console(highlight=False)
    questions = json.loads(chosen.questions.read_text(encoding="utf-8")) if chosen.questions else QUESTIONS
    mails = list(islice(mails_of(chosen.mailbox, chosen.longest), chosen.limit))
    if not mails:
        raise ValueError(f"there is no mail in {chosen.mailbox}; give an export in mbox form")
    model: LanguageModel = LLM.connect(chosen.api) if chosen.api else LLM.load(chosen.model)
    with model as llm, ExitStack() as stack:
        triage = Triage(llm, questions, {"samples": chosen.samples, "think": chosen.think})
        if chosen.out:
            triage.answers = kept(chosen.out)
            triage.file = stack.enter_context(chosen.out.open("a", encoding="utf-8"))
        records = triage.run(mails, chosen.together)
    sure = [record for record in records if not doubts(record, chosen.threshold)]
    sure.sort(key=lambda record: place(record, list(questions)))
    for_person = [record for record in records if doubts(record, chosen.threshold)]
    for_person.sort(key=lambda record: min([one["confidence"] for one in record["answers"].values()], default=0))
    show("Sure", sure, chosen.threshold, console)
    show("For a person", for_person, chosen.threshold, console)
    if str(model.name).startswith("nano"):
        console.print("\nnano reads no mails: what it answers here means nothing, and only the form is shown.")
    if chosen.csv:
        write_csv(chosen.csv, [*sure, *for_person], list(questions), chosen.threshold)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (SfumatoError, OSError, ValueError, mailbox.Error) as problem:
        sys.exit(f"triage: {problem}")
    except KeyboardInterrupt:
        sys.exit("triage: stopped; what was answered is in the file of -o, and the same command goes on from there")

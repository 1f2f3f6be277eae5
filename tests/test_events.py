"""events.py: the arithmetic of the events and the results."""

from __future__ import annotations

from sfumato.events import Commit, Completion, Decision, Done, Draft, Edited, Filled, Usage


def test_tokens_per_pass() -> None:
    assert Usage(tokens=256, passes=16).tokens_per_pass == 16
    assert Usage(prompt_tokens=9).tokens_per_pass == 0


def test_a_completion_is_what_the_last_event_says() -> None:
    done = Done(3, "stop", [1, 2], Usage(tokens=2), 7, "ab", "END", [-0.5, -0.25], "hm", [{"name": "f"}])
    expected = Completion("ab", [1, 2], "stop", Usage(tokens=2), 7, [-0.5, -0.25], "END", "hm", [{"name": "f"}])
    assert Completion.of(done) == expected


def test_a_diff_is_unified_and_knows_line_feeds_alone() -> None:
    edited = Edited("one\r\ntwo", "one\ntwo\n", Usage(), 0)
    assert edited.diff("a.txt").splitlines(keepends=True) == [
        "--- a/a.txt\n",
        "+++ b/a.txt\n",
        "@@ -1,2 +1,2 @@\n",
        "-one\n",
        "-two\n",
        "+one\r\n",
        "+two\n",
        "\\ No newline at end of file\n",
    ]
    assert Edited("same", "same", Usage(), 0).diff() == ""


def test_events_and_results_say_what_they_are_in_one_short_line() -> None:
    usage = Usage(tokens=82, steps=5, seconds=0.123)
    long = "The sky is blue because " * 50 + "\n\x1b[2J"
    cases: list[tuple[object, str]] = [
        (Done(0, "stop", [], usage, 3, "Yes."), "<Done 'Yes.', stop, 82 tokens in 5 steps, 0.12 s, seed 3>"),
        (Completion("Hm", [], "length", usage, 3), "<Completion 'Hm', length, 82 tokens in 5 steps, 0.12 s, seed 3>"),
        (
            Draft(0, 1, 4, [], [0.5, 1.5], [True, False], "ab"),
            "<Draft 'ab', canvas 1, step 4, 1/2 accepted, entropy 1.000>",
        ),
        (Draft(0, 0, 1, [], [], []), "<Draft '', canvas 0, step 1, 0/0 accepted, entropy 0.000>"),
        (Commit(0, 1, 4, [5, 6], text="ab", thought="hm"), "<Commit 'ab', canvas 1, 4 steps, 2 tokens, thought>"),
        (Filled("a b", {"x": "b"}, usage, 3), "<Filled 'a b', 1 slot, 82 tokens in 5 steps, 0.12 s, seed 3>"),
        (Edited("b", "a", usage, 3), "<Edited 'b', changed, 82 tokens in 5 steps, 0.12 s, seed 3>"),
        (Decision("yes", {"yes": 0.75, "no": 0.25}), "<Decision 'yes', 75.0% of 2 options>"),
    ]
    for record, words in cases:
        assert repr(record) == words
    calls = [{"name": "f" * 90, "arguments": {}}] * 9
    for record in (
        Completion(long, [], "stop", usage, 2**62, tool_calls=calls),
        Filled(long, {"x": long}, usage, 2**62),
        Edited(long, "", usage, 2**62),
        Draft(0, 10, 4096, [], [9.0] * 256, [False] * 256, long),
        Commit(0, 10, 4096, [1] * 256, text=long, thought=long),
        Decision(long, {long: 1.0}),
    ):
        assert len(repr(record)) < 190 and "\n" not in repr(record) and "\x1b" not in repr(record)


def test_a_result_as_text_is_its_text() -> None:
    assert str(Completion("Yes.\n", [], "stop", Usage())) == "Yes.\n"
    assert str(Filled("a b", {"x": "b"}, Usage(), 0)) == "a b" and str(Edited("b", "a", Usage(), 0)) == "b"
    assert str(Decision("yes", {"yes": 1.0})) == f"{Decision('yes', {})}" == "yes"

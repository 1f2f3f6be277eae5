"""events.py: the arithmetic of the events and the results."""

from __future__ import annotations

from sfumato.events import Completion, Done, Edited, Usage


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

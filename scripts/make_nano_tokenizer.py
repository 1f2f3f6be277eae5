"""Write nano's tokenizer: `sfumato/nano/tokenizer.json` and `tokenizer_config.json`.

A Gemma-like tokenizer of exactly 512 ids: 16 control tokens, 256 byte tokens, the printable ASCII characters (space is
"▁") with the newline, and byte-pair merges learnt from the weighted words below. The learning is a few lines here and
not the library's trainer, so that the same ids come out on every machine and with every version. Merges hold only
letters, with "▁" in front at most: every digit, sign and newline is a token of its own.

    python scripts/make_nano_tokenizer.py
"""

import json
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

NANO = Path(__file__).resolve().parent.parent / "sfumato" / "nano"
VOCABULARY = 512

CONTROL = (
    "<pad> <eos> <bos> <unk> <|turn> <turn|> <|think|> <|channel> <channel|> <|tool> <tool|> "
    '<|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|>'
).split()
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHARACTERS = ["▁" if character == " " else character for character in map(chr, range(0x20, 0x7F))] + ["\n"]

# Each of these must end as one token; then the words of the chat format; then common English, most common first.
WHOLE = "user model system Solve ▁this ▁Sudoku".split()
FORMAT = "thought call response declaration tool name value type description string object true false null".split()
ENGLISH = """
the of and to a in is it you that he was for on are with as I his they be at one have from or had by hot but some what
there we can out other were all your when up use word how said an each she which do their time if will way about many
then them would write like so these her long make thing see him two has look more day could go come did my sound no most
number who over know water than call first people may down side been now find any new work part take get place made live
where after back little only round man year came show every good me give our under name very through just form much
great think say help low line before turn cause same mean differ move right boy old too does tell sentence set three
want air well also play small end put home read hand large spell add even land here must big high such follow act why
ask men change went light kind off need house picture try us again animal point mother world near build self earth
text noise canvas token step answer puzzle solution row column box digit grid solved empty please hello thanks
""".split()


def learn_merges(words: Counter[str], amount: int | None) -> list[tuple[str, str]]:
    """Plain byte-pair learning: the heaviest adjacent pair first, ties by the pair's own order. `amount` None: until
    every word is one token."""
    pieces = {word: list(word) for word in words}
    merges: list[tuple[str, str]] = []
    known = set(CHARACTERS)
    while amount is None or len(merges) < amount:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, weight in words.items():
            for pair in zip(pieces[word], pieces[word][1:], strict=False):
                if "".join(pair) not in known:
                    pairs[pair] += weight
        if not pairs and amount is None:
            break
        if not pairs:
            raise SystemExit(f"the word list gives only {len(merges)} merges of the {amount} needed: add words")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        known.add("".join(best))
        for word, parts in pieces.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            pieces[word] = joined
    return merges


def word_weights() -> Counter[str]:
    words: Counter[str] = Counter()
    for rank, word in enumerate(ENGLISH):
        words["▁" + word] += 1000 - 3 * rank
    for word in FORMAT:
        words[word] += 400
    for word in WHOLE:
        words[word] += 20_000
    return words


def assembled(merges: list[tuple[str, str]], size: int, whole: list[str]) -> Tokenizer:
    """The tokenizer of so many ids with these merges; SystemExit where one of the texts `whole` is not one token."""
    tokens = CONTROL + BYTES + CHARACTERS + ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != size:
        raise SystemExit(f"the vocabulary has {len(vocabulary)} different tokens, not {size}")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    for word in whole:
        ids = tokenizer.encode(word.replace("▁", " "), add_special_tokens=False).ids
        if len(ids) != 1:
            raise SystemExit(f"{word!r} is {[tokens[number] for number in ids]}, not one token: give it more weight")
    return tokenizer


def build() -> Tokenizer:
    base = CONTROL + BYTES + CHARACTERS
    return assembled(learn_merges(word_weights(), VOCABULARY - len(base)), VOCABULARY, WHOLE)


def configuration() -> dict[str, object]:
    named = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": CONTROL[index] for name, index in named.items()},
        "additional_special_tokens": CONTROL[4:],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }


def main() -> None:
    NANO.mkdir(parents=True, exist_ok=True)
    build().save(str(NANO / "tokenizer.json"))
    text = json.dumps(configuration(), indent=2, ensure_ascii=False) + "\n"
    (NANO / "tokenizer_config.json").write_text(text, encoding="utf-8")
    print(f"wrote tokenizer.json and tokenizer_config.json to {NANO}")


if __name__ == "__main__":
    main()

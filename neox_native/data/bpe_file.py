"""Reads a Hugging Face `tokenizer.json` with a byte-level BPE into what tiktoken needs, or says why that cannot be exact.

[Note: exact BPE] The original merges the *pair* of lowest rank, tiktoken the pair whose *bytes* have the lowest
rank. The two agree if each token comes from one merge, and if merging a token's own bytes by the merges before its
own ends with that very pair: no other pair can then ever spell the token. Both are checked for every merge.

[Note: runs of spaces] The tokenizer of GPT-NeoX-20B and Pythia has added tokens for runs of 2 to 24 spaces, cut out
leftmost and longest *before* the text is split into words. Here such runs are pieces of the pattern, and its other
white space is any but a space before another space.

[Note: old Unicode] The original normalises (NFC) with the tables of Unicode 9. A character that took part in
normalisation only later passes through it untouched and keeps its neighbours apart.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, NamedTuple

from neox_native.errors import UserError

GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+)"
"""GPT-2's contractions, words, numbers and signs, in the form that tiktoken's engine runs fastest."""
SPACE_OUTSIDE_RUNS = r"(?:[^\S ]| (?! ))"
MOST_IDS = 2**24
"""Bound on token ids: a table has an entry for each id up to the largest."""
NAME_OF_TYPE = {dict: "a JSON object", list: "a list", str: "a text"}
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
LATER_THAN_UNICODE_9 = (
    "5c8-5c9 7fd 897-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1af0 1df6-1dfa a82c 105c9 105d2 105da 105e4 10d24-10d27 "
    "10d69-10d6d 10eab-10eac 10ecb-10ecf 10ef0-10efb 10efd-10eff 10f46-10f50 10f82-10f85 11070 1133b 11382-11385 1138b "
    "1138e 11390-11391 113b8 113bb 113c2 113c5 113c7-113c9 113ce-113d0 1145e 11839-1183a 11930 11938 1193d-1193e 11943 "
    "119e0 11a34 11a47 11a99 11d42 11d44-11d45 11d97 11f41-11f42 1611e-16129 1612f 16d63 16d67-16d6a 16ff0-16ff1 "
    "1d127-1d128 1d250-1d252 1d25b-1d25c 1d25f 1d280-1d281 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef "
    "1e6e3 1e6e6 1e6ee-1e6ef 1e6f5"
)
"""Code points that normalisation knows in Unicode 10 to 18 but not in 9."""
_SPANS = ["-".join(chr(int(end, 16)) for end in span.split("-")) for span in LATER_THAN_UNICODE_9.split()]
_BARRIERS = re.compile(f"([{''.join(_SPANS)}])")


def nfc(text: str) -> str:
    """NFC as the original computes it; see [Note: old Unicode]."""
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in _BARRIERS.split(text))


class BpeFile(NamedTuple):
    """What tiktoken and the tables around it need."""

    pattern: str
    """Splits text into pieces that are merged on their own."""
    ranks: dict[bytes, int]
    """Bytes of each token -> rank."""
    id_of_rank: list[int]
    bytes_of_id: list[bytes]
    special: dict[str, int]
    """Text of each special token -> id."""
    has_nfc: bool


def _check_types(content: Any) -> None:
    """Raises `ValueError` that names what is not of the type that the format gives it, and ids out of range."""

    def check(value: Any, kind: type, what: str) -> Any:
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"its {what} is {str(value)[:40]!r}, not {NAME_OF_TYPE[kind]}")
        return kind() if value is None else value

    def check_id(token: str, number: Any) -> None:
        if type(number) is not int or not 0 <= number < MOST_IDS:
            raise ValueError(f"its token {token[:40]!r} has the id {str(number)[:40]}; ids go from 0 to {MOST_IDS - 1:,}")

    content = check(content, dict, "content")
    model, pre = (check(content.get(key), dict, key) for key in ("model", "pre_tokenizer"))
    check(content.get("normalizer"), dict, "normalizer")
    for step in check(pre.get("pretokenizers"), list, "list of pretokenizers"):
        pattern = check(check(step, dict, "pretokenizer").get("pattern"), dict, "pattern")
        check(pattern.get("Regex"), str, "regular expression")
    for token in check(content.get("added_tokens"), list, "list of added_tokens"):
        text = check(check(token, dict, "added token").get("content"), str, "added token's content")
        if not text:
            raise ValueError("one of its added_tokens is empty")
        text.encode()  # half a surrogate pair is a ValueError
        check_id(text, token.get("id"))
    for token, number in check(model.get("vocab"), dict, "vocab").items():
        check_id(token, number)
    for merge in check(model.get("merges"), list, "list of merges"):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
            raise ValueError(f"its merge {str(merge)[:40]!r} is not a pair of tokens")


def read_bpe_file(content: Any, name: str) -> BpeFile:
    """The parsed `content` of the tokenizer.json `name`. Raises `UserError` that says what in it is not supported."""

    def refuse(what: str) -> UserError:
        return UserError(f"data.tokenizer = {name!r} cannot be loaded exactly: {what}. Use another tokenizer.json.")

    try:
        _check_types(content)
    except ValueError as error:
        raise refuse(str(error)) from error
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise refuse(f"its model is {model.get('type')!r}, only a byte-level BPE is supported")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise refuse(f"its model sets {option} = {model[option]!r}")
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise refuse(f"its normalizer is {normalizer.get('type')!r}, only NFC or none is supported")
    words = _words(content.get("pre_tokenizer") or {})
    if words is None:
        raise refuse("its pre_tokenizer is neither ByteLevel without a prefix space nor one Split by a pattern before it")
    special, runs = {}, {}
    for token in content.get("added_tokens") or []:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise refuse(f"its added token {token['content']!r} strips its surroundings or stands for single words")
        if token.get("special") and not (normalizer and token.get("normalized")):
            special[token["content"]] = token["id"]
        elif set(token["content"]) == {" "}:
            runs[len(token["content"])] = token["id"]
        else:
            raise refuse(f"its added token {token['content']!r} is neither special nor a run of spaces")
    if runs and (words != GPT2_WORDS or sorted(runs) != list(range(2, max(runs) + 1))):
        raise refuse(f"its runs of {sorted(runs)} spaces do not go from 2 on, or its words are not GPT-2's")
    try:
        ranks, id_of_rank = _ranks(model.get("vocab") or {}, model.get("merges") or [], special)
    except ValueError as error:
        raise refuse(str(error)) from error
    return BpeFile(
        pattern=_pattern(words, max(runs, default=0)),
        special=special,
        has_nfc=normalizer is not None,
        bytes_of_id=_bytes_of_ids(model.get("vocab") or {}, special, runs),
        **_with_runs(ranks, id_of_rank, runs),
    )


def _words(pre: dict[str, Any]) -> str | None:
    """The regular expression that splits text into words, or None where the splitting is of another kind."""
    steps = pre.get("pretokenizers") or [] if pre.get("type") == "Sequence" else [pre]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    uses_regex = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        return GPT2_WORDS if uses_regex else None
    split = steps[0]
    is_plain = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    return (split.get("pattern") or {}).get("Regex") if len(steps) == 2 and is_plain and not uses_regex else None


def _pattern(words: str, longest_run: int) -> str:
    """The whole pattern for tiktoken, which drops what no alternative matches: what lies between words is a piece too."""
    if words != GPT2_WORDS:
        return rf"{words}|(?:(?!{words})[\s\S])+"
    space = SPACE_OUTSIDE_RUNS if longest_run else r"\s"
    runs = rf" {{2,{longest_run}}}|" if longest_run else ""
    return rf"{words}|{runs}{space}+(?!\S)|{space}+"


def _byte_of_character() -> dict[str, int]:
    """The printable characters that stand for the 256 bytes in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return table


BYTE_OF_CHARACTER = _byte_of_character()


def _bytes(token: str) -> bytes:
    if not set(token) <= BYTE_OF_CHARACTER.keys():
        raise ValueError(f"its token {token[:40]!r} holds a character that stands for no byte")
    return bytes(BYTE_OF_CHARACTER[character] for character in token)


Spine = tuple[tuple[bytes, int], ...]
"""What stands at one edge of a token while its bytes are merged: each part with the rank of the merge that makes it."""


def _ranks(
    vocab: dict[str, int], merges: list[str] | list[list[str]], special: dict[str, int]
) -> tuple[dict[bytes, int], list[int]]:
    """Bytes -> rank, bytes first and then the merges in their order, and rank -> id. Raises `ValueError`."""
    singles = {character: byte for character, byte in BYTE_OF_CHARACTER.items() if character in vocab}
    missing = set(range(256)) - set(singles.values()) - NEVER_IN_UTF8
    if missing:
        raise ValueError(f"its vocabulary lacks the byte {min(missing):#04x}")
    tokens = list(singles)
    ranks = {bytes([byte]): rank for rank, byte in enumerate(singles.values())}
    left_edge: dict[bytes, Spine] = {byte: ((byte, -1),) for byte in ranks}
    right_edge = dict(left_edge)
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(f"its merge {left!r} {right!r} names a token that the vocabulary lacks")
        first, second = _bytes(left), _bytes(right)
        if first + second in ranks:
            raise ValueError(f"two of its merges make {left + right!r}")
        if first not in ranks or second not in ranks or _crosses(right_edge[first], left_edge[second], ranks):
            raise ValueError(f"its merge {left!r} {right!r} is not how the merges before it read these bytes")
        rank = ranks[first + second] = len(tokens)
        left_edge[first + second] = (*left_edge[first], (first + second, rank))
        right_edge[first + second] = (*right_edge[second], (first + second, rank))
        tokens.append(left + right)
    unmade = vocab.keys() - set(tokens) - special.keys()
    if unmade:
        raise ValueError(f"no merge makes its token {min(unmade)!r}")
    return ranks, [vocab[token] for token in tokens]


def _crosses(left: Spine, right: Spine, ranks: dict[bytes, int]) -> bool:
    """Whether two tokens side by side, `left` the right edge of one and `right` the left edge of the other, are merged
    across their boundary before both are complete. Where two merges have equal rank, the left one comes first."""
    end = len(ranks)
    for (part, birth), death in zip(left, [birth for _, birth in left[1:]] + [end]):
        for (other, other_birth), other_death in zip(right, [birth for _, birth in right[1:]] + [end]):
            rank = ranks.get(part + other, end)
            if max(birth, other_birth) < rank < death and rank <= other_death:
                return True
    return False


def _with_runs(ranks: dict[bytes, int], id_of_rank: list[int], runs: dict[int, int]) -> dict[str, Any]:
    """Gives runs of spaces the ids of their added tokens; merged ids of such runs are never produced."""
    for length, token in runs.items():
        ranks[b" " * length] = len(id_of_rank)
        id_of_rank.append(token)
    return {"ranks": ranks, "id_of_rank": id_of_rank}


def _bytes_of_ids(vocab: dict[str, int], special: dict[str, int], runs: dict[int, int]) -> list[bytes]:
    """Bytes of every id; ids that nothing uses stand for no bytes."""
    table = {token: _bytes(text) for text, token in vocab.items() if text not in special}
    table.update({token: text.encode() for text, token in special.items()})
    table.update({token: b" " * length for length, token in runs.items()})
    return [table.get(token, b"") for token in range(max(table) + 1)]

"""Tokenizers: exact, refused where they cannot be, and closed to injected special tokens."""

from __future__ import annotations

import json
import lzma
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers

from neox_native.data.bpe_file import BYTE_OF_CHARACTER, nfc
from neox_native.data.preparation import documents
from neox_native.data.tokenizers import END_OF_DOCUMENT, Tokenizer, load_tokenizer
from neox_native.errors import UserError

TEXTS = ["", "a", "def f(x):\n\treturn x\n", "ä€😀\u0000\r\n", "x" * 1000, "\n" * 70, END_OF_DOCUMENT]
NEOX_20B = Path(__file__).parent / "goldens" / "20B_tokenizer.json.xz"
"""EleutherAI's tokenizer.json of GPT-NeoX-20B and Pythia (Apache License 2.0), as it is published, packed."""
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


@pytest.fixture(scope="module")
def neox_20b_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "20B_tokenizer.json"
    path.write_bytes(lzma.decompress(NEOX_20B.read_bytes()))
    return path


@pytest.fixture(scope="module")
def neox_20b(neox_20b_file: Path) -> Tokenizer:
    return load_tokenizer(str(neox_20b_file))


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokens_are_the_bytes(text: str) -> None:
    tokenizer = load_tokenizer("byte")
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_document_injects_the_end_of_document_only_when_allowed() -> None:
    tokenizer = load_tokenizer("byte")
    assert tokenizer.eod_id == 256 and tokenizer.vocab_size == 257
    assert tokenizer.eod_id not in tokenizer.encode(f"a{END_OF_DOCUMENT}b")
    assert tokenizer.encode(f"a{END_OF_DOCUMENT}b", allow_special=True).tolist() == [97, 256, 98]


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="data.tokenizer = 'klingon' is neither \"byte\" nor"):
        load_tokenizer("klingon")


def test_the_20b_tokenizer_equals_the_original_on_adversarial_text(neox_20b: Tokenizer) -> None:
    """The ids were made with Hugging Face tokenizers 0.23.3."""
    assert (neox_20b.vocab_size, neox_20b.eod_id) == (50277, 0)
    for golden in json.loads((Path(__file__).parent / "goldens" / "neox_20b_encodings.json").read_text()):
        ids = neox_20b.encode(golden["text"], allow_special=True)
        assert ids.tolist() == golden["ids"], ascii(golden["text"])
        assert neox_20b.decode(ids) == unicodedata.normalize("NFC", golden["text"]) or not golden["text"].isascii()


def test_the_20b_tokenizer_equals_the_original_on_the_standard_library(neox_20b: Tokenizer, neox_20b_file: Path) -> None:
    original = tokenizers.Tokenizer.from_file(str(neox_20b_file))
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py"))[::6]:
        text = path.read_text(encoding="utf-8", errors="replace")
        assert neox_20b.encode(text, allow_special=True).tolist() == original.encode(text).ids, path


@pytest.mark.parametrize("end", ["\n", "\n\n", "\r\n", "\r\n\r\n", "\n  \n\t", " "])
@pytest.mark.parametrize(
    "sentence", ["Word upon word.", "def f(x):", "e\u0301t\u0323\u0301 \u0301e", "слово за словом", "字。字，字。"]
)
def test_a_file_in_chunks_has_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, neox_20b: Tokenizer, sentence: str, end: str
) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 101)
    text = "".join(f"{sentence}{end}" for _ in range(150)) + f"No{end}mixed{end}  text\x85 \xa0 1{end}2"
    (tmp_path / "some.txt").write_bytes(text.encode())
    chunks = list(documents.texts_of(str(tmp_path / "some.txt")))
    tokens = [token for chunk in chunks for token in neox_20b.encode(chunk).tolist()]
    assert tokens == neox_20b.encode(text).tolist() and len(chunks) > 10


def test_the_20b_tokenizer_keeps_documents_from_ending_early(neox_20b: Tokenizer) -> None:
    text = f"a{END_OF_DOCUMENT}<|padding|>b"
    assert not {0, 1} & set(neox_20b.encode(text).tolist()) and neox_20b.decode(neox_20b.encode(text)) == text


def test_characters_newer_than_the_originals_tables_bar_composition() -> None:
    assert nfc("e\u0301") == "\u00e9" and nfc("\u0323\u0301e\u0301\u0323") == "\u0323\u0301\u1eb9\u0301"
    assert nfc("\U00011935\U00011930") == "\U00011935\U00011930"
    assert nfc("a\u0301\u1acea\u0301") == "\u00e1\u1ace\u00e1"
    assert nfc("\u1abf\u0316") == "\u1abf\u0316"


def train(text: str, num_merges: int) -> list[tuple[bytes, bytes]]:
    """A plain byte-pair training: again and again the most frequent pair of one long text, without words."""
    parts, merges = [bytes([byte]) for byte in text.encode()], []
    for _ in range(num_merges):
        pair = max(Counter(zip(parts, parts[1:])).items(), key=lambda item: (item[1], item[0]))[0]
        merges.append(pair)
        parts = apply(parts, pair)
    return merges


def apply(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged, i = [], 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


SAMPLE = "ababcabcdababd abcabab.cdcdab" * 3


def tokenizer_json(merges: list[tuple[bytes, bytes]], first_id: int = 0) -> dict[str, Any]:
    """A tokenizer.json that takes a whole text as one word."""
    spell = lambda token: "".join(CHARACTER_OF_BYTE[byte] for byte in token)  # noqa: E731
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    split = {"type": "Split", "pattern": {"Regex": "[a-d ]+"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {
        "added_tokens": [{"id": 900, "content": END_OF_DOCUMENT, "special": True, "normalized": False}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {
            "type": "BPE",
            "vocab": {spell(token): first_id + number for number, token in enumerate(tokens)},
            "merges": [f"{spell(left)} {spell(right)}" for left, right in merges],
        },
    }


def load(tmp_path: Path, content: dict[str, Any]) -> Tokenizer:
    (tmp_path / "some.json").write_text(json.dumps(content))
    return load_tokenizer(str(tmp_path / "some.json"))


@pytest.mark.parametrize("merges", [0, 1, 5, 20])
def test_any_byte_level_file_equals_merging_pair_by_pair(tmp_path: Path, merges: int) -> None:
    pairs = train(SAMPLE, merges)
    tokenizer = load(tmp_path, tokenizer_json(pairs, first_id=7))
    ids = {bytes([byte]): 7 + byte for byte in range(256)}
    ids.update({left + right: 263 + number for number, (left, right) in enumerate(pairs)})
    for start in range(0, 40, 3):
        expected = []
        for piece in SAMPLE[start:].replace(".", "|.|").split("|"):
            parts = [bytes([byte]) for byte in piece.encode()]
            for pair in pairs:
                parts = apply(parts, pair)
            expected += [ids[part] for part in parts]
        assert tokenizer.encode(SAMPLE[start:]).tolist() == expected
        assert tokenizer.decode(expected) == SAMPLE[start:]
    assert tokenizer.eod_id == 900 and tokenizer.vocab_size == 901


def test_text_that_the_pattern_leaves_out_is_kept(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, tokenizer_json([]))
    assert tokenizer.decode(tokenizer.encode("ab..\nZZab9")) == "ab..\nZZab9"


def test_the_name_follows_the_content(tmp_path: Path) -> None:
    first = load(tmp_path, tokenizer_json([])).name
    assert first.startswith("some-") and load(tmp_path, tokenizer_json(train(SAMPLE, 1))).name != first


def edit(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def token(**changes: object) -> list[dict[str, object]]:
    return [{"id": 900, "content": END_OF_DOCUMENT, "special": True}, {"id": 901, "content": "<x>", **changes}]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (edit("model", "type", value="Unigram"), "its model is 'Unigram'"),
        (edit("model", "dropout", value=0.1), "sets dropout = 0.1"),
        (edit("model", "byte_fallback", value=True), "sets byte_fallback = True"),
        (edit("normalizer", value={"type": "NFKC"}), "its normalizer is 'NFKC'"),
        (edit("pre_tokenizer", value={"type": "Metaspace"}), "its pre_tokenizer is neither ByteLevel"),
        (edit("pre_tokenizer", value=None), "its pre_tokenizer is neither ByteLevel"),
        (
            edit("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True),
            "its pre_tokenizer is neither ByteLevel",
        ),
        (
            edit("pre_tokenizer", "pretokenizers", 0, "behavior", value="Removed"),
            "its pre_tokenizer is neither ByteLevel",
        ),
        (edit("added_tokens", value=token(lstrip=True)), "'<x>' strips its surroundings"),
        (edit("added_tokens", value=token()), "'<x>' is neither special nor a run of spaces"),
        (edit("added_tokens", value=token(content="   ")), "its runs of .3. spaces do not go from 2 on"),
        (lambda content: content["model"]["vocab"].pop("a"), "its vocabulary lacks the byte 0x61"),
        (edit("model", "vocab", "xyz", value=800), "no merge makes its token 'xyz'"),
        (edit("model", "merges", value=["a b", "a c"]), "merge 'a' 'c' names a token that the vocabulary lacks"),
        (lambda content: content["model"]["merges"].append("a b"), "two of its merges make 'ab'"),
        (
            lambda content: content["model"]["merges"].insert(0, "ab a"),
            "merge 'ab' 'a' is not how the merges before it",
        ),
        (edit("added_tokens", value=[]), "has no special token '<|endoftext|>'"),
        (edit("model", "vocab", "a", value=2**31), "token 'a' has the id 2147483648; ids go from 0 to 16,777,215"),
        (edit("model", "vocab", "a", value=-1), "token 'a' has the id -1"),
        (edit("model", "vocab", "a", value="7"), "token 'a' has the id 7"),
        (edit("added_tokens", 0, "id", value=2**31), "'<|endoftext|>' has the id 2147483648"),
        (edit("added_tokens", 0, "content", value=3), "its added token's content is '3', not a text"),
        (edit("added_tokens", 0, "content", value=""), "one of its added_tokens is empty"),
        (edit("added_tokens", 0, "content", value="\ud800"), "surrogates not allowed"),
        (edit("added_tokens", value={"a": 1}), "its list of added_tokens is .* not a list"),
        (edit("added_tokens", 0, value=[]), "its added token is '..', not a JSON object"),
        (edit("model", value=[]), "its model is '..', not a JSON object"),
        (edit("model", "vocab", value=["a"]), "its vocab is .* not a JSON object"),
        (edit("model", "vocab", value=None), "its vocabulary lacks the byte 0x00"),
        (edit("model", "merges", value=[["a", 1]]), "its merge .* is not a pair of tokens"),
        (edit("model", "merges", value=["a b c"]), "its merge 'a b c' is not a pair of tokens"),
        (edit("model", "merges", value="ab"), "its list of merges is 'ab', not a list"),
        (
            lambda content: content["model"].update(merges=["a \u20ac"])
            or content["model"]["vocab"].update({"\u20ac": 500, "a\u20ac": 501}),
            "token '\u20ac' holds a character that stands for no byte",
        ),
        (edit("normalizer", value="NFC"), "its normalizer is 'NFC', not a JSON object"),
        (edit("pre_tokenizer", value=7), "its pre_tokenizer is '7', not a JSON object"),
        (edit("pre_tokenizer", "pretokenizers", value=7), "its list of pretokenizers is '7', not a list"),
        (edit("pre_tokenizer", "pretokenizers", 0, value="x"), "its pretokenizer is 'x', not a JSON object"),
        (edit("pre_tokenizer", "pretokenizers", 0, "pattern", value="x"), "its pattern is 'x', not a JSON object"),
        (edit("pre_tokenizer", "pretokenizers", 0, "pattern", value=None), "its pre_tokenizer is neither ByteLevel"),
        (edit("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", value=1), "its regular expression is '1', not a text"),
        (edit("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", value="("), "is no regular expression that can be used"),
        (edit("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", value="[z-a]"), "is no regular expression that can be used"),
    ],
)
def test_a_file_that_cannot_be_exact_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    content = tokenizer_json([(b"a", b"b"), (b"ab", b"a")])
    change(content)
    with pytest.raises(UserError, match=sentence.replace("|", r"\|")):
        load(tmp_path, content)


def test_a_merge_that_earlier_merges_forestall_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="merge 'ab' 'c' is not how the merges before it read these bytes"):
        load(tmp_path, tokenizer_json([(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]))
    with pytest.raises(UserError, match="merge 'a' 'aa' is not how"):
        load(tmp_path, tokenizer_json([(b"a", b"a"), (b"a", b"aa")]))
    assert load(tmp_path, tokenizer_json([(b"a", b"a"), (b"aa", b"a")]))


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "9" * 5000])
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match="bad.json' is no JSON file"):
        load_tokenizer(str(tmp_path / "bad.json"))


def test_a_home_of_nobody_is_a_sentence() -> None:
    with pytest.raises(UserError, match="'~nobody-here/tokenizer.json' cannot be found: .*; write the whole path"):
        load_tokenizer("~nobody-here/tokenizer.json")


def test_a_folder_stands_for_its_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "pythia").mkdir()
    (tmp_path / "pythia" / "tokenizer.json").write_text(json.dumps(tokenizer_json([])))
    assert load_tokenizer(str(tmp_path / "pythia")).name.startswith("pythia-")


def test_named_encodings_are_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiktoken.Encoding(
        "gpt2",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={END_OF_DOCUMENT: 50256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: made)
    tokenizer = load_tokenizer("tiktoken:gpt2")
    assert (tokenizer.name, tokenizer.eod_id, tokenizer.vocab_size) == ("tiktoken-gpt2", 50256, 50257)
    assert tokenizer.encode(END_OF_DOCUMENT, allow_special=True).tolist() == [50256]
    assert tokenizer.encode("ab").dtype == np.uint32


def test_an_unknown_named_encoding_is_refused() -> None:
    with pytest.raises(UserError, match="'tiktoken:gpt9' is not known; tiktoken has .*gpt2"):
        load_tokenizer("tiktoken:gpt9")


def test_a_named_encoding_on_an_offline_machine_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="'tiktoken:gpt2' must be downloaded once .* TIKTOKEN_CACHE_DIR"):
        load_tokenizer("tiktoken:gpt2")

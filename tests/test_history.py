"""Histories: read from JSONL, in time order, with errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steer.errors import SteerError
from steer.history import History, Record, read_histories


def written(path: Path, *entries: dict[str, Any] | str) -> Path:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path = path / "records.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_one_history_per_user_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"user_id": "ann", "response": "one", "prompt": "p"},
        "",
        {"user_id": "bob", "text": "two", "score": 3},
        {"user_id": "ann", "response": "three", "id": 7},
        {"user_id": 12, "response": "grüße"},
    )
    histories = dict(read_histories(path))
    assert list(histories) == ["ann", "bob", "12"]
    assert [record.response for record in histories["ann"]] == ["one", "three"]
    assert [record.prompt for record in histories["ann"]] == ["p", None]
    assert histories["ann"].records[1].id == "7"
    assert histories["bob"].records[0].fields["score"] == 3
    assert histories["12"].records[0].response == "grüße"
    assert len(histories["ann"]) == 2


@pytest.mark.parametrize(
    ("times", "order"),
    [
        ([3, 1.5, 2], [1, 2, 0]),
        (["2024-03-01", "2023-01-01", "2024-01-01"], [1, 2, 0]),
        ([1, 1, 0], [2, 0, 1]),
        ([3, None, 1], [0, 1, 2]),
    ],
)
def test_time_order_where_all_records_have_comparable_times(tmp_path: Path, times: list[Any], order: list[int]) -> None:
    path = written(tmp_path, *({"user_id": "a", "response": str(i), "time": time} for i, time in enumerate(times)))
    assert [int(record.response) for record in read_histories(path)[0][1]] == order


def test_times_of_two_kinds_have_no_order(tmp_path: Path) -> None:
    path = written(tmp_path, *({"user_id": "a", "response": "r", "time": time} for time in (3, "2024")))
    with pytest.raises(SteerError, match="times of two kinds"):
        read_histories(path)


def test_null_is_the_same_as_absent(tmp_path: Path) -> None:
    entry = {"user_id": "a", "text": "r", "id": None, "response": None, "time": None}
    [(_, history)] = read_histories(written(tmp_path, entry))
    assert history.records[0].response == "r"
    assert history.records[0].id not in ("", "None")


def test_an_instruction_that_is_no_template(tmp_path: Path) -> None:
    path = written(tmp_path, {"user_id": "a", "text": "r"})
    with pytest.raises(SteerError, match="not a template"):
        read_histories(path, instruction="Write {title")


def test_an_instruction_makes_prompts_of_other_keys(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"user_id": "a", "response": "r", "title": "T", "n": 3},
        {"user_id": "a", "response": "r", "prompt": "own", "title": "T"},
    )
    records = read_histories(path, instruction="Write {title}, {n} words")[0][1]
    assert [record.prompt for record in records] == ["Write T, 3 words", "own"]
    with pytest.raises(SteerError, match=r"records.jsonl:1: the instruction asks for \{topic\}, the record has"):
        read_histories(path, instruction="{topic}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"not JSON \(.* at column 2\)"),
        ("[1, 2]", "expected an object with `user_id` and `response`, found list"),
        ('{"response": "x"}', "`user_id` is missing or empty"),
        ('{"user_id": "", "response": "x"}', "`user_id` is missing or empty"),
        ('{"user_id": ["a"], "response": "x"}', "`user_id` is missing or empty"),
        ('{"user_id": "a"}', "neither `response` nor `text` holds any text"),
        ('{"user_id": "a", "response": "  "}', "neither `response` nor `text` holds any text"),
        ('{"user_id": "a", "response": 3}', "neither `response` nor `text` holds any text"),
        ('{"user_id": "a", "response": "x", "prompt": 3}', "`prompt` must be text, found int"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path, {"user_id": "a", "response": "fine"}, "", line)
    with pytest.raises(SteerError, match=f"records.jsonl:3: {message}"):
        read_histories(path)


def test_a_file_without_records(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="there is no such file"):
        read_histories(tmp_path / "nothing.jsonl")
    with pytest.raises(SteerError, match="the file holds no records"):
        read_histories(written(tmp_path, "", " "))


def test_an_id_is_a_hash_of_the_content_where_none_is_given() -> None:
    record = Record("a", "text", prompt="p")
    assert record.id == Record("a", "text", prompt="p").id
    others = [
        Record("b", "text", prompt="p"),
        Record("a", "Text", prompt="p"),
        Record("a", "text"),
        Record("a", "text", "p", time=1),
    ]
    assert len({record.id, *(other.id for other in others)}) == 5
    assert Record("a", "text", id="mine").id == "mine"


def test_repeats_without_an_id_are_numbered(tmp_path: Path) -> None:
    same, other = {"user_id": "a", "text": "ok", "prompt": "p"}, {"user_id": "a", "text": "no"}
    [(_, history)] = read_histories(written(tmp_path, same, other, same, {**same, "user_id": "b"}, same))[:1]
    first = Record("a", "ok", "p").id
    assert [record.id for record in history] == [first, Record("a", "no").id, f"{first}-2", f"{first}-3"]
    assert history.records[3].fields == same
    # Whatever part of it is taken, and whatever follows, a record keeps its id.
    assert [record.id for record in history.split(1)[1]] == [f"{first}-3"]
    longer = History("a", (*history.records[2:], *[Record("a", "ok", "p")] * 3))
    assert [record.id for record in longer] == [f"{first}-2", f"{first}-3", first, f"{first}-4", f"{first}-5"]
    assert History("a", longer.records) == longer


def test_an_id_that_was_given_twice_is_refused(tmp_path: Path) -> None:
    twice = [{"user_id": "a", "text": text, "id": 7} for text in ("x", "y")]
    with pytest.raises(SteerError, match="two records of 'a' have the id '7'"):
        read_histories(written(tmp_path, *twice))
    # Another user's records have ids of their own.
    assert len(read_histories(written(tmp_path, twice[0], {**twice[1], "user_id": "b"}))) == 2
    numbered = History("a", (Record("a", "x"),) * 2).records[1]
    with pytest.raises(SteerError, match="-2"):
        History("a", (numbered, numbered))


@pytest.mark.parametrize(
    ("holdout", "limit", "known", "held"),
    [
        (0, None, "abcde", ""),
        (2, None, "abc", "de"),
        (2, 1, "c", "de"),
        (0, 2, "de", ""),
        (9, None, "", "abcde"),
        (1, 99, "abcd", "e"),
        (1, 0, "", "e"),
    ],
)
def test_split(holdout: int, limit: int | None, known: str, held: str) -> None:
    history = History("u", tuple(Record("u", letter) for letter in "abcde"))
    left, right = history.split(holdout, limit)
    assert ("".join(r.response for r in left), "".join(r.response for r in right)) == (known, held)
    assert left.user_id == right.user_id == "u"


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    path.write_bytes('\ufeff{"user_id": "a", "text": "x"}\n'.encode())
    assert [user for user, _ in read_histories(path)] == ["a"]


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    path.write_bytes(b'{"user_id": "a", "text": "x"}\n{"user_id": "a", "text": "\xff"}\n')
    with pytest.raises(SteerError, match=r"h\.jsonl:2: the line is not UTF-8"):
        read_histories(path)

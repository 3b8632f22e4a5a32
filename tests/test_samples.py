"""The sample histories: everyone answers the same prompts, so that what differs is the voice."""

from importlib.resources import files
from pathlib import Path

import pytest

from steer.history import History, read_histories

PEOPLE = ["nan", "theo", "kit", "dr-osei", "mo"]


@pytest.fixture(scope="module")
def voices() -> dict[str, History]:
    return dict(read_histories(Path(str(files("steer") / "data" / "voices.jsonl"))))


def test_five_people_with_sixteen_records_each(voices: dict[str, History]) -> None:
    assert list(voices) == PEOPLE
    assert [len(history) for history in voices.values()] == [16] * 5


def test_ids_are_unique_and_times_increase(voices: dict[str, History]) -> None:
    ids = [record.id for history in voices.values() for record in history]
    assert len(set(ids)) == len(ids)
    for history in voices.values():
        times = [record.time for record in history]
        assert times == sorted(set(times))


def test_everyone_answers_the_same_prompts_in_the_same_order(voices: dict[str, History]) -> None:
    prompts = [record.prompt for record in voices["nan"]]
    assert None not in prompts
    assert len(set(prompts)) == 16
    for history in voices.values():
        assert [record.prompt for record in history] == prompts


def test_responses_are_distinct_and_of_like_length(voices: dict[str, History]) -> None:
    responses = [record.response for history in voices.values() for record in history]
    assert len(set(responses)) == len(responses)
    assert all(30 <= len(response.split()) <= 90 for response in responses)

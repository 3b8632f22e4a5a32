"""Fixtures: each architecture in turn, as a fresh tiny model, wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import ALIKE, ARCHITECTURES, WRAPPED, tiny, tokenizer

import steer
from steer.cache import Cache

# The models are so small that more threads only get in each other's way.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # The tiny Gemma has a tiny window, on purpose.
    config.addinivalue_line("filterwarnings", "ignore:some layers of this model see no further back")


# Where models differ that are built alike: in what their layers are called and what comes out of them.
OF_ALL = {"test_neutral.py", "test_positions.py"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if {params.get("arch"), params.get("lm")} & ALIKE.keys() and item.path.name not in OF_ALL:
            item.add_marker(pytest.mark.full)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what tests have measured, which they hand over by `record_property`."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid}: {name} {value}")


@pytest.fixture(params=[*ARCHITECTURES, *WRAPPED])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def lm(arch: str) -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny(arch), tokenizer()) as lm:
        yield lm


@pytest.fixture
def llama() -> Iterator[steer.FrozenLM]:
    """For what does not depend on the architecture."""
    with steer.wrap(tiny("llama"), tokenizer()) as lm:
        yield lm


@pytest.fixture
def histories() -> list[steer.History]:
    """Two people who answer the same three prompts, each in a way of their own."""
    prompts = ["greet me", "the weather?", "say bye"]
    answers = {
        "ann": ["HELLO HELLO!!", "RAIN! RAIN! RAIN!", "BYE BYE NOW!!"],
        "bob": ["well, good day to you.", "it is, as ever, a little grey.", "farewell, then."],
    }
    return [
        steer.History(
            user,
            tuple(
                steer.Record(user, answer, prompt, fields={"bland": "ok, fine"})
                for prompt, answer in zip(prompts, own, strict=True)
            ),
        )
        for user, own in answers.items()
    ]


@pytest.fixture(autouse=True)
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Where models' own answers are kept meanwhile: no test finds those of another, or leaves any behind."""
    cache = Cache(tmp_path / "answers.sqlite")
    monkeypatch.setattr("steer.neutral.answers_cache", lambda: cache)
    return cache


@pytest.fixture(autouse=True)
def embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Where text encoders keep embeddings meanwhile."""
    cache = Cache(tmp_path / "embeddings.sqlite")
    monkeypatch.setattr("steer.text_encoder.embeddings_cache", lambda: cache)
    return cache

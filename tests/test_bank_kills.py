"""A writer is killed at random moments: nothing is lost, nothing is mixed up, and nothing that was deleted is left."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import FAST

from steer.bank import Bank
from steer.bank import upkeep as upkeep_module
from steer.bank import writing as writing_module
from steer.state import Provenance, UserState

Key = tuple[str, str]

USERS = [f"user-{number}" for number in range(24)]
NAMES = ["style", "memory"]
KEYS = [(user, name) for user in USERS for name in NAMES]

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def state(token: int) -> UserState:
    """A state that can be recognised anywhere: its number is in the bytes of its tensors and in its data."""
    mark = f"T{token:014d}T".encode() * (5 + token % 40)
    vector = torch.frombuffer(bytearray(mark), dtype=torch.float32)
    return UserState(Provenance("m", 1, sites=("embed",)), {"v": vector}, {"secret": f"D{token:014d}D"})


def token_of(found: UserState) -> int:
    token = int(found.data["secret"][1:-1])
    assert torch.equal(found.tensors["v"], state(token).tensors["v"])
    return token


def tokens_in(folder: Path) -> set[int]:
    """The numbers of all states of which a byte pattern is in any file."""
    content = b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return {int(number) for number in re.findall(rb"[TD](\d{14})[TD]", content)}


class Plan:
    """Random changes of a bank, each of which says what it will leave behind."""

    def __init__(self, seed: int, tokens: Iterator[int], alive: dict[Key, int]) -> None:
        self.random = random.Random(seed)
        self.tokens = tokens
        self.alive = alive

    def next(self) -> tuple[str, list[Key], dict[Key, int]]:
        what = self.random.choices(["add", "replace", "delete", "forget", "compact"], [4, 4, 4, 1, 2])[0]
        alive = sorted(self.alive)
        free = [key for key in KEYS if key not in self.alive]
        size = self.random.choice([1, 1, 2, 5, 12])
        if what == "add":
            keys = self.random.sample(free, min(size, len(free)))
        elif what == "replace":
            keys = self.random.sample(alive, min(size, len(alive))) + self.random.sample(free, min(1, len(free)))
        elif what == "delete":
            keys = self.random.sample(alive, min(size, len(alive)))
        elif what == "forget":
            user = self.random.choice(USERS)
            keys = [key for key in alive if key[0] == user]
        else:
            keys = []
        after = dict(self.alive)
        for key in keys:
            if what in ("add", "replace"):
                after[key] = next(self.tokens)
            else:
                del after[key]
        return what, keys, after


def carry_out(bank: Bank, what: str, keys: list[Key], after: dict[Key, int]) -> None:
    if what in ("add", "replace"):
        bank.update({key: state(after[key]) for key in keys})
    elif what == "delete":
        bank.delete(keys)
    elif what == "forget":
        bank.forget({user for user, _ in keys})
    else:
        bank.compact()


def work(path: Path, plan: Plan, told: int) -> None:
    """Changes the bank until it is killed; tells before and after each change what it is."""
    bank = Bank(path, create=False)
    while True:
        what, keys, after = plan.next()
        os.write(told, json.dumps([what, [[*key, token] for key, token in after.items()]]).encode() + b"\n")
        carry_out(bank, what, keys, after)
        os.write(told, b"done\n")
        plan.alive = after


def killed(path: Path, plan: Plan, seconds: float) -> tuple[dict[Key, int], dict[Key, int], str]:
    """What the bank held before the change in which its writer was killed, what after it, and which change it was."""
    reading, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            work(path, plan, told)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(told)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer failed before it was killed"
    with os.fdopen(reading, "rb") as pipe:
        *lines, _ = pipe.read().split(b"\n")
    before = after = plan.alive
    what = "nothing"
    for line in lines:
        if line == b"done":
            before, what = after, "nothing"
        else:
            what, rows = json.loads(line)
            after = {(user, name): token for user, name, token in rows}
    return before, after, what


def kill(times: int, seed: int, longest: float, folder: Path) -> Counter[str]:
    """Kills writers of one bank; returns what was found, and during which changes they were killed."""
    chance = random.Random(seed)
    found: Counter[str] = Counter(lost=0, corrupted=0, returned=0)
    alive: dict[Key, int] = {}
    Bank(folder).close()
    for number in range(times):
        # Numbers of one round begin behind those of all before.
        tokens = iter(range(1_000_000 * (number + 1), 1_000_000 * (number + 2)))
        before, after, what = killed(folder, Plan(chance.random(), tokens, alive), chance.uniform(0.0, longest))
        found[f"in {what}"] += 1
        with Bank(folder, create=False) as bank:
            left = tokens_in(folder)
            keys = set(bank)
            # The change in which it was killed has been made as a whole, or not at all.
            alive = after if keys == set(after) and _values(bank, keys) == after else before
            found["lost"] += len(set(alive) - keys)
            found["returned"] += len(keys - set(alive))
            values = _values(bank, keys)
            found["corrupted"] += sum(values[key] != alive.get(key) for key in keys)
            found["returned"] += len(left - set(alive.values()))
            found["corrupted"] += len(bank.verify())
        if found["lost"] or found["corrupted"] or found["returned"]:
            break
    return found


def _values(bank: Bank, keys: set[Key]) -> dict[Key, int]:
    return {key: token_of(bank[key]) for key in keys}


def assert_nothing_happened(found: Counter[str], times: int) -> None:
    print(dict(found))
    assert (found["lost"], found["corrupted"], found["returned"]) == (0, 0, 0)
    assert sum(number for what, number in found.items() if what.startswith("in ")) == times


@pytest.fixture(params=["small segments", "usual segments"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small segments":
        # So that segments fill up, are added and are packed all the time.
        for module in (writing_module, upkeep_module):
            monkeypatch.setattr(module, "LARGEST", 8192)
        monkeypatch.setattr(writing_module, "SMALLEST", 1024)


@pytest.mark.usefixtures("sizes")
def test_writers_killed_at_random_moments(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        assert_nothing_happened(kill(30, 0, 0.06, Path(folder) / "people.bank"), 30)


@pytest.mark.full
@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_thousand_writers_killed_at_random_moments(where: str, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=FAST if where == "memory" else None) as folder:
        assert_nothing_happened(kill(250, 1, 0.06 if where == "memory" else 0.2, Path(folder) / "people.bank"), 250)


def test_the_check_notices_what_is_left(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        bank = Bank(Path(folder) / "people.bank")
        bank["user-1", "style"] = state(7)
        bank["user-2", "style"] = state(8)
        assert tokens_in(bank.path) == {7, 8}
        shutil.copytree(bank.path / "segments", bank.path / "copies")
        del bank["user-1", "style"]
        assert tokens_in(bank.path) == {7, 8}
        shutil.rmtree(bank.path / "copies")
        assert tokens_in(bank.path) == {8}

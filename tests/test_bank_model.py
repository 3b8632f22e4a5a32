"""Random sequences of changes: a bank does what a dictionary does, and keeps no byte of what is gone."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from processes import FAST

from steer.bank import Bank, UserHash
from steer.bank import upkeep as upkeep_module
from steer.bank import writing as writing_module
from steer.errors import SteerError, UnknownUser
from steer.state import Provenance, UserState

Key = tuple[str, str]

users = st.sampled_from(["ada", "bob", "böb", "../c", "d" * 900, "אבג"])
names = st.sampled_from(["style", "memory.v2"])
keys = st.tuples(users, names)
# Vectors of several lengths and dtypes, several tensors, and none at all.
shapes = st.sampled_from([(), (4,), (4,), (4,), (32,), (3, 8), (700,)])
dtypes = st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
recipes = st.lists(st.tuples(shapes, dtypes), max_size=3)


class Banks(RuleBasedStateMachine):
    """A bank, a second one that is merged into it, and the dictionaries that they should be."""

    hashed = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=FAST))
        self.bank = Bank(self.folder / "one.bank", hashed=self.hashed)
        self.other = Bank(self.folder / "two.bank")
        # Opened before anything was written, and never again.
        self.reader = Bank(self.folder / "one.bank")
        self.expected: dict[Key, UserState] = {}
        self.others: dict[Key, UserState] = {}
        self.number = 0

    def teardown(self) -> None:
        for bank in (self.bank, self.other, self.reader):
            bank.close()
        shutil.rmtree(self.folder)

    def make(self, recipe: list[tuple[tuple[int, ...], torch.dtype]]) -> UserState:
        """A state whose number can be found in the bytes of the bank."""
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        tensors = {
            f"t{place}": torch.randint(0, 9, shape, generator=generator).to(dtype)
            for place, (shape, dtype) in enumerate(recipe)
        }
        source = Provenance("m", 1, sites=("embed",), records=(f"r{self.number}",), settings={"n": self.number % 3})
        return UserState(source, tensors, {"secret": f"D{self.number:014d}D"})

    @rule(states=st.dictionaries(keys, recipes, min_size=1, max_size=8))
    def update(self, states: dict[Key, list[tuple[tuple[int, ...], torch.dtype]]]) -> None:
        made = {key: self.make(recipe) for key, recipe in states.items()}
        self.bank.update(made)
        self.expected |= made

    @rule(states=st.dictionaries(keys, recipes, min_size=1, max_size=4))
    def update_other(self, states: dict[Key, list[tuple[tuple[int, ...], torch.dtype]]]) -> None:
        made = {key: self.make(recipe) for key, recipe in states.items()}
        self.other.update(made)
        self.others |= made

    @rule(some=st.sets(keys, min_size=1, max_size=4))
    def delete(self, some: set[Key]) -> None:
        if some <= set(self.expected):
            self.bank.delete(some)
            for key in some:
                del self.expected[key]
        else:
            with pytest.raises(UnknownUser):
                self.bank.delete(some)

    @rule(some=st.sets(users, max_size=3))
    def forget(self, some: set[str]) -> None:
        gone = [key for key in self.expected if key[0] in some]
        assert self.bank.forget(some) == len(gone)
        for key in gone:
            del self.expected[key]

    @rule(conflict=st.sampled_from(["error", "keep", "replace"]))
    def merge(self, conflict: str) -> None:
        both = set(self.expected) & set(self.others)
        if conflict == "error" and both:
            with pytest.raises(SteerError, match="both banks have"):
                self.bank.merge(self.other)
        else:
            copied = {key: state for key, state in self.others.items() if conflict != "keep" or key not in both}
            assert self.bank.merge(self.other, conflict=conflict) == len(copied)  # type: ignore[arg-type]
            self.expected |= copied

    @rule()
    def compact(self) -> None:
        self.bank.compact()
        assert self.bank.compact().segments_before == self.bank.compact().segments_after

    @rule()
    def reopen(self) -> None:
        self.bank.close()
        self.bank = Bank(self.folder / "one.bank", create=False)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def gather(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(sorted(self.expected)))
        name, like = chosen[1], self.expected[chosen]
        alike = [
            user for (user, own), state in self.expected.items() if own == name and _layout(state) == _layout(like)
        ]
        batch = [None, *data.draw(st.lists(st.sampled_from(alike), min_size=1, max_size=5)), "nobody"]
        for bank in (self.bank, self.reader):
            rows = bank.gatherer(name)(batch)
            assert rows.found.tolist() == [user not in (None, "nobody") for user in batch]
            for label, tensor in rows.tensors.items():
                zero = torch.zeros_like(like.tensors[label])
                wanted = [
                    self.expected[user, name].tensors[label] if (user, name) in self.expected else zero
                    for user in batch
                ]
                assert torch.equal(tensor, torch.stack(wanted))

    @invariant()
    def the_same_as_a_dictionary(self) -> None:
        for bank in (self.bank, self.reader):
            assert len(bank) == len(self.expected)
            assert bank.names() == sorted({name for _, name in self.expected})
            for key, state in self.expected.items():
                assert key in bank
                found = bank[key]
                assert found.provenance == state.provenance
                assert found.data == state.data
                assert list(found.tensors) == list(state.tensors)
                for label, tensor in state.tensors.items():
                    assert found.tensors[label].dtype == tensor.dtype
                    assert torch.equal(found.tensors[label], tensor)
            self.the_same_keys(bank)

    def the_same_keys(self, bank: Bank) -> None:
        assert list(bank) == list(self.expected)
        assert bank.users() == sorted({user for user, _ in self.expected})

    @invariant()
    def nothing_is_left_of_what_is_gone(self) -> None:
        content = b"\n".join(file.read_bytes() for file in self.bank.path.rglob("*") if file.is_file())
        secrets = {found.decode() for found in re.findall(rb"D\d{14}D", content)}
        assert secrets == {state.data["secret"] for state in self.expected.values()}

    @invariant()
    def nothing_is_wrong(self) -> None:
        assert self.bank.verify() == []


class HashedBanks(Banks):
    """The same where only hashes of the ids are kept."""

    hashed = True

    def the_same_keys(self, bank: Bank) -> None:
        found = list(bank)
        assert all(isinstance(user, UserHash) for user, _ in found)
        assert [bank[key].data for key in found] == [state.data for state in self.expected.values()]
        content = b"\n".join(file.read_bytes() for file in bank.path.rglob("*") if file.is_file())
        assert b"d" * 900 not in content


def _layout(state: UserState) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, tensor.dtype, tensor.shape) for name, tensor in state.tensors.items()]


@pytest.mark.parametrize("machine", [Banks, HashedBanks])
@pytest.mark.parametrize("small", [True, False], ids=["small segments", "usual segments"])
def test_a_bank_is_a_dictionary_that_forgets(
    machine: type[Banks], small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        for module in (writing_module, upkeep_module):
            monkeypatch.setattr(module, "LARGEST", 4096)
        monkeypatch.setattr(writing_module, "SMALLEST", 512)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

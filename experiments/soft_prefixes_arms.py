"""The arms of `steer.experiments.soft_prefixes`: ways to use what somebody wrote earlier when they write again.

An arm turns a history and a record into a `Row`: the record's response, the same tokens in every arm, behind a prompt
and under edits. The rest is done alike for all of them. With another user's history an arm uses that user's texts or
state.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from steer.cache import Cache, head_key, key_of, model_key
from steer.errors import SteerError
from steer.experiments import retrieval
from steer.experiments.soft_prefixes_data import User, before, cut
from steer.history import History, Record
from steer.inject import Edit, KeyValueEdit, PrefixEdit
from steer.inject.prompts import with_prompts
from steer.likelihood import response_losses
from steer.method import Method, make_method
from steer.methods.embedded_texts import EmbeddedTexts
from steer.plan import edits_of
from steer.read import Span, require_room
from steer.state import Artifact, Provenance, UserState
from steer.text_encoder import TextEncoder
from steer.train import load_artifact, method_of

if TYPE_CHECKING:
    from jaxtyping import Float

    from steer.model import FrozenLM, Prompt


# The arm that others are compared with.
BASE = "none"


@dataclass(frozen=True)
class Row:
    """A response behind a prompt, under edits of one row.

    Attributes:
        span: the tokens, and which of them are the response's.
        edits: what else personalizes the row.
        state: tells the edits from others.
    """

    span: Span
    edits: Sequence[Edit] = ()
    state: str = ""

    @property
    def prompt_tokens(self) -> int:
        """All that stands before the response, soft tokens, keys and values too."""
        soft = sum(int(edit.added.sum()) for edit in self.edits if isinstance(edit, PrefixEdit | KeyValueEdit))
        return self.span.start + soft


@dataclass(frozen=True)
class Score:
    """−log p of a response in nats, summed over its tokens, and the tokens before it."""

    nats: float
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class Cost:
    """What a user costs: bytes that are stored, and seconds to make them when they were made."""

    nbytes: int = 0
    seconds: float = 0.0


class Arm(ABC):
    """One way to use what somebody wrote earlier.

    Attributes:
        personal: whether it makes a difference whose history it is.
    """

    personal = True

    @abstractmethod
    def row(self, lm: FrozenLM, history: History, record: Record) -> Row:
        """The record's response as this arm has it scored."""

    def cost(self, lm: FrozenLM, history: History) -> Cost:
        """Of the history's user."""
        return Cost()

    def settings(self) -> dict[str, Any]:
        """All that the arm's results depend on, beside the model and the texts; JSON."""
        return {}


@torch.no_grad()
def score(lm: FrozenLM, arm: Arm, history: History, record: Record, cache: Cache) -> Score:
    """How likely a record's response is; kept by its tokens and what stands before them."""
    row = arm.row(lm, history, record)
    span = row.span
    key = key_of(model_key(lm), head_key(lm), "nats", 1, list(span.ids), span.start, row.state)
    found = cache.get([key])
    if key not in found:
        sums, _ = response_losses(lm, [span], row.edits)
        found = {key: json.dumps(sums.item()).encode()}
        cache.put(found)
    return Score(json.loads(found[key]), span.end - span.start, row.prompt_tokens)


def span_behind(lm: FrozenLM, record: Record, prompt: Prompt | None = None) -> Span:
    """A record's response behind a prompt, by default its own. Raises SteerError if the model's window is too small."""
    assert lm.tokenizer is not None and record.prompt is not None
    head = lm.encode(record.prompt if prompt is None else prompt)
    ids = head + lm.tokenizer(record.response, add_special_tokens=False).input_ids
    require_room(lm, len(ids), f"record {record.id!r} of {record.user_id!r} has with its prompt", remedy="show less")
    return Span(ids, len(head), len(ids), record.prompt)


class Nothing(Arm):
    """The frozen model with the record's prompt."""

    personal = False

    def row(self, lm: FrozenLM, history: History, record: Record) -> Row:
        return Row(span_behind(lm, record))


@dataclass
class Shown(Arm):
    """Earlier texts in the prompt.

    Attributes:
        ranker: says which ones.
        count: how many.
        tokens: of each text at most.
        turns: whether they are shown as a dialogue, and not in one message.
    """

    ranker: retrieval.Ranker
    count: int
    tokens: int
    turns: bool = False

    def row(self, lm: FrozenLM, history: History, record: Record) -> Row:
        assert record.prompt is not None
        texts = retrieval.chosen(self.ranker, before(history, record), record, self.count)
        if self.turns:
            pairs = [(cut(lm, own.prompt or "", self.tokens), cut(lm, own.response, self.tokens)) for own in texts]
            return Row(span_behind(lm, record, retrieval.with_turns(record.prompt, pairs)))
        shown = [cut(lm, own.fields["text"], self.tokens) for own in texts]
        return Row(span_behind(lm, record, retrieval.with_texts(record.prompt, shown) if shown else None))

    def cost(self, lm: FrozenLM, history: History) -> Cost:
        kept = history.records[-self.count :] if self.ranker is retrieval.newest else history.records
        nbytes = sum(len(retrieval.document_of(own).encode()) for own in kept)
        if isinstance(self.ranker, Dense):
            embeddings, seconds = self.ranker.embeddings(history)
            return Cost(nbytes + embeddings.nbytes, seconds)
        start = time.perf_counter()
        if isinstance(self.ranker, retrieval.BM25):
            self.ranker.index(history)
        return Cost(nbytes, time.perf_counter() - start)

    def settings(self) -> dict[str, Any]:
        form = retrieval.with_turns("{prompt}", [("{asked}", "{text}")]) if self.turns else None
        form = form or retrieval.with_texts("{prompt}", ["{text}"])
        return {"count": self.count, "tokens": self.tokens, "form": form}


@dataclass
class Dense:
    """Ranks by the similarity of embeddings, which are kept."""

    encoder: TextEncoder
    cache: Cache
    _known: dict[History, tuple[Float[Tensor, "record d"], float]] = field(default_factory=dict)

    def __call__(self, history: History, record: Record) -> Sequence[float]:
        return (self.embeddings(history)[0] @ self.encoder.encode([retrieval.query_of(record)])[0]).tolist()

    def embeddings(self, history: History) -> tuple[Float[Tensor, "record d"], float]:
        """Of a user's texts, and the seconds that they took."""
        if history not in self._known:
            texts = [retrieval.document_of(own) for own in history]

            def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
                return {"embeddings": self.encoder.encode(texts)}, {}

            tensors, about = _kept(self.cache, key_of("embeddings", 1, self.encoder.identity, texts), make)
            self._known[history] = tensors["embeddings"], about["seconds"]
        return self._known[history]


def _kept(
    cache: Cache, key: str, make: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON that were made before, with the seconds that it took then; else they are made, and kept."""
    names = [key, f"{key} about"]
    found = cache.get(names)
    if len(found) < len(names):
        start = time.perf_counter()
        tensors, about = make()
        timed = {"seconds": time.perf_counter() - start, **about}
        values = [save({name: tensor.contiguous() for name, tensor in tensors.items()}), json.dumps(timed).encode()]
        found = dict(zip(names, values, strict=True))
        cache.put(found)
    return load(found[names[0]]), json.loads(found[names[1]])


@dataclass
class Fitted(Arm):
    """A state that a method fits on the newest of a user's earlier records.

    Attributes:
        method: its name.
        hyper_parameters: of the method.
        trained_on: users whose earlier records its shared part is trained on here, if it has one.
        cache: where states and the shared part are kept.
        records: how many are fitted on.
        dose: of vectors; their own strength if None.
        trained: the shared part, if it was trained elsewhere.
    """

    method: str
    hyper_parameters: Mapping[str, Any]
    trained_on: Sequence[User]
    cache: Cache
    records: int
    dose: float | None = None
    trained: Artifact | None = None
    _artifact: list[Artifact | None] = field(default_factory=list)
    _states: dict[History, tuple[UserState, str, float]] = field(default_factory=dict)

    def row(self, lm: FrozenLM, history: History, record: Record) -> Row:
        state, key, _ = self.state(lm, before(history, record))
        artifact = self.artifact(lm)
        shared = {} if artifact is None else {artifact.hash: artifact}
        edits = edits_of(lm, [{"state": state}], artifacts=shared, dose=self.dose)
        span = span_behind(lm, record)
        return Row(span, with_prompts(edits, [span.prompt or ""]), f"{key} {self.dose}")

    def cost(self, lm: FrozenLM, history: History) -> Cost:
        state, _, seconds = self.state(lm, history)
        return Cost(state.nbytes, seconds)

    def settings(self) -> dict[str, Any]:
        method = make_method(self.method, **self.hyper_parameters)
        own = _settings_of(method) | {
            "method": self.method,
            "version": method.version,
            "records": self.records,
            "dose": self.dose,
        }
        if self.trained is not None:
            own["artifact"] = self.trained.hash
        return json.loads(json.dumps(own, default=str))

    def artifact(self, lm: FrozenLM) -> Artifact | None:
        """What the method shares between users; trained once."""
        if self.trained is not None:
            return self.trained
        if not self._artifact:
            histories = [self._newest(user.earlier) for user in self.trained_on]

            def make() -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
                made = self._method().train(lm, histories)
                if made is None:
                    return {}, {}
                return made.tensors, {"shared": {"version": made.version, "settings": made.settings}}

            tensors, about = _kept(self.cache, key_of(self._key(lm), "artifact", repr(histories)), make)
            shared = about.get("shared")
            self._artifact = [shared and Artifact(self.method, model=lm.fingerprint, tensors=tensors, **shared)]
        return self._artifact[0]

    def state(self, lm: FrozenLM, history: History) -> tuple[UserState, str, float]:
        """A user's state, what tells it from others, and the seconds that it took to fit."""
        history = self._newest(history)
        if history not in self._states:
            artifact, method = self.artifact(lm), self._method()
            if artifact is not None:
                method.use(lm, artifact)

            def make() -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
                with _embedding_anew(lm, method):
                    made = method.fit(lm, history)
                return made.tensors, {"provenance": made.provenance.to_json(), "data": made.data}

            key = key_of(self._key(lm), "state", None if artifact is None else artifact.hash, repr(history))
            tensors, about = _kept(self.cache, key, make)
            state = UserState(Provenance.from_json(about["provenance"]), tensors, about["data"])
            self._states[history] = state, key, about["seconds"]
        return self._states[history]

    def _newest(self, history: History) -> History:
        return history.split(limit=self.records)[0]

    def _method(self) -> Method:
        return make_method(self.method, **self.hyper_parameters)

    def _key(self, lm: FrozenLM) -> str:
        own = {name: value for name, value in self.settings().items() if name != "dose"}
        return key_of(model_key(lm), head_key(lm), own)


@dataclass
class Together(Arm):
    """Several states of a user at once."""

    parts: Sequence[Fitted]

    def row(self, lm: FrozenLM, history: History, record: Record) -> Row:
        rows = [part.row(lm, history, record) for part in self.parts]
        return Row(rows[0].span, [edit for row in rows for edit in row.edits], " + ".join(row.state for row in rows))

    def cost(self, lm: FrozenLM, history: History) -> Cost:
        costs = [part.cost(lm, history) for part in self.parts]
        return Cost(sum(cost.nbytes for cost in costs), sum(cost.seconds for cost in costs))

    def settings(self) -> dict[str, Any]:
        return {"together": [part.settings() for part in self.parts]}


@contextmanager
def _embedding_anew(lm: FrozenLM, method: Method) -> Iterator[None]:
    """What a user costs is timed in here, and not a look at what training has embedded."""
    encoder = method.text_encoder(lm) if isinstance(method, EmbeddedTexts) else None
    kept = None if encoder is None else encoder.cache
    try:
        if encoder is not None:
            encoder.cache = None
        yield
    finally:
        if encoder is not None:
            encoder.cache = kept


def arms(lm: FrozenLM, users: Sequence[User], cache: Cache, *, tokens: int, records: int) -> dict[str, Arm]:
    """All arms by name.

    Args:
        lm: the model.
        users: of whom the known ones are trained on.
        cache: where embeddings and states are kept.
        tokens: of an earlier text in a prompt.
        records: of a user that states are fitted on, the newest of the earlier ones.
    """
    known = [user for user in users if user.known]
    low, high = (round(depth * lm.n_layers) for depth in (0.27, 0.77))

    def fitted(method: str, dose: float | None = None, **hyper_parameters: Any) -> Fitted:
        return Fitted(method, hyper_parameters, known, cache, records, dose)

    bm25, dense = retrieval.BM25(), Dense(TextEncoder(cache=None), cache)
    rankers: dict[str, retrieval.Ranker] = {
        "random": retrieval.drawn,
        "newest": retrieval.newest,
        "BM25": bm25,
        "dense": dense,
    }
    return {
        BASE: Nothing(),
        **{f"{name} {count}": Shown(ranker, count, tokens) for name, ranker in rankers.items() for count in (1, 2, 4)},
        "BM25 4, turns": Shown(bm25, 4, tokens, turns=True),
        # The doses are those that did best in `steer.experiments.personal`.
        "style vector, 0.05": fitted("style_vector", 0.05, layer=high),
        "style vector, 0.1": fitted("style_vector", 0.1, layer=high),
        "natural gradient": fitted("natural_gradient"),
        "trained vector": fitted("trained_vector", layer=[low, high], shared_steps=24, steps=12, batch=4),
        "prefix tuning": fitted("prefix_tuning", batch=4),
        "prefix tuning, shared": fitted("prefix_tuning", length=2, shared_steps=60, steps=15, batch=4, holdout=0.25),
    }


def trained_arms(
    lm: FrozenLM, folders: Mapping[str, str | Path], users: Sequence[User], cache: Cache, records: int
) -> dict[str, Arm]:
    """Arms whose shared part was trained before, by name and folder."""
    found: dict[str, Arm] = {}
    for name, folder in folders.items():
        artifact = load_artifact(folder)
        method = method_of(lm, artifact)
        found[name] = Fitted(artifact.method, _settings_of(method), users, cache, records, trained=artifact)
    return found


def chosen_arms(every: Mapping[str, Arm], names: Sequence[str]) -> dict[str, Arm]:
    """Arms by name; names of states with a plus between them are these states together.

    Raises:
        SteerError: there is no such arm, or one of several is not a state.
    """
    found = {}
    for name in names:
        parts = [name] if name in every else name.split(" + ")
        if unknown := [part for part in parts if part not in every]:
            raise SteerError(f"there is no arm {unknown[0]!r}; there are {', '.join(every)}")
        arms = [every[part] for part in parts]
        fitted = [arm for arm in arms if isinstance(arm, Fitted)]
        if len(arms) > 1 and len(fitted) < len(arms):
            raise SteerError(f"{name!r} is not several states; texts in a prompt are no state")
        found[name] = arms[0] if len(arms) == 1 else Together(fitted)
    return found


def _settings_of(method: Method) -> dict[str, Any]:
    """What its constructor was given."""
    return {f.name: getattr(method, f.name) for f in fields(method) if f.init}  # type: ignore[arg-type]

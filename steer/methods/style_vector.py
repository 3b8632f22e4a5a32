"""StyleVector: how a person writes, as one direction in the residual stream.

Zhang et al., "Personalized Text Generation with Contrastive Activation Steering", ACL 2025, arXiv 2503.05213:

    s_l = 1/n · Σ_i ( h_l(x_i ⊕ y_i) − h_l(x_i ⊕ ŷ_i) )                h'_l(x)_t = h_l(x)_t + α · s_l

where y_i is what the user wrote to prompt x_i, ŷ_i what anybody might have written, and h_l the residual stream after
block l. A positive α steers towards the user. (A survey prints the difference the other way round.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from steer.errors import SteerError
from steer.history import History, Record
from steer.inject import Edit, ResidualEdit
from steer.inject.residual import Positions
from steer.method import Method
from steer.read import Pool, Reading, read, record_span, response_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState

if TYPE_CHECKING:
    from steer.model import FrozenLM

_ANSWERS_AT_ONCE = 32
_NEUTRAL = "model, population, field:NAME or file:PATH"


@dataclass
class StyleVector(Method):
    """Mean difference between a user's responses and neutral ones.

    Args:
        layer: after which block, or blocks, to read and to add. The paper finds mid to late layers best.
        neutral: the other side of the difference. "model": the frozen model's own greedy answers to the same prompts
            (the paper's choice, with the model in place of GPT-3.5). "population": the mean over all users, from
            `train`. "field:NAME": a key of the records. "file:PATH": JSONL lines with `id` and `response`.
        pool: the "last" token of a text (the paper), or the "mean" over the response.
        positions: from which position on to add; `response` also steers the first new token, the paper's t ≥ |x| is
            "generated".
        neutral_tokens: length of the frozen model's own answers.
    """

    name: ClassVar[str] = "style_vector"

    layer: int | Sequence[int]
    neutral: str = "model"
    pool: Pool = "mean"
    positions: Positions = "response"
    neutral_tokens: int = 96
    # What `train` has read of each history, so that `fit` need not read it again.
    _known: dict[tuple[FrozenLM, History], dict[Site, Reading]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        kind, _, argument = self.neutral.partition(":")
        if kind not in ("model", "population", "field", "file") or (kind in ("field", "file")) != bool(argument):
            raise SteerError(f"neutral={self.neutral!r} is none of {_NEUTRAL}")

    @property
    def sites(self) -> list[Site]:
        """Where the vectors are read and added."""
        layers = [self.layer] if isinstance(self.layer, int) else self.layer
        return [Site("resid_post", layer) for layer in layers]

    @property
    def population(self) -> dict[Site, torch.Tensor]:
        """The mean over all users, `[d]` at each site. Raises SteerError before `train` or `use`."""
        if self.artifact is None:
            raise SteerError("neutral='population' needs the population's mean: call train(lm, histories) first")
        if missing := [site for site in self.sites if str(site) not in self.artifact.tensors]:
            raise SteerError(f"the population was not read at {missing[0]}; train again")
        return {site: self.artifact.tensors[str(site)] for site in self.sites}

    def train(self, lm: FrozenLM, histories: Iterable[History]) -> Artifact | None:
        """Reads the population mean (each user counts once), which "population" needs; else does nothing.

        Raises:
            SteerError: there are fewer than two users.
        """
        if self.neutral != "population":
            return None
        means: dict[Site, list[torch.Tensor]] = {site: [] for site in self.sites}
        for history in histories:
            self._known[lm, history] = self._read(lm, history)
            for site, reading in self._known[lm, history].items():
                means[site].append(reading.mean)
        users = len(next(iter(means.values())))
        if users < 2:
            raise SteerError(f"neutral='population' compares users with one another, and there is {users}; use 'model'")
        self.artifact = Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            tensors={str(site): torch.stack(rows).mean(0) for site, rows in means.items()},
            settings={"pool": self.pool, "users": users},
        )
        return self.artifact

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """Reads one user's vectors, one for each layer.

        Raises:
            SteerError: the history is empty, or the neutral side is missing for some record.
        """
        if not len(history):
            raise SteerError(f"{history.user_id!r} has no records to read a style from")
        own = self._known.pop((lm, history), None) or self._read(lm, history)
        neutral = self._neutral_means(lm, history)
        settings = {"neutral": self.neutral, "pool": self.pool, "positions": self.positions}
        if self.artifact is not None:
            settings["population"] = self.artifact.hash
        return UserState(
            provenance=Provenance(
                method=self.name,
                version=self.version,
                model=lm.fingerprint,
                sites=tuple(str(site) for site in self.sites),
                records=tuple(record.id for record in history),
                settings=settings,
                calibration={"reference_norm": {str(site): own[site].norm for site in self.sites}},
            ),
            tensors={str(site): own[site].mean - neutral[site] for site in self.sites},
        )

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One residual edit for each layer."""
        return [_edit(Site.parse(site), states, like) for site in like.provenance.sites]

    def _neutral_means(self, lm: FrozenLM, history: History) -> dict[Site, torch.Tensor]:
        if self.neutral == "population":
            if self.artifact is not None:
                self._require_model(lm, self.artifact)
            return self.population
        texts = self._neutral_texts(lm, history)
        spans = [response_span(lm, text, record.prompt) for text, record in zip(texts, history, strict=True)]
        return {site: reading.mean for site, reading in read(lm, spans, self.sites, pool=self.pool).items()}

    def _read(self, lm: FrozenLM, history: History) -> dict[Site, Reading]:
        return read(lm, [record_span(lm, record) for record in history], self.sites, pool=self.pool)

    def _neutral_texts(self, lm: FrozenLM, history: History) -> list[str]:
        if self.neutral == "model":
            return _own_answers(lm, history, self.neutral_tokens)
        kind, _, argument = self.neutral.partition(":")
        if kind == "field":
            return [_field(record, argument) for record in history]
        answers = _read_answers(Path(argument))
        missing = [record.id for record in history if record.id not in answers]
        if missing:
            raise SteerError(f"{argument} has no response for record {missing[0]!r} of {history.user_id!r}")
        return [answers[record.id] for record in history]


def _edit(site: Site, states: Sequence[UserState | None], like: UserState) -> ResidualEdit:
    zero = torch.zeros(like.tensors[str(site)].shape[-1])
    norms = [
        float("nan") if state is None else state.provenance.calibration["reference_norm"][str(site)] for state in states
    ]
    return ResidualEdit(
        site=site,
        vectors=torch.stack([zero if state is None else state.tensors[str(site)].float() for state in states]),
        positions=like.provenance.settings["positions"],
        reference_norms=torch.tensor(norms),
    )


def _own_answers(lm: FrozenLM, history: History, tokens: int) -> list[str]:
    prompts = [record.prompt for record in history]
    if None in prompts:
        raise SteerError(
            f"neutral='model' lets the model answer the prompts of {history.user_id!r}, and some records have none; "
            "give an instruction, or use neutral='population'"
        )
    answers = [
        answer
        for start in range(0, len(prompts), _ANSWERS_AT_ONCE)
        for answer in lm.generate(
            [prompt for prompt in prompts[start : start + _ANSWERS_AT_ONCE] if prompt is not None],
            max_new_tokens=tokens,
            do_sample=False,
        )
    ]
    empty = next((p for p, answer in zip(prompts, answers, strict=True) if not answer.strip()), None)
    if empty is not None:
        raise SteerError(f"the model answers nothing to {empty[:60]!r}; use another neutral side: {_NEUTRAL}")
    return answers


def _field(record: Record, name: str) -> str:
    value = record.fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise SteerError(f"record {record.id!r} of {record.user_id!r} has no text in {name!r}")
    return value


def _read_answers(path: Path) -> dict[str, str]:
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {str(entry["id"]): str(entry["response"]) for entry in entries}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise SteerError(f"{path}: expected JSONL lines with `id` and `response` ({error})") from None

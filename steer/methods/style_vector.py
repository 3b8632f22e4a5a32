"""StyleVector: how a person writes, as one direction in the residual stream.

Zhang et al., "Personalized Text Generation with Contrastive Activation Steering", ACL 2025, arXiv 2503.05213:

    s_l = 1/n · Σ_i ( h_l(x_i ⊕ y_i) − h_l(x_i ⊕ ŷ_i) )                h'_l(x)_t = h_l(x)_t + α · s_l

where y_i is what the user wrote to prompt x_i, ŷ_i what anybody might have written, and h_l the residual stream after
block l. A positive α steers towards the user. (A survey prints the difference the other way round.) The paper's two
other extractors take, in place of the mean of the differences, the normal of a logistic regression between the two
sides, or the first principal axis of the differences, uncentred.
"""

from __future__ import annotations

import heapq
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch

from steer.cache import Cache, key_of
from steer.encoders import Moments, logistic_direction, principal_direction
from steer.errors import SteerError
from steer.history import History, Record
from steer.inject import Edit
from steer.inject.positions import Positions, require_positions
from steer.method import Method
from steer.methods.vectors import ids_left, ids_of_new, layer_sites, require_equal, vector_edits
from steer.neutral import NEUTRAL, Neutral
from steer.read import Pool, Reading, read, record_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM

Extractor = Literal["mean", "logistic", "pca"]

# Records that are read together, of however many users.
_TOGETHER = 256
# Texts of all users that logistic regression holds one user's against.
_SAMPLE = 256


@dataclass
class StyleVector(Method):
    """The direction from neutral responses to a user's own.

    Args:
        layer: after which block, or blocks, to read and to add. The paper finds mid to late layers best.
        neutral: the other side of the difference. "model": the frozen model's own greedy answers to the same prompts
            (the paper's choice, with the model in place of GPT-3.5). "population": the mean over all users, from
            `train`. "field:NAME": a key of the records. "file:PATH": JSONL lines with `id` and `response`.
        pool: the "last" token of a text (the paper), or the "mean" over the response.
        positions: from which position on to add; `response` also steers the first new token, the paper's t ≥ |x| is
            "generated".
        neutral_tokens: length of the frozen model's own answers.
        extractor: "mean" of the differences, "logistic" regression between the sides (against the population: between
            the user's texts and a sample of all other users'), or "pca", the first axis of the differences, towards
            their mean.
        sites: further places to read and to add, such as "attn_out[3]"; once made, a method has all of its places here,
            so `replace(method, layer=12, sites=())` moves it.
        rescale: whether "logistic" and "pca" get the norm of the mean difference, so that one strength means the same
            for all three; otherwise they are unit vectors, as in the paper.

    Raises:
        SteerError: no site, or an unknown choice.
    """

    name: ClassVar[str] = "style_vector"

    layer: int | Sequence[int] = ()
    neutral: str = "model"
    pool: Pool = "mean"
    positions: Positions = "response"
    neutral_tokens: int = 96
    extractor: Extractor = "mean"
    sites: Sequence[Site | str] = ()
    rescale: bool = True
    # What `train` has read of each history, so that `fit` need not read it again.
    _known: dict[tuple[FrozenLM, History], _Summary] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        Neutral(self.neutral, self.neutral_tokens)
        require_positions(self.positions)
        for name, choices in (("pool", Pool), ("extractor", Extractor)):
            if (chosen := getattr(self, name)) not in get_args(choices):
                raise SteerError(f"{name}={chosen!r} is not one of {', '.join(get_args(choices))}")
        if self.extractor == "logistic" and find_spec("sklearn") is None:
            raise SteerError("extractor='logistic' needs scikit-learn: pip install 'steer-toolkit[extract]'")
        layers = [] if isinstance(self.layer, Sequence) and not self.layer else layer_sites(self.layer)
        sites = layers + [Site.parse(site).canonical() for site in self.sites]
        if not sites:
            raise SteerError("say where to read and to add: layer=14, or sites=['attn_out[3]']")
        self.sites = tuple(dict.fromkeys(sites))

    @classmethod
    def paper(cls, layer: int | Sequence[int], **settings: Any) -> StyleVector:
        """The paper's recipe: last token, mean difference to a model's answers, added from the first new token on."""
        recipe: dict[str, Any] = {"neutral": "model", "pool": "last", "extractor": "mean", "positions": "generated"}
        return cls(layer=layer, **(recipe | settings))

    @property
    def population(self) -> dict[Site, Float[Tensor, " d"]]:
        """The mean over all users at each site. Raises SteerError before `train` or `use`."""
        return self._shared("")

    def train(
        self,
        lm: FrozenLM,
        histories: Iterable[History],
        on_progress: Callable[[float], None] | None = None,
        *,
        cache: Cache | None = None,
    ) -> Artifact | None:
        """Reads the population mean (each user counts once), which "population" needs; else does nothing.

        For "logistic" the artifact also holds states of single texts, 256 at most. Each user's share of them is the
        same as far as their texts reach. A hash of each one's user is stored, so that nobody is held against their own.

        Args:
            lm: the model.
            histories: one for each user.
            on_progress: told from time to time what share of the texts is read.
            cache: texts that were read before are taken from here, and new ones go here.

        Raises:
            SteerError: there are fewer than two users.
        """
        if self.neutral != "population":
            return None
        histories = list(histories)
        users = len(histories)
        if users < 2:
            raise SteerError(f"neutral='population' compares users with one another, and there is {users}; use 'model'")
        population: dict[Site, Moments] = {}
        sample: list[tuple[float, str, Mapping[Site, Tensor]]] = []
        for history, summary in zip(histories, self._summaries(lm, histories, on_progress, cache), strict=True):
            if self.extractor == "mean":
                self._known[lm, history] = summary
            for site, moments in summary.differences.items():
                user = Moments.of(moments.mean[None])
                population[site] = population[site] + user if site in population else user
            if self.extractor == "logistic":
                sample = heapq.nlargest(_SAMPLE, [*sample, *_drawn(history, summary)], key=operator.itemgetter(0))
        tensors = {str(site): moments.mean.float() for site, moments in population.items()}
        settings: dict[str, Any] = {"pool": self.pool, "users": users}
        if sample:
            tensors |= {f"{site}.sample": torch.stack([rows[site] for _, _, rows in sample]) for site in self._sites}
            settings["sample"] = [who for _, who, _ in sample]
        self.artifact = Artifact(
            method=self.name, version=self.version, model=lm.fingerprint, tensors=tensors, settings=settings
        )
        return self.artifact

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """Reads one user's vectors, one for each site.

        Raises:
            SteerError: the history is empty, or the neutral side is missing.
        """
        return self.fit_many(lm, [history])[0]

    def fit_many(
        self,
        lm: FrozenLM,
        histories: Sequence[History],
        on_progress: Callable[[float], None] | None = None,
        *,
        cache: Cache | None = None,
    ) -> list[UserState]:
        """Reads many users' vectors, with texts of several users in a batch; each is what `fit` gives, to rounding.

        Args:
            lm: the model.
            histories: one for each user.
            on_progress: told from time to time what share of the texts is read.
            cache: texts that were read before are taken from here, and new ones go here.
        """
        if self.neutral == "population":
            self._require_population(lm)
        known = {i: self._known.pop((lm, h)) for i, h in enumerate(histories) if (lm, h) in self._known}
        missing = [history for i, history in enumerate(histories) if i not in known]
        new = self._summaries(lm, missing, on_progress, cache)
        return [self._state(lm, history, known[i] if i in known else next(new)) for i, history in enumerate(histories)]

    def update(self, lm: FrozenLM, state: UserState, new_records: Sequence[Record]) -> UserState:
        """The state of a user who has written more, at the cost of reading only that: what `fit` gives for all of it.

        Raises:
            SteerError: a record is in the state already, the state is not of this method with these settings, or the
                extractor is not "mean".
        """
        self._require_own(lm, state)
        ids_of_new(new_records, {*state.provenance.records, *_left_out(state)})
        tensors, norms, read_now = self._combined(lm, state, new_records, operator.add)
        records = (*state.provenance.records, *read_now.records)
        calibration = _calibration(norms, (*_left_out(state), *read_now.left_out))
        return UserState(replace(state.provenance, records=records, calibration=calibration), tensors)

    def remove(self, lm: FrozenLM, state: UserState, old_records: Sequence[Record]) -> UserState:
        """The state as if some of its records had never been there, at the cost of reading these once more.

        A population's mean stays as it is, with the user's texts among all others'; call `train` again to change that.

        Raises:
            SteerError: a record is not in the state, or none would be left; else as for `update`.
        """
        self._require_own(lm, state)
        ids, left_out = {record.id for record in old_records}, _left_out(state)
        records = ids_left(state.provenance.records, old_records, left_out)
        counted = {record.id: record for record in old_records if record.id not in left_out}
        tensors, norms, read_now = self._combined(lm, state, list(counted.values()), operator.sub)
        if read_now.left_out:
            raise SteerError(f"the model no longer answers the prompt of record {read_now.left_out[0]!r}; fit again")
        calibration = _calibration(norms, [id for id in left_out if id not in ids])
        return UserState(replace(state.provenance, records=records, calibration=calibration), tensors)

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One residual edit for each site."""
        return vector_edits(states, like)

    @property
    def _sites(self) -> list[Site]:
        return [Site.parse(site) for site in self.sites]

    @property
    def _settings(self) -> dict[str, Any]:
        settings = {key: getattr(self, key) for key in ("neutral", "pool", "positions", "extractor")}
        if self.extractor != "mean":
            settings["rescale"] = self.rescale
        if self.neutral == "model":
            settings["neutral_tokens"] = self.neutral_tokens
        if self.neutral == "population" and self.artifact is not None:
            settings["population"] = self.artifact.hash
        return settings

    def _shared(self, part: str) -> dict[Site, Tensor]:
        if self.artifact is None:
            raise SteerError("neutral='population' needs the population's mean: call train(lm, histories) first")
        if missing := [site for site in self._sites if f"{site}{part}" not in self.artifact.tensors]:
            raise SteerError(f"the population has no {missing[0]}{part}; train again")
        return {site: self.artifact.tensors[f"{site}{part}"] for site in self._sites}

    def _state(self, lm: FrozenLM, history: History, summary: _Summary) -> UserState:
        if not summary.records:
            raise SteerError(
                f"the model answers nothing to any prompt of {history.user_id!r}; use another neutral side: {NEUTRAL}"
            )
        norms = {str(site): summary.norms[site].mean.item() for site in self._sites}
        return UserState(
            provenance=Provenance(
                method=self.name,
                version=self.version,
                model=lm.fingerprint,
                sites=tuple(str(site) for site in self._sites),
                records=summary.records,
                settings=self._settings,
                calibration=_calibration(norms, summary.left_out),
            ),
            tensors={str(site): self._vector(site, history, summary).float() for site in self._sites},
        )

    def _vector(self, site: Site, history: History, summary: _Summary) -> Tensor:
        against_all = self.neutral == "population"
        centre = self.population[site].double() if against_all else 0.0
        mean = summary.differences[site].mean - centre
        if self.extractor == "mean":
            return mean
        own, *neutral = summary.rows[site]
        if self.extractor == "pca":
            unit = principal_direction(own.double() - (neutral[0].double() if neutral else centre))
        else:
            unit = logistic_direction(own, neutral[0] if neutral else self._others(site, history.user_id))
        return unit * mean.norm() if self.rescale else unit

    def _others(self, site: Site, user: str) -> Tensor:
        """States of other users' texts."""
        assert self.artifact is not None
        sample, whose = self._shared(".sample")[site], self.artifact.settings["sample"]
        others = [i for i, who in enumerate(whose) if who != _hash(user)]
        if not others:
            raise SteerError(f"the sample of the population has no texts but those of {user!r}; train with more users")
        return sample[others]

    def _summaries(
        self,
        lm: FrozenLM,
        histories: Sequence[History],
        on_progress: Callable[[float], None] | None,
        cache: Cache | None,
    ) -> Iterator[_Summary]:
        """What is read of each user, in order."""
        if empty := [history for history in histories if not len(history)]:
            raise SteerError(f"{empty[0].user_id!r} has no records to read a style from")
        records = [(user, record) for user, history in enumerate(histories) for record in history]
        neutral = Neutral(self.neutral, self.neutral_tokens)
        neutral.require([record for _, record in records])
        # A site that the model does not have is reported before it answers any prompt.
        lm.declare(*self._sites)

        def parts() -> Iterator[tuple[int, _Summary]]:
            for start in range(0, len(records), _TOGETHER):
                yield from self._read(lm, records[start : start + _TOGETHER], neutral, cache)
                if on_progress is not None:
                    on_progress(min(start + _TOGETHER, len(records)) / len(records))

        for _, own in groupby(parts(), key=operator.itemgetter(0)):
            yield reduce(operator.add, (part for _, part in own))

    def _read(
        self, lm: FrozenLM, records: Sequence[tuple[int, Record]], neutral: Neutral, cache: Cache | None
    ) -> Iterator[tuple[int, _Summary]]:
        """Reads some users' records, both sides at once, as these share their prompts; a summary for each user."""
        paired = neutral.kind != "population"
        texts = neutral.texts(lm, [record for _, record in records]) if paired else [None] * len(records)
        used = [i for i, text in enumerate(texts) if text is not None or not paired]
        if len(used) < len(records):
            warnings.warn(
                f"the model answers nothing to {len(records) - len(used)} of {len(records)} prompts; their records are "
                "left out",
                stacklevel=2,
            )
        spans = [record_span(lm, records[i][1]) for i in used]
        if paired:
            spans += [record_span(lm, replace(records[i][1], response=texts[i] or "")) for i in used]
        readings = read(lm, spans, self._sites, pool=self.pool, cache=cache) if spans else {}
        row_of = {i: row for row, i in enumerate(used)}
        for user, group in groupby(range(len(records)), key=lambda i: records[i][0]):
            indices = list(group)
            rows = [row_of[i] for i in indices if i in row_of]
            sides = [rows, [len(used) + row for row in rows]] if paired else [rows]
            yield (
                user,
                _Summary(
                    records=tuple(records[i][1].id for i in indices if i in row_of),
                    left_out=tuple(records[i][1].id for i in indices if i not in row_of),
                    differences={site: _differences(reading, sides) for site, reading in readings.items() if rows},
                    norms={site: Moments.of(reading.norms[rows]) for site, reading in readings.items() if rows},
                    rows={site: [reading.pooled[side] for side in sides] for site, reading in readings.items()}
                    if self.extractor != "mean"
                    else {},
                ),
            )

    def _combined(
        self,
        lm: FrozenLM,
        state: UserState,
        records: Sequence[Record],
        combine: Callable[[Moments, Moments], Moments],
    ) -> tuple[dict[str, Tensor], dict[str, float], _Summary]:
        """A state's vectors and norms after some records were added or taken out, and what was read of these."""
        source = state.provenance
        if len({record.user_id for record in records}) > 1:
            raise SteerError("these records are of several users; a state is of one")
        norms = dict(source.calibration["reference_norm"])
        tensors, read_now = dict(state.tensors), _Summary()
        if records:
            (read_now,) = self._summaries(lm, [History(records[0].user_id, tuple(records))], None, None)
        for site, new in read_now.differences.items():
            name, count = str(site), len(source.records)
            if self.neutral == "population":
                new = Moments(new.count, new.mean - self.population[site].double())
            tensors[name] = combine(Moments(count, tensors[name].double()), new).mean.float()
            norm = Moments(count, torch.tensor(norms[name], dtype=torch.float64))
            norms[name] = combine(norm, read_now.norms[site]).mean.item()
        return tensors, norms, read_now

    def _require_own(self, lm: FrozenLM, state: UserState) -> None:
        """Raises SteerError unless the state is what `fit` of this very method could have given."""
        if self.extractor != "mean":
            raise SteerError(f"the extractor {self.extractor!r} weighs all records at once; fit again with all of them")
        if self.neutral == "population":
            self._require_population(lm)
        source = state.provenance
        # Where a vector is added plays no part in what it is.
        theirs = (source.method, source.model, source.sites, {**source.settings, "positions": self.positions})
        ours = (self.name, lm.fingerprint, tuple(str(site) for site in self._sites), self._settings)
        require_equal(theirs, ours)

    def _require_population(self, lm: FrozenLM) -> None:
        if self.artifact is not None:
            self._require_model(lm, self.artifact)
            if (pool := self.artifact.settings["pool"]) != self.pool:
                raise SteerError(f"the population was read with pool={pool!r}, and this is pool={self.pool!r}")
        for part in ("", ".sample") if self.extractor == "logistic" else ("",):
            self._shared(part)


@dataclass(frozen=True)
class _Summary:
    """What was read of some of a user's records, of those that count; `a + b` is of both.

    Attributes:
        records, left_out: ids of the records that count, and of those without a neutral side.
        differences: between own and neutral states; of the own ones alone against a population, whose mean comes last.
        norms: each text's median norm.
        rows: own and neutral states, a row a record, for extractors that need them all.
    """

    records: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    differences: Mapping[Site, Moments] = field(default_factory=dict)
    norms: Mapping[Site, Moments] = field(default_factory=dict)
    rows: Mapping[Site, Sequence[Tensor]] = field(default_factory=dict)

    def __add__(self, other: _Summary) -> _Summary:
        def both(one: Mapping[Site, Any], two: Mapping[Site, Any], add: Callable[[Any, Any], Any]) -> dict[Site, Any]:
            return {**one, **two} | {site: add(one[site], two[site]) for site in one if site in two}

        return _Summary(
            self.records + other.records,
            self.left_out + other.left_out,
            both(self.differences, other.differences, operator.add),
            both(self.norms, other.norms, operator.add),
            both(self.rows, other.rows, lambda one, two: [torch.cat(side) for side in zip(one, two, strict=True)]),
        )


def _differences(reading: Reading, sides: Sequence[Sequence[int]]) -> Moments:
    own, *other = [reading.pooled[side].double() for side in sides]
    return Moments.of(own - other[0] if other else own)


def _drawn(history: History, summary: _Summary) -> Iterator[tuple[float, str, dict[Site, Tensor]]]:
    """The user's texts with a random number each: the largest of all users' numbers make a sample.

    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006: with weights 1/n each user counts alike.
    The numbers come from a hash, so that the sample depends neither on the order nor on a generator.
    """
    for row, record in enumerate(summary.records):
        uniform = (int(_hash(history.user_id, record)[:13], 16) + 1) / 16**13
        states = {site: own[row].clone() for site, (own, *_) in summary.rows.items()}
        yield math.log(uniform) * len(summary.records), _hash(history.user_id), states


def _hash(*parts: str) -> str:
    return key_of(*parts)[:16]


def _left_out(state: UserState) -> tuple[str, ...]:
    return tuple(state.provenance.calibration.get("left_out", ()))


def _calibration(norms: Mapping[str, float], left_out: Sequence[str]) -> dict[str, Any]:
    return {"reference_norm": dict(norms)} | ({"left_out": list(left_out)} if left_out else {})

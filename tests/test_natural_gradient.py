"""One step of natural gradient: gradients, direction, and states that follow their users."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, tiny, tokenizer
from rows import assert_close
from torch import Tensor

import steer
from steer.cache import Cache
from steer.likelihood import response_gradients, response_losses
from steer.methods.natural_gradient import Fisher
from steer.read import record_span

SITES = [steer.Site("resid_post", 0), steer.Site("resid_post", 1)]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_slopes(arch: str, elsewhere: bool, histories: list[steer.History]) -> None:
    """By finite differences, of each text alone, in the direction of its gradient."""
    with steer.wrap(tiny(arch), tokenizer()) as lm:
        spans = [record_span(lm, record) for history in histories for record in history]
        generator = torch.Generator().manual_seed(0)
        at = {site: elsewhere * 0.5 * torch.randn(lm.width, generator=generator) for site in SITES}
        gradients, tokens = response_gradients(lm, spans, SITES, at=at if elsewhere else None, batch_tokens=120)
        assert tokens.tolist() == [span.end - span.start for span in spans]
        for site in SITES:
            for i in (0, 4):
                direction = gradients[site][i] / gradients[site][i].norm()

                def loss(length: float, i: int = i, site: steer.Site = site, direction: Tensor = direction) -> float:
                    vectors = at | {site: at[site] + length * direction}
                    edits = [steer.ResidualEdit(site, vector[None]) for site, vector in vectors.items()]
                    with torch.no_grad():
                        return response_losses(lm, [spans[i]], edits)[0].item()

                # Losses are float32, so the step cannot be smaller.
                slope = (loss(0.02) - loss(-0.02)) / 0.04
                assert slope == pytest.approx(gradients[site][i].norm().item(), rel=0.02)
                assert slope > 0.01


def test_the_model_gets_no_gradient(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    response_gradients(llama, [record_span(llama, record) for record in histories[0]], SITES)
    assert all(parameter.grad is None for parameter in llama.model.parameters())


@pytest.mark.parametrize(("texts", "width"), [(3, 7), (40, 7), (1, 5)])
def test_fisher_information_is_as_in_numpy(texts: int, width: int) -> None:
    rng = np.random.default_rng(texts)
    gradients, wanted = rng.normal(size=(texts, width)), rng.normal(size=width)
    tokens, damping = 11, 0.5
    plain = gradients.T @ gradients / tokens
    damped = plain + damping * np.trace(plain) / width * np.eye(width)
    fisher = Fisher.of(torch.tensor(gradients), tokens)
    wanted_ = torch.tensor(wanted)
    np.testing.assert_allclose(fisher.solve(wanted_, damping).numpy(), np.linalg.solve(damped, wanted), rtol=1e-9)
    np.testing.assert_allclose(fisher.times(wanted_, damping).numpy(), damped @ wanted, rtol=1e-9)


def test_vectors_are_what_the_equation_says(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = steer.NaturalGradient(layer=[0, 1], step=7.0, damping=2.0, prior=500.0, batch=3)
    artifact = method.train(llama, histories)
    state = method.fit(llama, histories[0])
    spans = [record_span(llama, record) for history in histories for record in history]
    common = {site: artifact.tensors[f"{site}.common"] for site in SITES}
    gradients, tokens = response_gradients(llama, spans, SITES, at=common)
    for site, weight in zip(SITES, (1 / 5**0.5, 2 / 5**0.5), strict=True):
        g, t, n = gradients[site].double().numpy(), tokens.double().numpy(), len(histories[0])
        fisher, mean = g.T @ g / t.sum(), g.sum(0) / t.sum()
        damping = (2 + 500 / t[:n].sum()) * np.trace(fisher) / len(fisher)
        own = g[:n].sum(0) / t[:n].sum() - mean
        step = np.linalg.solve(fisher + damping * np.eye(len(fisher)), own)
        expected = common[site].double() - torch.tensor(7 * weight * step)
        assert_close(state.tensors[str(site)].double(), expected)
    assert state.provenance.calibration["tokens"] == t[:n].sum()
    assert artifact.settings["tokens"] == t.sum()


@pytest.mark.parametrize("positions", ["response", "all"])
def test_what_all_have_in_common_is_a_trained_vector(
    llama: steer.FrozenLM, histories: list[steer.History], positions: Any
) -> None:
    """Six texts make three steps with two texts in each; `TrainedVector` makes as many as it is told."""
    settings: dict[str, Any] = {"layer": [0, 1], "learning_rate": 0.05, "batch": 2, "seed": 3, "positions": positions}
    artifact = steer.NaturalGradient(common_steps=50, **settings).train(llama, histories)
    trained = steer.TrainedVector(shared_steps=3, **settings).train(llama, histories)
    assert trained is not None
    for site in SITES:
        assert_close(artifact.tensors[f"{site}.common"], trained.tensors[str(site)])
        assert trained.tensors[str(site)].norm() > 0.1
    nothing = steer.NaturalGradient(common_steps=0, **settings).train(llama, histories)
    assert not any(nothing.tensors[f"{site}.common"].any() for site in SITES)


def test_many_texts_are_sampled(
    llama: steer.FrozenLM, histories: list[steer.History], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.methods.natural_gradient._SAMPLE", 4)
    method = steer.NaturalGradient(layer=1)
    artifact = method.train(llama, histories)
    assert artifact.settings["texts"] == 4
    again = steer.NaturalGradient(layer=1)
    again.use(llama, artifact)
    for history in histories:
        assert_close(
            method.fit(llama, history).tensors["resid_post[1]"], again.fit(llama, history).tensors["resid_post[1]"]
        )


def test_what_was_read_for_one_population_is_not_used_with_another(
    llama: steer.FrozenLM, histories: list[steer.History]
) -> None:
    settings: dict[str, Any] = {"layer": 1, "prior": 100.0, "learning_rate": 0.3}
    other = steer.NaturalGradient(**settings)
    artifact = other.train(llama, histories[1:])
    expected = other.fit(llama, histories[0]).tensors["resid_post[1]"]
    method = steer.NaturalGradient(**settings)
    method.train(llama, histories)
    method.use(llama, artifact)
    assert_close(method.fit(llama, histories[0]).tensors["resid_post[1]"], expected)
    method.train(llama, histories)
    method.train(llama, histories[1:])
    assert_close(method.fit(llama, histories[0]).tensors["resid_post[1]"], expected)


def test_progress_rises_to_the_end(llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path) -> None:
    cache = Cache(tmp_path / "gradients")
    for least in (4, 2):
        told: list[float] = []
        steer.NaturalGradient(layer=1, batch=2).train(llama, histories, told.append, cache=cache)
        assert told == sorted(told)
        assert len(told) >= least
        assert told[-1] == pytest.approx(1)


def test_a_cache_tells_trainings_apart(llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path) -> None:
    def same(lm: steer.FrozenLM, users: list[steer.History], **settings: Any) -> Tensor:
        one = steer.NaturalGradient(layer=1, **settings).train(lm, users, cache=Cache(tmp_path / "gradients"))
        other = steer.NaturalGradient(layer=1, **settings).train(lm, users)
        for name in ("common", "mean", "variances"):
            assert_close(one.tensors[f"resid_post[1].{name}"], other.tensors[f"resid_post[1].{name}"])
        return other.tensors["resid_post[1].mean"]

    means = [
        same(llama, histories),
        same(llama, histories, learning_rate=0.3),
        same(llama, histories, positions="all"),
        same(llama, histories, seed=1, batch=2),
        same(llama, histories[1:]),
    ]
    with steer.wrap(tiny("llama", seed=3), tokenizer()) as stranger:
        means.append(same(stranger, histories))
    for i, mean in enumerate(means):
        for other in means[:i]:
            assert (mean - other).norm() > 0.01 * mean.norm()


def test_own_share(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    shares = []
    for step in (1.0, 50.0):
        method = steer.NaturalGradient(layer=1, step=step)
        artifact = method.train(llama, histories)
        state = method.fit(llama, histories[0])
        own = state.tensors["resid_post[1]"] - artifact.tensors["resid_post[1].common"]
        assert method.own_share(state) == pytest.approx((own.norm() / state.tensors["resid_post[1]"].norm()).item())
        shares.append(method.own_share(state))
    assert shares[0] < shares[1]
    method.train(llama, histories[1:])
    with pytest.raises(steer.SteerError, match="another artifact"):
        method.own_share(state)


def test_own_texts_become_likelier_and_more_so_than_under_anothers_vector(
    llama: steer.FrozenLM, histories: list[steer.History]
) -> None:
    method = steer.NaturalGradient(layer=1, step=1.0, prior=300)
    method.train(llama, histories)
    vectors = [state.tensors["resid_post[1]"] for state in method.fit_many(llama, histories)]
    for user, history in enumerate(histories):
        spans = [record_span(llama, record) for record in history]

        def loss(vector: Tensor, spans: list = spans) -> float:  # type: ignore[type-arg]
            with torch.no_grad():
                edit = steer.ResidualEdit(SITES[1], vector.expand(len(spans), -1))
                return response_losses(llama, spans, [edit])[0].sum().item()

        assert loss(vectors[user]) < loss(vectors[1 - user]) - 0.5
        assert loss(vectors[user]) < loss(torch.zeros(llama.width)) - 1


def test_many_users_are_read_as_one_by_one(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = steer.NaturalGradient(layer=[0, 1])
    artifact = method.train(llama, histories)
    together = method.fit_many(llama, histories)
    again = steer.NaturalGradient(layer=[0, 1])
    again.use(llama, artifact)
    for history, state in zip(histories, together, strict=True):
        alone = again.fit(llama, history)
        for site in SITES:
            assert_close(alone.tensors[str(site)], state.tensors[str(site)])
        assert alone.provenance.records == tuple(record.id for record in history)
        assert alone.provenance.calibration["reference_norm"]["resid_post[1]"] > 0
        text = llama.generate(["greet me"], states=[state], artifacts=[artifact], dose=0.5, max_new_tokens=4)
        assert text != llama.generate(["greet me"], max_new_tokens=4)


@pytest.mark.parametrize("prior", [100.0, 3_000.0, 240_000.0])
def test_records_come_and_go(llama: steer.FrozenLM, histories: list[steer.History], prior: float) -> None:
    method = steer.NaturalGradient(layer=1, prior=prior)
    method.train(llama, histories)
    early, whole = histories[0].first(1), histories[0]
    grown = method.update(llama, method.fit(llama, early), whole.records[1:])
    fitted = method.fit(llama, whole)
    assert_close(grown.tensors["resid_post[1]"], fitted.tensors["resid_post[1]"], 1e-5)
    assert grown.provenance.records == fitted.provenance.records
    assert grown.provenance.calibration == fitted.provenance.calibration
    shrunk = method.remove(llama, grown, whole.records[1:])
    assert_close(shrunk.tensors["resid_post[1]"], method.fit(llama, early).tensors["resid_post[1]"], 1e-5)
    with pytest.raises(steer.SteerError, match="already"):
        method.update(llama, grown, whole.records[:1])
    with pytest.raises(steer.SteerError, match="not in the state"):
        method.remove(llama, shrunk, whole.records[1:])
    with pytest.raises(steer.SteerError, match="no record would be left"):
        method.remove(llama, shrunk, whole.records[:1])
    with pytest.raises(steer.SteerError, match="of several users"):
        method.update(llama, shrunk, [whole.records[1], histories[1].records[0]])
    other = replace(method, step=1.0)
    other.use(llama, method.artifact)  # type: ignore[arg-type]
    with pytest.raises(steer.SteerError, match="not fitted by this method as it is now"):
        other.update(llama, grown, histories[1].records)


def test_a_state_of_other_layers_is_not_updated(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = steer.NaturalGradient(layer=[0, 1])
    artifact = method.train(llama, histories)
    state = method.fit(llama, histories[0].first(1))
    for layer, message in ((1, "train again"), ([1, 0], "not fitted by this method as it is now")):
        other = steer.NaturalGradient(layer=layer)
        other.use(llama, artifact)
        with pytest.raises(steer.SteerError, match=message):
            other.update(llama, state, histories[0].records[1:])


def test_a_prior_holds_back_those_who_wrote_little(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    def norm(prior: float) -> float:
        method = steer.NaturalGradient(layer=1, prior=prior)
        method.train(llama, histories)
        return method.fit(llama, histories[0]).tensors["resid_post[1]"].norm().item()

    norms = [norm(prior) for prior in (100, 1_000, 10_000)]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 2 * norms[2]


def test_each_text_is_read_once_and_trained_on_once_at_most(
    llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = steer.likelihood.response_losses

    def counted(lm: steer.FrozenLM, spans: list, edits: list) -> Any:  # type: ignore[type-arg]
        read.append(len(spans))
        return original(lm, spans, edits)

    monkeypatch.setattr(steer.likelihood, "response_losses", counted)
    monkeypatch.setattr("steer.train.users.response_losses", counted)
    monkeypatch.setattr("steer.methods.vectors._FISHER_TEXTS", 2)
    texts, cache = sum(map(len, histories)), Cache(tmp_path / "gradients")
    # Training takes four of six texts, and two say how long its steps are.
    once = texts + (texts - 2) + 2
    method = steer.NaturalGradient(layer=1)
    method.train(llama, histories, cache=cache)
    states = method.fit_many(llama, histories)
    assert sum(read) == once
    again = steer.NaturalGradient(layer=1)
    again.train(llama, histories, cache=cache)
    assert sum(read) == once
    for one, other in zip(states, again.fit_many(llama, histories), strict=True):
        assert_close(one.tensors["resid_post[1]"], other.tensors["resid_post[1]"])
    elsewhere = steer.NaturalGradient(layer=0)
    elsewhere.train(llama, histories, cache=cache)
    assert sum(read) == 2 * once


def test_the_population_keeps_no_single_text(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    artifact = steer.NaturalGradient(layer=1).train(llama, histories)
    spans = [record_span(llama, record) for history in histories for record in history]
    common = {SITES[1]: artifact.tensors["resid_post[1].common"]}
    gradients = torch.nn.functional.normalize(response_gradients(llama, spans, SITES[1:], at=common)[0][SITES[1]])
    assert set(artifact.tensors) == {f"resid_post[1].{part}" for part in ("common", "mean", "directions", "variances")}
    assert (gradients @ artifact.tensors["resid_post[1].directions"].T).abs().max() < 0.99


def test_bad_input(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    for setting, message in (
        ({"step": 0}, "step=0 is not a positive number"),
        ({"step": "abc"}, "step='abc' is not"),
        ({"prior": -1.0}, "prior=-1.0 is not"),
        ({"damping": 0.0}, "damping=0.0 is not"),
        ({"learning_rate": float("inf")}, "learning_rate=inf is not"),
        ({"prior": float("nan")}, "prior=nan is not"),
        ({"batch": 0}, "batch=0 is not a whole number from 1 on"),
        ({"common_steps": -1}, "common_steps=-1 is not a whole number from 0 on"),
        ({"max_tokens": 2.5}, "max_tokens=2.5 is not"),
        ({"seed": "x"}, "seed='x' is not"),
        ({"layer": True}, "names no block"),
        ({"positions": "reponse"}, "not one of response"),
        ({"layer": []}, "names no block"),
    ):
        with pytest.raises(steer.SteerError, match=message):
            steer.NaturalGradient(**setting)  # type: ignore[arg-type]
    method = steer.NaturalGradient(layer=1)
    with pytest.raises(steer.SteerError, match="train"):
        method.fit(llama, histories[0])
    with pytest.raises(steer.SteerError, match="there is 1"):
        method.train(llama, [histories[0].first(1)])
    method.train(llama, histories)
    with pytest.raises(steer.SteerError, match="no records"):
        method.fit(llama, steer.History("ann", ()))
    other = steer.NaturalGradient(layer=2)
    other.use(llama, method.artifact)  # type: ignore[arg-type]
    with pytest.raises(steer.SteerError, match=r"read at resid_post\[1\], and this method reads at resid_post\[2\]"):
        other.fit(llama, histories[0])
    other = steer.NaturalGradient(layer=1, max_tokens=64)
    other.use(llama, method.artifact)  # type: ignore[arg-type]
    with pytest.raises(steer.SteerError, match="read with max_tokens=512, and here it is 64; train again"):
        other.fit(llama, histories[0])
    with (
        steer.wrap(tiny("llama").half(), tokenizer()) as half,
        pytest.raises(steer.SteerError, match=r"learning_rate=1e\+30 came to nothing finite"),
    ):
        steer.NaturalGradient(layer=1, learning_rate=1e30).train(half, histories)

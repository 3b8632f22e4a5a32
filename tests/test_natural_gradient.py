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
from steer.methods.natural_gradient import natural_direction
from steer.read import record_span

SITES = [steer.Site("resid_post", 0), steer.Site("resid_post", 1)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_slopes(arch: str, histories: list[steer.History]) -> None:
    """By finite differences, of each text alone, in the direction of its gradient."""
    with steer.wrap(tiny(arch), tokenizer()) as lm:
        spans = [record_span(lm, record) for history in histories for record in history]
        gradients, tokens = response_gradients(lm, spans, SITES, batch_tokens=120)
        assert tokens.tolist() == [span.end - span.start for span in spans]
        for site in SITES:
            for i in (0, 4):
                direction = gradients[site][i] / gradients[site][i].norm()

                def loss(length: float, i: int = i, site: steer.Site = site, direction: Tensor = direction) -> float:
                    edit = steer.ResidualEdit(site, length * direction[None])
                    with torch.no_grad():
                        return response_losses(lm, [spans[i]], [edit])[0].item()

                # Losses are float32, so the step cannot be smaller.
                slope = (loss(0.02) - loss(-0.02)) / 0.04
                assert slope == pytest.approx(gradients[site][i].norm().item(), rel=0.02)
                assert slope > 0.01


def test_the_model_gets_no_gradient(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    response_gradients(llama, [record_span(llama, record) for record in histories[0]], SITES)
    assert all(parameter.grad is None for parameter in llama.model.parameters())


@pytest.mark.parametrize(("texts", "width"), [(3, 7), (40, 7), (1, 5)])
def test_the_direction_is_that_of_the_damped_fisher_information(texts: int, width: int) -> None:
    rng = np.random.default_rng(texts)
    sample, wanted = rng.normal(size=(texts, width)), rng.normal(size=(2, width))
    tokens, damping = 11, 0.5
    fisher = sample.T @ sample / tokens
    expected = np.linalg.solve(fisher + damping * np.trace(fisher) / width * np.eye(width), wanted.T).T
    direction = natural_direction(torch.tensor(wanted), torch.tensor(sample) / tokens**0.5, damping)
    np.testing.assert_allclose(direction.numpy(), expected, rtol=1e-9)


def test_a_step_makes_own_texts_likelier_than_a_plain_gradient_step_of_that_length(
    llama: steer.FrozenLM, histories: list[steer.History]
) -> None:
    method = steer.NaturalGradient(layer=1, step=0.3)
    method.train(llama, histories)
    for history, state in zip(histories, method.fit_many(llama, histories), strict=True):
        spans = [record_span(llama, record) for record in history]
        gradients, _ = response_gradients(llama, spans, SITES[1:])
        step = state.tensors["resid_post[1]"]
        plain = -gradients[SITES[1]].sum(0) * step.norm() / gradients[SITES[1]].sum(0).norm()
        assert torch.nn.functional.cosine_similarity(step, plain, dim=0) < 0.999

        def loss(vector: Tensor, spans: list = spans) -> float:  # type: ignore[type-arg]
            with torch.no_grad():
                edit = steer.ResidualEdit(SITES[1], vector.expand(len(spans), -1))
                return response_losses(llama, spans, [edit])[0].sum().item()

        assert loss(step) < loss(torch.zeros_like(step)) - 0.1


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


def test_own_parts_cancel(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    """The mean over tokens of the users' own parts is nothing."""
    method = steer.NaturalGradient(layer=1, common=0.0)
    method.train(llama, histories)
    states = method.fit_many(llama, histories)
    weighted = sum(s.provenance.calibration["tokens"] * s.tensors["resid_post[1]"] for s in states)
    assert isinstance(weighted, Tensor)
    longest = max(s.provenance.calibration["tokens"] * s.tensors["resid_post[1]"].norm() for s in states)
    assert weighted.norm() < 1e-4 * longest


@pytest.mark.parametrize(("common", "prior"), [(0.0, 0.0), (2.0, 0.0), (2.0, 30.0)])
def test_records_come_and_go(
    llama: steer.FrozenLM, histories: list[steer.History], common: float, prior: float
) -> None:
    method = steer.NaturalGradient(layer=1, common=common, prior=prior)
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
    other = replace(method, damping=1.0)
    other.use(llama, method.artifact)  # type: ignore[arg-type]
    with pytest.raises(steer.SteerError, match="other settings"):
        other.update(llama, grown, histories[1].records)


def test_who_wrote_as_much_as_the_prior_goes_half_the_way(
    llama: steer.FrozenLM, histories: list[steer.History]
) -> None:
    method = steer.NaturalGradient(layer=1, common=0.0)
    artifact = method.train(llama, histories)
    whole = method.fit(llama, histories[0])
    half = replace(method, prior=whole.provenance.calibration["tokens"])
    half.use(llama, artifact)
    shrunk = half.fit(llama, histories[0])
    assert_close(2 * shrunk.tensors["resid_post[1]"], whole.tensors["resid_post[1]"])


def test_each_text_is_read_once(
    llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = steer.likelihood.response_losses

    def counted(lm: steer.FrozenLM, spans: list, edits: list) -> Any:  # type: ignore[type-arg]
        read.append(len(spans))
        return original(lm, spans, edits)

    monkeypatch.setattr(steer.likelihood, "response_losses", counted)
    texts, cache = sum(map(len, histories)), Cache(tmp_path / "gradients")
    method = steer.NaturalGradient(layer=1)
    method.train(llama, histories, cache=cache)
    states = method.fit_many(llama, histories)
    assert sum(read) == texts
    again = steer.NaturalGradient(layer=1)
    again.train(llama, histories, cache=cache)
    assert sum(read) == texts
    for one, other in zip(states, again.fit_many(llama, histories), strict=True):
        assert_close(one.tensors["resid_post[1]"], other.tensors["resid_post[1]"])
    elsewhere = steer.NaturalGradient(layer=0)
    elsewhere.train(llama, histories, cache=cache)
    assert sum(read) == 2 * texts


def test_the_population_keeps_no_single_text(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    """Its second moments alone, in as many directions as there are texts."""
    method = steer.NaturalGradient(layer=1)
    artifact = method.train(llama, histories)
    spans = [record_span(llama, record) for history in histories for record in history]
    gradients, tokens = response_gradients(llama, spans, SITES[1:])
    rows, factor = gradients[SITES[1]].double(), artifact.tensors["resid_post[1].factor"].double()
    assert_close(factor.T @ factor, rows.T @ rows / tokens.sum())
    directions = torch.nn.functional.normalize(factor, dim=1)
    assert_close(directions @ directions.T, torch.eye(len(factor)).double(), 1e-4)
    assert (torch.nn.functional.normalize(rows, dim=1) @ directions.T).abs().max() < 0.99


def test_bad_input(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
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
    with pytest.raises(steer.SteerError, match=r"not read at resid_post\[2\]"):
        other.fit(llama, histories[0])

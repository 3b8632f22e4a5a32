"""What is trained on users' texts, against training by hand; many users at once against each alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, WIDTH, tiny, tokenizer
from rows import assert_close
from torch import Tensor

import steer
from steer import embedded
from steer.inject import Edit
from steer.likelihood import last_logits, negative_log_likelihood, response_losses
from steer.method import method_of
from steer.methods.perfit import orthonormal
from steer.methods.vectors import reference_norms, training_units
from steer.read import Span, record_span
from steer.train import train_users

LAYER = 1
SITE = steer.Site("resid_post", LAYER)


def people(histories: Sequence[steer.History]) -> list[steer.History]:
    """Three of them, with three, one and five records."""
    ann, bob = (history.records for history in histories)
    more = tuple(steer.Record("cy", text, prompt) for text, prompt in (("so so.", "how now"), ("no, no", "yes?")))
    return [histories[0], steer.History("bob", bob[1:2]), steer.History("cy", (*more, *ann[:1], *bob[:2]))]


def method(**settings: Any) -> steer.TrainedVector:
    return steer.TrainedVector(**{"layer": [0, LAYER], "steps": 6, "batch": 2, "learning_rate": 0.05} | settings)


def loss_of(lm: steer.FrozenLM, history: steer.History, edits: Callable[[int], Sequence[Edit]]) -> float:
    spans = [record_span(lm, record) for record in history]
    with torch.no_grad():
        return negative_log_likelihood(lm, spans, edits(len(spans))).item()


def steered_loss(
    lm: steer.FrozenLM, history: steer.History, state: steer.UserState | None, artifact: steer.Artifact | None = None
) -> float:
    if state is None:
        return loss_of(lm, history, lambda rows: [steer.ResidualEdit(SITE, torch.zeros(rows, WIDTH))])
    return loss_of(lm, history, lambda rows: method_of(state).bind(lm, [state] * rows, state, artifact))


# One user.


def test_a_trained_vector_is_adams_on_the_likelihood(lm: steer.FrozenLM, histories: list[steer.History]) -> None:
    """With all texts in every step; by a hook of our own, text by text, without padding."""
    history, steps, rate = histories[0], 3, 0.05
    state = method(layer=LAYER, steps=steps, batch=8, learning_rate=rate, weight_decay=0.1).fit(lm, history)
    scale = state.provenance.calibration["training_unit"][str(SITE)] / WIDTH**0.5
    element = torch.zeros(WIDTH, requires_grad=True)
    optimizer = torch.optim.AdamW([element], lr=rate, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        total, count = torch.zeros(()), 0
        for record in history:
            head, tail = lm.tokenizer(record.prompt).input_ids, lm.tokenizer(record.response).input_ids

            def add(module: Any, args: Any, output: Any, start: int = len(head) - 1) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                hidden = torch.cat([hidden[:, :start], hidden[:, start:] + scale * element], dim=1)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = lm.attachment.blocks[LAYER].register_forward_hook(add)
            logits = lm.model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
            handle.remove()
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(tail), reduction="sum")
            count += len(tail)
        (total / count).backward()
        optimizer.step()
    assert_close(state.tensors[str(SITE)] / scale, element.detach(), 1e-3)


def test_units_of_training_are_those_of_the_fisher_information(
    llama: steer.FrozenLM, histories: list[steer.History]
) -> None:
    """Against each text's gradient by itself; and no unit is longer than the residual stream."""
    users = [[record_span(llama, record) for record in history] for history in people(histories)]
    free, short = ([{str(SITE): norm}] * len(users) for norm in (1e9, 1e-3))
    common = {str(SITE): torch.full((WIDTH,), 0.1)}
    units = training_units(llama, users, [SITE], norms=free, positions="response", common=common)
    for spans, unit in zip(users, units, strict=True):
        trace = 0.0
        for span in spans:
            vector = common[str(SITE)].clone().requires_grad_(True)
            losses, _ = response_losses(llama, [span], [steer.ResidualEdit(SITE, vector[None])])
            losses.sum().backward()
            assert vector.grad is not None
            trace += vector.grad.square().sum().item() / sum(span.end - span.start for span in spans)
        assert unit[str(SITE)] == pytest.approx((WIDTH / trace) ** 0.5, rel=1e-4)
    assert len({round(unit[str(SITE)], 3) for unit in units}) == len(units)
    assert training_units(llama, users, [SITE], norms=short, positions="response") == short
    assert training_units(llama, [], [SITE], norms=[], positions="response") == []


def test_a_unit_is_of_eight_texts_at_most(
    llama: steer.FrozenLM, histories: list[steer.History], monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = [record_span(llama, record) for history in histories for record in history]
    settings: dict[str, Any] = {"norms": [{str(SITE): 1e9}], "positions": "all"}
    every_other = training_units(llama, [spans[::2]], [SITE], **settings)
    assert every_other != training_units(llama, [spans], [SITE], **settings)
    monkeypatch.setattr("steer.methods.vectors._FISHER_TEXTS", len(spans) - 1)
    assert every_other == training_units(llama, [spans], [SITE], **settings)


@pytest.mark.full
def test_a_unit_moves_predictions_by_about_half_a_nat() -> None:
    if not embedded.installed("smollm2-135m"):
        pytest.skip("needs the model: steer models pull smollm2-135m")
    voices = steer.read_histories(Path(str(files("steer"))) / "data" / "voices.jsonl")
    with steer.load("smollm2-135m", dtype=torch.float32) as lm, torch.no_grad():
        spans = [record_span(lm, record) for record in voices[0][1].records[:3]]
        site = steer.Site("resid_post", 16)
        norms = [reference_norms(lm, spans, [site])]
        (unit,) = training_units(lm, [spans], [site], norms=norms, positions="response")
        assert unit[str(site)] < norms[0][str(site)]
        moved = torch.randn(8, lm.width, generator=torch.Generator().manual_seed(0))
        edit = steer.ResidualEdit(site, unit[str(site)] * moved / moved.norm(dim=1, keepdim=True))
        plain = steer.ResidualEdit(site, torch.zeros(8, lm.width))
        batch = [spans[0].ids] * 8
        with lm.steered(states=[None] * 8, edits=[plain], prompt_lengths=[spans[0].start] * 8) as steering:
            expected = last_logits(lm, steering.prepare(batch), 20).log_softmax(-1)
        with lm.steered(states=[None] * 8, edits=[edit], prompt_lengths=[spans[0].start] * 8) as steering:
            actual = last_logits(lm, steering.prepare(batch), 20).log_softmax(-1)
    divergence = (expected.exp() * (expected - actual)).sum(-1).mean().item()
    assert 0.2 < divergence < 0.8


def test_gradients_that_overflow_are_refused(histories: list[steer.History]) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e39
    with steer.wrap(model, tokenizer()) as lm, pytest.raises(steer.SteerError, match=r"not finite in torch\.float32"):
        method(layer=LAYER).fit(lm, histories[0])


def test_the_gradient_is_that_of_finite_differences(histories: list[steer.History]) -> None:
    with steer.wrap(tiny("llama").double(), tokenizer()) as lm:
        spans = [record_span(lm, record) for record in histories[0]]
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(WIDTH, generator=generator).requires_grad_(True)

        def loss(at: Tensor) -> Tensor:
            return negative_log_likelihood(lm, spans, [steer.ResidualEdit(SITE, at.expand(len(spans), -1))])

        loss(vector).backward()
        assert vector.grad is not None
        for _ in range(4):
            step = torch.randn(WIDTH, generator=generator)
            step *= 0.02 / step.norm()
            with torch.no_grad():
                slope = (loss(vector + step) - loss(vector - step)) / 2
            # Losses are float32, about 1e-6 off.
            assert (vector.grad @ step).item() == pytest.approx(slope.item(), rel=2e-2, abs=2e-6)


def test_training_lowers_the_loss_on_real_texts() -> None:
    if not embedded.installed("smollm2-135m"):
        pytest.skip("needs the model: steer models pull smollm2-135m")
    voices = steer.read_histories(Path(str(files("steer"))) / "data" / "voices.jsonl")
    history = voices[0][1].split(limit=2)[0]
    losses: list[float] = []
    with steer.load("smollm2-135m", dtype=torch.float32) as lm:
        trained = steer.TrainedVector(layer=20, steps=4).fit(lm, history, on_step=lambda step, x: losses.append(x))
        assert steered_loss(lm, history, trained) < losses[0] - 0.1
    assert losses[-1] < losses[0] - 0.05


def test_gradients_flow_above_the_site_only_and_never_into_the_model(
    lm: steer.FrozenLM, histories: list[steer.History]
) -> None:
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    needs: dict[int, set[bool]] = {0: set(), 1: set(), 2: set()}

    def watch(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                needs[layer].add((output[0] if isinstance(output, tuple) else output).requires_grad)

        return hook

    handles = [block.register_forward_hook(watch(layer)) for layer, block in enumerate(lm.attachment.blocks)]
    method(layer=LAYER, shared_steps=0).fit_many(lm, histories)
    for handle in handles:
        handle.remove()
    assert needs == {0: {False}, 1: {True}, 2: {True}}
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lm.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


def test_a_bound_is_kept_and_decay_shrinks(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    def doses(**settings: Any) -> list[float]:
        state = method(**settings).fit(llama, histories[0])
        norms = state.provenance.calibration["reference_norm"]
        return [(state.tensors[site].norm() / norms[site]).item() for site in state.provenance.sites]

    free, bound, decayed = doses(), doses(max_dose=0.02), doses(weight_decay=5.0)
    assert all(dose > 0.03 for dose in free)
    assert bound == pytest.approx([0.02, 0.02], rel=1e-4)
    assert all(0 < small < large for small, large in zip(decayed, free, strict=True))


def test_the_seed_decides_the_order(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    one, same, other = (method(steps=4, seed=seed).fit(llama, people(histories)[2]) for seed in (0, 0, 1))
    for site, vector in one.tensors.items():
        assert torch.equal(vector, same.tensors[site])
        assert not torch.allclose(vector, other.tensors[site], atol=1e-3)


# Many users at once.


@pytest.mark.parametrize("holdout", [0.0, 0.4])
def test_many_at_once_are_each_alone(lm: steer.FrozenLM, histories: list[steer.History], holdout: float) -> None:
    everybody, told = people(histories), []
    training = method(steps=10, holdout=holdout, learning_rate=0.2, shared_steps=3)
    training.train(lm, everybody)
    together = training.fit_many(lm, everybody, on_progress=told.append)
    for history, state in zip(everybody, together, strict=True):
        alone = training.fit(lm, history)
        assert state.provenance.records == tuple(record.id for record in history)
        assert state.provenance.calibration["step"] == alone.provenance.calibration["step"]
        for site, vector in state.tensors.items():
            assert_close(vector, alone.tensors[site], 1e-3)
            assert vector.norm() > 0.1 or holdout
    assert told == [pytest.approx((step + 1) / 10) for step in range(len(told))]
    assert len({tuple(state.tensors[str(SITE)].tolist()) for state in together}) == 3


def random_texts(users: Sequence[int]) -> list[list[Span]]:
    generator = torch.Generator().manual_seed(0)

    def text() -> Span:
        length = int(torch.randint(3, 14, (1,), generator=generator))
        return Span(torch.randint(5, VOCABULARY, (length,), generator=generator).tolist(), length // 2, length)

    return [[text() for _ in range(count)] for count in users]


def train(lm: steer.FrozenLM, texts: Sequence[Sequence[Span]], **settings: Any) -> tuple[Tensor, list[int]]:
    vectors = torch.zeros(len(texts), WIDTH, requires_grad=True)
    kept = train_users(
        lm,
        texts,
        [vectors],
        lambda users: [steer.ResidualEdit(SITE, vectors[users])],
        **{"steps": 5, "batch": 2, "learning_rate": 0.05} | settings,
    )
    return vectors.detach(), kept


def test_users_may_make_different_numbers_of_steps(llama: steer.FrozenLM) -> None:
    texts = random_texts([3, 1, 4])
    together, kept = train(llama, texts, steps=[2, 7, 4])
    assert kept == [2, 7, 4]
    for user, steps in enumerate(kept):
        alone, _ = train(llama, texts[user : user + 1], steps=steps)
        assert_close(together[user], alone[0], 1e-3)


def test_forward_passes_may_be_of_any_size(llama: steer.FrozenLM) -> None:
    texts = random_texts([3, 5])
    whole, _ = train(llama, texts)
    for size in (1, 20, 30):
        parts, _ = train(llama, texts, batch_tokens=size)
        assert_close(parts, whole, 1e-3)


def test_forward_passes_hold_texts_up_to_their_spans_ends(llama: steer.FrozenLM) -> None:
    sizes: list[tuple[int, ...]] = []
    handle = llama.attachment.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    train(llama, [[Span([*range(5, 45)], 4, 10)] * 2], steps=1, batch_tokens=20)
    handle.remove()
    assert sizes == [(2, 10)]


def test_the_best_step_on_held_out_texts_is_kept(llama: steer.FrozenLM) -> None:
    """Seen from outside: of the steps at which texts are looked at, none gives the held-out ones a lower loss."""
    generator = torch.Generator().manual_seed(0)
    # What is trained on has a fifth of the characters that the rest has.
    few, many = (
        [Span(torch.randint(5, top, (12,), generator=generator).tolist(), 4, 12) for _ in range(6)] for top in (24, 100)
    )
    held_out = many[:2]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).argsort().tolist()
    texts = [[[*held_out, *few][i] for i in order]]

    def held_out_loss(vectors: Tensor) -> float:
        with torch.no_grad():
            sums, counts = response_losses(llama, held_out, [steer.ResidualEdit(SITE, vectors.expand(2, -1))])
        return (sums.sum() / counts.sum()).item()

    settings = {"batch": 8, "learning_rate": 0.2}
    best, (kept,) = train(llama, texts, steps=60, holdout=0.25, **settings)
    # Trained on the other texts alone; all are in every step, so their order is of no account.
    losses = {0: held_out_loss(torch.zeros(1, WIDTH))}
    losses |= {n: held_out_loss(train(llama, [few], steps=n, **settings)[0]) for n in range(5, kept + 25, 5)}
    assert kept == min(losses, key=lambda step: losses[step])
    assert 0 < kept < 60
    assert held_out_loss(best) == pytest.approx(losses[kept], rel=1e-3)
    # What the model would say itself: to train on anything else does harm, and the start is kept.
    (said,) = llama.generate_tokens([few[0].ids], max_new_tokens=12)
    texts[0][order.index(0)] = texts[0][order.index(1)] = Span([*few[0].ids, *said], 12, 24)
    none, (kept,) = train(llama, texts, steps=60, holdout=0.25, **settings)
    assert kept == 0
    assert not none.any()


def test_trainings_that_cannot_be(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    with pytest.raises(steer.SteerError, match="'nobody' has no records to train a vector on"):
        method().fit_many(llama, [*histories, steer.History("nobody", ())])
    with pytest.raises(steer.SteerError, match="holdout=1 is not a share"):
        train(llama, random_texts([2]), holdout=1)
    with pytest.raises(steer.SteerError, match="a user has no texts"):
        train(llama, [[]])
    with pytest.raises(steer.SteerError, match=r"call train\("):
        method(shared_steps=2).fit(llama, histories[0])
    with pytest.raises(steer.SteerError, match="no records to train the common vector"):
        method(shared_steps=2).train(llama, [])
    trained = method(shared_steps=2)
    artifact = trained.train(llama, histories)
    assert artifact is not None
    for other in (method(shared_steps=2, layer=0), method(shared_steps=2, positions="all")):
        other.use(llama, artifact)
        with pytest.raises(steer.SteerError, match="the common vector was trained"):
            other.fit(llama, histories[0])
    assert method().train(llama, histories) is None


# A common vector.


def test_a_common_vector_comes_first_and_is_added(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    training = method(shared_steps=4)
    artifact = training.train(llama, histories)
    assert artifact is not None
    everything = steer.History("all", tuple(record for history in histories for record in history))
    common = method(steps=4).fit(llama, everything)
    assert training.fit(llama, histories[0]).provenance.artifact == artifact.hash
    for site, vector in common.tensors.items():
        assert_close(artifact.tensors[site], vector)
    state = training.fit(llama, histories[0])
    whole, own, shared = (
        type(training).bind(llama, [part, None], part, given)
        for part, given in (
            (state, artifact),
            (training.own_part(state), None),
            (training.common_part(artifact), None),
        )
    )
    for total, one, other in zip(whole, own, shared, strict=True):
        assert isinstance(total, steer.ResidualEdit)
        assert isinstance(one, steer.ResidualEdit)
        assert isinstance(other, steer.ResidualEdit)
        site = str(total.site)
        assert torch.equal(total.vectors[0], state.tensors[site] + artifact.tensors[site])
        assert torch.equal(one.vectors[0], state.tensors[site])
        assert torch.equal(other.vectors[0], artifact.tensors[site])
        assert not total.vectors[1].any()
        assert other.at_dose(torch.tensor([0.5, 0.5])).vectors[0].norm() == pytest.approx(
            0.5 * artifact.settings["reference_norm"][site], rel=1e-4
        )


def test_a_users_own_part_is_trained_on_top_of_the_common_one(
    llama: steer.FrozenLM, histories: list[steer.History]
) -> None:
    """The first step starts from the loss under the common vector."""
    training = method(shared_steps=8, batch=8)
    artifact = training.train(llama, histories)
    assert artifact is not None
    losses: list[float] = []
    state = training.fit(llama, histories[0], on_step=lambda step, loss: losses.append(loss))
    assert losses[0] == pytest.approx(steered_loss(llama, histories[0], training.common_part(artifact)), rel=1e-4)
    assert losses[0] < steered_loss(llama, histories[0], None)
    assert steered_loss(llama, histories[0], state, artifact) < losses[0]


# PerFit.


def perfit(**settings: Any) -> steer.PerFit:
    few = {"layer": [0, LAYER], "rank": 2, "shared_rank": 3, "epochs": 4, "batch": 2, "learning_rate": 0.01}
    return steer.PerFit(**few | settings)


def maps(tensors: Mapping[str, Tensor], site: object) -> list[Tensor]:
    return [tensors[f"{site}.{part}"] for part in ("rotation", "weight", "bias")]


def test_perfit_starts_as_the_identity(lm: steer.FrozenLM, histories: list[steer.History]) -> None:
    training = perfit(epochs=0, shared_epochs=0)
    artifact = training.train(lm, histories)
    states = [training.fit(lm, history) for history in histories]
    for tensors in (artifact.tensors, states[0].tensors):
        rotation, weight, bias = maps(tensors, SITE)
        assert torch.equal(weight, rotation)
        assert not bias.any()
        assert_close(rotation @ rotation.T, torch.eye(len(rotation)), 1e-5)
    ids = torch.tensor([lm.encode("greet me")] * 2)
    with torch.no_grad():
        plain = lm.model(ids).logits
        with lm.steered(states=states, artifacts=[artifact], prompt_lengths=[2, 2]):
            assert torch.equal(lm.model(ids).logits, plain)


def test_subspaces_move_without_jumps() -> None:
    """Rows that are orthonormal stay as they are; a bare QR would turn some of them round."""
    raw = torch.linalg.qr(torch.randn(20, 9, 4, generator=torch.Generator().manual_seed(0))).Q
    raw = raw * torch.tensor([1, -1, 1, -1])
    assert_close(orthonormal(raw), raw.mT, 1e-5)


def test_perfit_maps_by_the_shared_map_and_then_by_the_users(
    lm: steer.FrozenLM, histories: list[steer.History]
) -> None:
    training = perfit()
    artifact = training.train(lm, histories)
    state = training.fit(lm, histories[0])
    ids, start = torch.tensor([lm.encode("greet me")] * 3), 3
    seen: list[Tensor] = []

    def hidden(edited: Sequence[steer.UserState | None]) -> Tensor:
        with torch.no_grad(), lm.steered(states=edited, artifacts=[artifact], prompt_lengths=[start + 1] * 3):
            return lm.model(ids, output_hidden_states=True).hidden_states[1]

    own = training.own_part(state)
    plain, seen = hidden([None] * 3), list(hidden([state, None, own]))
    expected = plain[0, start:]
    for tensors in (artifact.tensors, state.tensors):
        rotation, weight, bias = maps(tensors, "resid_post[0]")
        expected = expected + (expected @ weight.T + bias - expected @ rotation.T) @ rotation
        assert_close(rotation @ rotation.T, torch.eye(len(rotation)), 1e-5)
    assert_close(seen[0][start:], expected)
    assert torch.equal(seen[0][:start], plain[0, :start])
    assert torch.equal(seen[1], plain[1])
    rotation, weight, bias = maps(state.tensors, "resid_post[0]")
    own_only = plain[2, start:] + (plain[2, start:] @ (weight - rotation).T + bias) @ rotation
    assert_close(seen[2][start:], own_only)
    assert (seen[2] - seen[0]).abs().max() > 1e-2


def test_perfit_lowers_the_loss_in_both_stages(lm: steer.FrozenLM, histories: list[steer.History]) -> None:
    training, losses = perfit(shared_epochs=8, epochs=8), []
    artifact = training.train(lm, histories, on_step=lambda step, loss: losses.append(loss))
    plain = steered_loss(lm, histories[0], None)
    states = training.fit_many(lm, histories)
    for history, state in zip(histories, states, strict=True):
        start = perfit(shared_epochs=8, epochs=0)
        start.use(lm, artifact)
        shared = steered_loss(lm, history, start.fit(lm, history), artifact)
        assert steered_loss(lm, history, state, artifact) < shared - 0.02
        # The second stage starts where the first has led to.
        start = perfit(epochs=1, batch=8)
        start.use(lm, artifact)
        start.fit(lm, history, on_step=lambda step, loss: losses.append(loss))
        assert losses.pop() == pytest.approx(shared, rel=1e-4)
    assert len(losses) == 8 * 3
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.1
    assert plain > steered_loss(lm, histories[0], states[0], artifact)


def test_many_maps_at_once_are_each_alone(lm: steer.FrozenLM, histories: list[steer.History]) -> None:
    """Users of one, three and five records make different numbers of steps."""
    everybody, told, training = people(histories), [], perfit()
    training.train(lm, everybody)
    together = training.fit_many(lm, everybody, on_progress=told.append)
    assert [state.provenance.calibration["step"] for state in together] == [8, 4, 12]
    assert told[-1] == 1
    for history, state in zip(everybody, together, strict=True):
        alone = training.fit(lm, history)
        for name, tensor in state.tensors.items():
            assert_close(tensor, alone.tensors[name], 1e-3)


def test_maps_that_cannot_be(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    with pytest.raises(steer.SteerError, match=r"call train\("):
        perfit().fit(llama, histories[0])
    with pytest.raises(steer.SteerError, match="no records to train the shared maps"):
        perfit().train(llama, [])
    artifact = perfit(shared_epochs=0).train(llama, histories)
    for other in (perfit(layer=0), perfit(positions="all")):
        other.use(llama, artifact)
        with pytest.raises(steer.SteerError, match="the shared maps were trained at"):
            other.fit(llama, histories[0])
    given = perfit()
    given.use(llama, artifact)
    with pytest.raises(steer.SteerError, match="'nobody' has no records to train a map on"):
        given.fit(llama, steer.History("nobody", ()))
    state = given.fit(llama, histories[0])
    with pytest.raises(steer.SteerError, match="needs the artifact"):
        llama.generate(["x"], states=[state])


# Every method that is trained.


@pytest.mark.parametrize(
    "training", [method(shared_steps=3, steps=8, learning_rate=0.3), perfit(learning_rate=0.05)], ids=lambda m: m.name
)
def test_trained_states_survive_a_bank(
    llama: steer.FrozenLM, histories: list[steer.History], training: steer.Method, tmp_path: Path
) -> None:
    bank = steer.Bank(tmp_path / "people.bank")
    artifact = training.train(llama, histories)
    assert artifact is not None
    bank.put_artifact(artifact)
    states = training.fit_many(llama, histories)
    bank.update({(h.user_id, "trained"): state for h, state in zip(histories, states, strict=True)})
    prompts, settings = ["greet me", "say bye", "x"], {"max_new_tokens": 6}
    stored = steer.Bank(tmp_path / "people.bank")
    together = llama.generate_tokens(prompts, ["ann", None, "bob"], stored, **settings)
    plain = llama.generate_tokens(prompts, **settings)
    assert together[1] == plain[1]
    assert together[0] != plain[0]
    assert together[2] != plain[2]
    direct = llama.generate_tokens(prompts, states=[states[0], None, states[1]], artifacts=[artifact], **settings)
    assert together == direct


@pytest.mark.parametrize(
    "training",
    [
        method(shared_steps=2, steps=2),
        perfit(shared_epochs=1, epochs=1),
        steer.PrefixTuning(shared_steps=2, steps=2),
        steer.UserLLM(layer=LAYER, read_layer=0, heads=2, steps=2),
    ],
    ids=lambda m: m.name,
)
def test_training_does_not_depend_on_the_grad_mode_around_it(
    llama: steer.FrozenLM, histories: list[steer.History], training: steer.Method
) -> None:
    def learned() -> list[steer.Artifact | steer.UserState]:
        artifact = training.train(llama, histories)
        return [*([] if artifact is None else [artifact]), *training.fit_many(llama, histories)]

    with torch.no_grad():
        without = learned()
    for one, other in zip(without, learned(), strict=True):
        for key, tensor in one.tensors.items():
            assert torch.equal(tensor, other.tensors[key])


FEW: dict[str, dict[str, Any]] = {
    "caa": {"rejected": "bland"},
    "repe_pca": {"rejected": "bland"},
    "trained_vector": {"shared_steps": 1, "steps": 1},
    "perfit": {"shared_epochs": 1, "epochs": 1},
    "user_llm": {"read_layer": 0, "heads": 2, "steps": 1},
}


@pytest.mark.parametrize("name", FEW)
def test_a_layer_that_is_named_twice_is_one_layer(
    llama: steer.FrozenLM, histories: list[steer.History], name: str
) -> None:
    def bound(layer: int | list[int]) -> list[Edit]:
        fitting = steer.make_method(name, layer=layer, **FEW[name])
        artifact = fitting.train(llama, histories)
        state = fitting.fit(llama, histories[0])
        return fitting.bind(llama, [state], state, artifact)

    assert len(bound([LAYER, LAYER])) == len(bound(LAYER))


@pytest.mark.parametrize("name", FEW)
def test_settings_are_checked_at_once(name: str) -> None:
    for layer in ([], (), "8", "8,23", [1.5], None, {}):
        with pytest.raises(steer.SteerError, match=r"names no block, or not by its number; give layer=14"):
            steer.make_method(name, **FEW[name] | {"layer": layer})
    with pytest.raises(steer.SteerError, match=r"resid_(post|mid)\[-1\] is not a site"):
        steer.make_method(name, **FEW[name] | {"layer": -1})
    if name != "user_llm":
        with pytest.raises(steer.SteerError, match="positions='reponse' is not one of response, generated, all"):
            steer.make_method(name, **FEW[name] | {"layer": 1, "positions": "reponse"})


@pytest.mark.parametrize("name", ["trained_vector", "perfit", "prefix_tuning", "user_llm"])
def test_of_nobody_there_are_no_states(llama: steer.FrozenLM, histories: list[steer.History], name: str) -> None:
    fitting = steer.make_method(name, **{"layer": [0, LAYER]} | FEW[name] if name in FEW else {})
    fitting.train(llama, histories)
    assert fitting.fit_many(llama, []) == []
    assert fitting.fit_many(llama, [], lambda share: None) == []


@pytest.mark.parametrize("name", ["prefix_tuning", "style_vector"])
def test_fit_many_is_fit_for_each(llama: steer.FrozenLM, histories: list[steer.History], name: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "prefix_tuning": {"shared_steps": 2, "steps": 5, "batch": 2, "learning_rate": 0.2},
        "style_vector": {"layer": LAYER, "neutral": "field:bland"},
    }
    told: list[float] = []
    fitting = steer.make_method(name, **settings[name])
    fitting.train(llama, histories)
    for history, state in zip(histories, fitting.fit_many(llama, histories, told.append), strict=True):
        for key, tensor in fitting.fit(llama, history).tensors.items():
            assert_close(state.tensors[key], tensor, 1e-3)
    assert told == sorted(told)
    assert told[-1] == 1


def test_methods_are_made_by_name() -> None:
    made = steer.make_method("trained_vector", layer=[1, 2], steps=7)
    assert isinstance(made, steer.TrainedVector)
    assert (made.layer, made.steps) == ([1, 2], 7)
    with pytest.raises(steer.SteerError, match=r"there is no method 'trained'; there are .*trained_vector"):
        steer.make_method("trained")
    with pytest.raises(steer.SteerError, match=r"trained_vector: it needs 'layer'; its hyper-parameters are layer, "):
        steer.make_method("trained_vector")
    with pytest.raises(steer.SteerError, match="caa: it has no 'depth'; its hyper-parameters are layer"):
        steer.make_method("caa", layer=1, depth=2)

"""Scores are likelihoods: those of the slow way, and those that transformers gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from models import VARIANTS, tiny, tokenizer
from rows import assert_close, cross_attention
from torch import Tensor
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import steer
from steer.cli.app import app
from steer.inject import Mixture, Stream
from steer.likelihood import response_losses
from steer.methods.drift import log_likelihoods
from steer.mixed import mixed_losses
from steer.read import Span, record_span, response_span
from steer.score import Scores, UserScore, row_losses, score

ROWS = 5
SITES = ["embed", "resid_post[0]", "resid_mid[1]", "resid_pre[1]", "attn_out[1]", "mlp_out[0]", "z[1]", "resid_post[2]"]


@pytest.fixture(params=VARIANTS)
def lm(request: pytest.FixtureRequest) -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny(request.param), tokenizer()) as lm:
        yield lm


def vectors(lm: steer.FrozenLM, site: steer.Site) -> Tensor:
    """Of which the first is none."""
    drawn = torch.randn(ROWS, lm.width_at(site), generator=torch.Generator().manual_seed(1))
    return torch.cat([torch.zeros_like(drawn[:1]), drawn[1:]])


def span_of(lm: steer.FrozenLM, prompt: str | None = "he said once that ") -> Span:
    return response_span(lm, "all is well, and so it was.", prompt)


@pytest.mark.parametrize("site", SITES)
def test_rows_that_share_what_lies_below_are_rows_of_their_own(lm: steer.FrozenLM, site: str) -> None:
    if "mid" in site and lm.attachment.architecture.mid is None:
        pytest.skip("attention and feed-forward are parallel")
    where = steer.Site.parse(site)
    lm.declare(where)
    for positions in ("response", "generated", "all"):
        edits = [steer.ResidualEdit(where, vectors(lm, where), positions)]  # type: ignore[arg-type]
        expected, _ = response_losses(lm, [span_of(lm)] * ROWS, edits)
        for budget in (2048, 40):
            assert_close(row_losses(lm, span_of(lm), edits, ROWS, batch_tokens=budget), expected)
        assert (expected[1:] - expected[0]).abs().max() > 0.1


def test_edits_at_several_sites_and_a_memory(lm: steer.FrozenLM) -> None:
    layer = cross_attention()
    memories = [None, *torch.randn(ROWS - 1, 3, 20, generator=torch.Generator().manual_seed(2))]
    adds = [steer.ResidualEdit(site, vectors(lm, site)) for site in map(steer.Site.parse, SITES[1::6])]
    edits = [*adds, steer.MemoryEdit.from_rows(steer.Site("resid_mid", 2), layer, memories)]
    expected, _ = response_losses(lm, [span_of(lm)] * ROWS, edits)
    assert_close(row_losses(lm, span_of(lm), edits, ROWS), expected)


def test_conditions_are_decided_from_the_whole_prompt(llama: steer.FrozenLM) -> None:
    """The thresholds are so close to what the prompt gives that its last token alone would decide otherwise."""
    site, span = steer.Site("resid_post", 1), span_of(llama)
    drawn = vectors(llama, site)

    def edits(thresholds: Tensor) -> list[steer.ResidualEdit]:
        condition = steer.Condition(steer.Site("resid_post", 0), drawn + 1, thresholds)
        return [steer.ResidualEdit(site, drawn, condition=condition)]

    with llama.steered(edits=edits(torch.zeros(ROWS)), prompt_lengths=[span.start] * ROWS) as steering:
        llama.model(torch.tensor([list(span.ids)] * ROWS))
    (decision,) = steering.decisions
    chosen = edits(decision.similarities + torch.tensor([0.0, -1e-4, 1e-4, -1e-4, 1e-4]))
    losses = row_losses(llama, span, chosen, ROWS)
    assert_close(losses, response_losses(llama, [span] * ROWS, chosen)[0])
    assert losses[2] == pytest.approx(losses[0].item(), rel=1e-6)
    assert losses[4] == pytest.approx(losses[0].item(), rel=1e-6)
    assert (losses[[1, 3]] - losses[0]).abs().min() > 0.01


def test_the_row_without_a_state_is_what_transformers_computes(lm: steer.FrozenLM) -> None:
    site = steer.Site("resid_post", 1)
    for prompt in (None, "so "):
        span = span_of(lm, prompt)
        ids = torch.tensor([list(span.ids)])
        with torch.no_grad():
            logits = lm.model(ids).logits[0, :-1]
        start = max(span.start, 1)
        expected = cross_entropy(logits, ids[0, 1:], reduction="none")[start - 1 :].sum()
        losses = row_losses(lm, span, [steer.ResidualEdit(site, vectors(lm, site))], ROWS)
        assert_close(losses[0], expected)


def test_a_prefix_is_scored_as_well(llama: steer.FrozenLM) -> None:
    prefixes = [None, *torch.randn(ROWS - 1, 2, llama.width, generator=torch.Generator().manual_seed(3))]
    edit = steer.PrefixEdit.from_rows(prefixes, llama.width)
    losses = row_losses(llama, span_of(llama), [edit], ROWS)
    assert_close(losses[0], row_losses(llama, span_of(llama), [], 1)[0])
    assert (losses[1:] - losses[0]).abs().min() > 0.01


def test_prefixes_are_scored_in_passes_of_so_many_tokens(llama: steer.FrozenLM) -> None:
    """With every other kind of edit beside them, each for its own rows."""
    generator, span = torch.Generator().manual_seed(3), span_of(llama)
    prefixes = [None, *(torch.randn(length, llama.width, generator=generator) for length in (2, 1, 3, 2))]
    site, drawn = steer.Site("resid_post", 1), vectors(llama, steer.Site("resid_post", 1))
    condition = steer.Condition(steer.Site("resid_post", 0), drawn + 1, torch.linspace(-0.1, 0.1, ROWS))
    marks = torch.rand(ROWS, len(span.ids), generator=generator) > 0.5
    memories = [None, *torch.randn(ROWS - 1, 3, 20, generator=generator)]
    edits = [
        steer.PrefixEdit.from_rows(prefixes, llama.width),
        steer.ResidualEdit(site, drawn, condition=condition),
        steer.ResidualEdit(site, drawn.roll(1, 0), positions=marks),
        steer.ProjectionEdit(site, drawn, strengths=torch.linspace(0, 1, ROWS)),
        steer.MemoryEdit.from_rows(steer.Site("resid_mid", 2), cross_attention(), memories),
    ]
    sizes: list[int] = []
    count = llama.attachment.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    longest = len(span.ids) + 3
    at_once, by_two, alone = (row_losses(llama, span, edits, ROWS, batch_tokens=n * longest) for n in (ROWS, 2, 0))
    count.remove()
    assert sizes == [ROWS, 2, 2, 1, *[1] * ROWS]
    assert_close(by_two, at_once)
    assert_close(alone, at_once)
    assert len(set(at_once.tolist())) == ROWS


def test_lower_layers_and_prompts_run_once(llama: steer.FrozenLM) -> None:
    seen: list[list[tuple[int, int]]] = [[] for _ in range(llama.n_layers)]

    def count(layer: int):  # type: ignore[no-untyped-def]
        return lambda module, args: seen[layer].append(tuple(args[0].shape[:2]))

    handles = [b.register_forward_pre_hook(count(i)) for i, b in enumerate(llama.attachment.blocks)]
    site, span = steer.Site("resid_post", 1), span_of(llama)
    row_losses(llama, span, [steer.ResidualEdit(site, vectors(llama, site))], ROWS)
    for handle in handles:
        handle.remove()
    prompt, rest = span.start - 1, span.end - span.start
    assert seen == [[(1, prompt), (1, rest)], [(1, prompt), (1, rest)], [(1, prompt), (ROWS, rest)]]


def fitted(lm: steer.FrozenLM, histories: list[steer.History]) -> dict[str, steer.UserState]:
    method = steer.StyleVector(layer=1, neutral="field:bland")
    return {history.user_id: method.fit(lm, history.first(1)) for history in histories}


def test_scores_of_users(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    states = fitted(llama, histories)
    later = [steer.History(history.user_id, history.records[1:]) for history in histories]
    done: list[int] = []
    scores = score(llama, later, states, strength=2.0, on_progress=done.append)
    assert done == [1, 2, 3, 4]
    for history, result in zip(later, scores.users, strict=True):
        spans = [response_span(llama, record.response, record.prompt) for record in history]
        other = next(user for user in states if user != history.user_id)
        for state, got in ((None, result.base), (history.user_id, result.own), (other, result.others[other])):
            vector = torch.zeros(llama.width) if state is None else states[state].tensors["resid_post[1]"]
            edit = steer.ResidualEdit(steer.Site("resid_post", 1), 2 * vector.expand(len(spans), -1))
            sums, counts = response_losses(llama, spans, [edit])
            assert got == pytest.approx((sums.sum() / counts.sum()).item(), rel=1e-5)
            assert result.tokens == counts.sum()
        assert result.other_mean == result.others[other]


def test_records_that_a_state_was_fitted_on_are_refused(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    states = fitted(llama, histories)
    with pytest.raises(steer.SteerError, match="fitted on"):
        score(llama, histories, states)
    with pytest.raises(steer.SteerError, match="no state"):
        score(llama, histories, {})
    with pytest.raises(steer.SteerError, match="no records"):
        score(llama, [], states)


def test_users_may_number_their_records_alike(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    """Also where one user's record that is scored has the number of another's that was fitted on."""
    ann, bob = (
        steer.History(one.user_id, tuple(replace(record, id=str(i)) for i, record in enumerate(one)))
        for one in histories
    )
    states = fitted(llama, [ann, steer.History("bob", bob.records[::-1])])
    scores = score(llama, [steer.History("ann", ann.records[2:]), bob.first(1)], states)
    assert [one.user for one in scores.users] == ["ann", "bob"]
    with pytest.raises(steer.SteerError, match="the state of 'bob' was fitted on record '2'"):
        score(llama, [bob], states)


def test_totals_are_means_over_users_with_bootstrap_intervals() -> None:
    users = [
        UserScore(str(i), base=3.0, own=3.0 - gain, others={"x": 3.0 + harm, "y": 3.0 - 2 * harm}, tokens=10)
        for i, (gain, harm) in enumerate([(0.1, 0.0), (0.2, 0.1), (0.3, 0.2), (-0.2, 0.4)])
    ]
    totals = Scores(users).totals()
    assert totals["users"] == 4
    assert totals["tokens"] == 40
    assert totals["own_minus_base"]["mean"] == pytest.approx(-0.1)
    assert totals["other_minus_base"]["mean"] == pytest.approx(-0.0875)
    assert totals["own_minus_other"]["mean"] == pytest.approx(-0.0125)
    # Resampled means of four users reach from one extreme to the other; the interval is within and around the mean.
    assert -0.3 < totals["own_minus_base"]["low"] < -0.2
    assert 0.0 < totals["own_minus_base"]["high"] < 0.2
    assert totals["better_than_base"] == 0.75
    assert totals["own_beats_others"] == 0.75
    assert totals["top1"] == 0.25
    assert "own_minus_other" not in Scores([replace(users[0], others={})]).totals()


def test_the_bootstrap_interval_covers_the_mean_of_the_population() -> None:
    """In about 95 of 100 draws; with 40 users a percentile interval falls a little short of it."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for draw in range(60):
        gains = 0.5 + torch.randn(40, generator=generator)
        totals = Scores([UserScore("u", 0.0, gain, {}, 1) for gain in gains.tolist()]).totals(seed=draw)
        hits += totals["own_minus_base"]["low"] < 0.5 < totals["own_minus_base"]["high"]
    assert 52 <= hits <= 60


def test_the_command(tmp_path, llama: steer.FrozenLM, histories: list[steer.History], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    file, bank = tmp_path / "texts.jsonl", tmp_path / "people.bank"
    records = [record for history in histories for record in history]
    lines = ({"user_id": r.user_id, "prompt": r.prompt, "text": r.response, "id": r.id} for r in records)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("steer.cli.options.load", lambda *_: llama)
    steer.Bank(bank).update({(user, "style"): state for user, state in fitted(llama, histories).items()})
    arguments = ["score", str(file), "--bank", str(bank), "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, [*arguments, "--holdout", "2"])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written["users"]) == {"ann", "bob"}
    assert set(written["users"]["ann"]) == {"nll_base", "nll_own", "nll_other_mean", "n_tokens"}
    assert written["totals"]["others"] == 1
    assert "own state − none" in done.output
    assert "others to compare with: 1 and not 8" in done.stderr
    refused = CliRunner().invoke(app, [*arguments, "--holdout", "3"])
    assert isinstance(refused.exception, steer.SteerError)
    assert "--holdout" in str(refused.exception)
    nobody = CliRunner().invoke(app, [*arguments, "--name", "voice"])
    assert isinstance(nobody.exception, steer.SteerError)
    # Where the file cannot be written after all, it stays as it was, and the table was shown.
    before = (tmp_path / "out.json").read_text()
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError("the disk is full")))
    unlucky = CliRunner().invoke(app, [*arguments, "--holdout", "1"])
    assert isinstance(unlucky.exception, steer.SteerError)
    assert "own state − none" in unlucky.stdout
    assert (tmp_path / "out.json").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl", "people.bank", "out.json"}


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.cli.options.load", Mock(side_effect=AssertionError("the model was loaded")))
    for wrong in (tmp_path / "nowhere" / "out.json", tmp_path):
        refused = CliRunner().invoke(app, ["score", "texts.jsonl", "--bank", "people.bank", "--json", str(wrong)])
        assert isinstance(refused.exception, steer.SteerError)
        assert f"{wrong} cannot be written" in str(refused.exception)


def test_models_that_states_name_are_given_beside_the_scored_one(
    tmp_path: Path, llama: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.jsonl"
    records = [{"user_id": user, "prompt": "what was asked", "text": "what came"} for user in ("ann", "bob")]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    steer.Bank(tmp_path / "people.bank").update(
        {(user, "known"): steer.CoSteer(model="small").state(f"I am {user}.") for user in ("ann", "bob")}
    )
    with steer.wrap(tiny("gpt2", seed=4), tokenizer()) as small:
        monkeypatch.setattr("steer.cli.options.load", lambda name, *_: small if name == "tiny" else llama)
        asked = ["score", str(file), "--bank", str(tmp_path / "people.bank"), "--holdout", "1"]
        done = CliRunner().invoke(app, [*asked, "--beside", "small=tiny", "--json", str(tmp_path / "out.json")])
        assert done.exit_code == 0, done.exception
        state = steer.CoSteer(model="small").state("I am ann.")
        span = record_span(llama, steer.Record("ann", "what came", "what was asked"))
        edit = steer.StreamEdit([steer.CoSteer.mixture_of(state)])
        loss = row_losses(llama, span, [edit], 1, models={"small": small}).item()
    ann = json.loads((tmp_path / "out.json").read_text())["users"]["ann"]
    assert ann["nll_own"] == pytest.approx(loss / ann["n_tokens"], rel=1e-5)
    # Before a model is loaded.
    monkeypatch.setattr("steer.cli.options.load", None)
    missing = "no --beside for 'small'; add --beside small=MODEL"
    for wrong, message in ([], missing), (["--beside", "smal=tiny"], "no state of these rows needs it"):
        refused = CliRunner().invoke(app, [*asked, *wrong])
        assert isinstance(refused.exception, steer.SteerError)
        assert message in str(refused.exception)


POWER_MEAN = Mixture((Stream(0.4, "I sail."), Stream(0.6)), power=-1.0, scale=-1.0)


def test_contexts_are_scored_as_they_are_decoded(lm: steer.FrozenLM) -> None:
    """−log p under each mixture, from forward passes by hand; rows without a context, and another model's logits."""
    record = steer.Record("ann", "what she wrote", "what was asked")
    span = record_span(lm, record)
    mixtures = [
        None,
        Mixture.contrast("I sail.", 1.5),
        Mixture((Stream(1.0), Stream(0.5, "I sail.", model="other"), Stream(-0.5, model="other"))),
        POWER_MEAN,
    ]
    with steer.wrap(tiny("gpt2", seed=4), tokenizer()) as other:
        losses = row_losses(lm, span, [steer.StreamEdit(mixtures)], 4, models={"other": other})

        def log_probs(model: steer.FrozenLM, prompt: str) -> Tensor:
            response = lm.tokenizer(record.response).input_ids
            ids = torch.tensor([*lm.tokenizer(prompt).input_ids, *response])
            with torch.no_grad():
                return model.model(ids[None, :-1]).logits[0, -len(response) :].double().log_softmax(-1)

        plain, sailing = log_probs(lm, "what was asked"), log_probs(lm, "I sail. what was asked")
        others = log_probs(other, "I sail. what was asked") - log_probs(other, "what was asked")
    expected = [plain, 2.5 * sailing - 1.5 * plain, plain + 0.5 * others]
    expected.append(-(0.4 / sailing.exp() + 0.6 / plain.exp()).log())
    targets = torch.tensor(lm.tokenizer(record.response).input_ids)[:, None]
    sums = [-scores.log_softmax(-1).gather(1, targets).sum() for scores in expected]
    assert_close(losses.double(), torch.stack(sums))


def test_scores_of_a_float64_model_are_in_float64() -> None:
    record = steer.Record("ann", "what she wrote", "what was asked")
    with steer.wrap(tiny("llama", dtype=torch.float64), tokenizer()) as lm:
        span, mixtures = record_span(lm, record), [Mixture.contrast("I sail.", 0.7), POWER_MEAN]
        losses = row_losses(lm, span, [steer.StreamEdit(mixtures)], 2)
        response = lm.tokenizer(record.response).input_ids
        plain, sailing = (
            lm.model(torch.tensor([[*lm.tokenizer(prompt).input_ids, *response][:-1]]))
            .logits[0, -len(response) :]
            .log_softmax(-1)
            .detach()
            for prompt in ("what was asked", "I sail. what was asked")
        )
    targets = torch.tensor(response)[:, None]
    for loss, scores in zip(
        losses, [1.7 * sailing - 0.7 * plain, -(0.4 / sailing.exp() + 0.6 / plain.exp()).log()], strict=True
    ):
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(-scores.log_softmax(-1).gather(1, targets).sum().item(), rel=1e-12)


@pytest.mark.parametrize("filters", [{"floor": 0.1}, {"nucleus": 0.9}])
def test_what_rules_tokens_out_is_not_scored(llama: steer.FrozenLM, filters: dict[str, float]) -> None:
    span = record_span(llama, steer.Record("ann", "what she wrote", "asked"))
    mixture = Mixture((Stream(1.5, "I sail."), Stream(-0.5)), **filters)  # type: ignore[arg-type]
    with pytest.raises(steer.SteerError, match=r"no probability at all; score it without its filter: DExperts"):
        row_losses(llama, span, [steer.StreamEdit([mixture])], 1)


def test_what_cannot_be_scored_under_a_context_is_refused(llama: steer.FrozenLM) -> None:
    contrast = steer.StreamEdit.contrast(["I sail."], [1.0])
    with pytest.raises(steer.SteerError, match="needs a prompt that it stands in front of"):
        row_losses(llama, record_span(llama, steer.Record("ann", "what she wrote")), [contrast], 1)
    vectors = steer.ResidualEdit(steer.Site("resid_post", 1), torch.ones(1, llama.width))
    span = record_span(llama, steer.Record("ann", "what she wrote", "asked"))
    with pytest.raises(steer.SteerError, match="are scored alone"):
        row_losses(llama, span, [contrast, vectors], 1)
    llama.model.config.max_position_embeddings = 20
    with pytest.raises(steer.SteerError, match="have 27 tokens and the model's window is 20"):
        row_losses(llama, span, [contrast], 1)


def test_a_prompt_is_read_whole_by_every_stream_or_by_none(llama: steer.FrozenLM) -> None:
    """A span cuts a long prompt; behind a context nothing is cut, and then it is nowhere."""
    record = steer.Record("ann", "what she wrote", "what was asked, at some length")
    cut, uncut = (record_span(llama, record, max_tokens=tokens) for tokens in (30, 1024))
    assert cut.start < uncut.start
    neutral = Mixture((Stream(0.0, "I sail."), Stream(1.0)))
    response = list(cut.ids[cut.start :])
    whole = Span([*uncut.ids[: uncut.start], *response], uncut.start, uncut.start + len(response))
    losses = mixed_losses(llama, cut, [None, neutral, Mixture((Stream(2.0), Stream(-1.0)))])
    assert_close(losses, response_losses(llama, [whole] * 3, [])[0])
    losses = mixed_losses(llama, cut, [None, Mixture((Stream(2.0), Stream(-1.0)))])
    assert_close(losses, response_losses(llama, [cut] * 2, [])[0])


def test_the_windows_of_all_models_are_checked_before_any_is_run(llama: steer.FrozenLM) -> None:
    span = record_span(llama, steer.Record("ann", "what she wrote", "asked " * 40))
    runs = Mock()
    llama.attachment.decoder.register_forward_pre_hook(lambda module, args: runs())
    beside = Mixture((Stream(1.0), Stream(0.5, model="small")))
    with (
        steer.wrap(tiny("opt"), tokenizer()) as small,
        pytest.raises(steer.SteerError, match="the window of the model 'small' is 200"),
    ):
        row_losses(llama, span, [steer.StreamEdit([None, beside])], 2, models={"small": small})
    assert not runs.called


def test_streams_are_read_in_passes_of_so_many_tokens(llama: steer.FrozenLM) -> None:
    """Each of them once, also where mixtures share it and where a model has two names."""
    span = record_span(llama, steer.Record("ann", "what she wrote", "asked"))
    mixtures = [None, *(Mixture.contrast(f"I sail {i}.", 1.5) for i in range(5)), Mixture.contrast("I sail 0.", 0.5)]
    mixtures.append(Mixture((Stream(1.0), Stream(0.5, model="one"), Stream(-0.5, model="other"))))
    passes: list[tuple[int, ...]] = []
    with steer.wrap(tiny("gpt2", seed=4), tokenizer()) as other:
        for lm in (llama, other):
            lm.model.register_forward_pre_hook(
                lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
            )
        found = []
        for budget in (2048, 70, 0):
            passes.clear()
            edits = [steer.StreamEdit(mixtures)]
            models = {"one": other, "other": other}
            found.append(row_losses(llama, span, edits, 8, models=models, batch_tokens=budget))
            longest = max(width for _, width in passes)
            assert sum(rows for rows, _ in passes) == 7
            assert all(rows * width <= max(budget, longest) for rows, width in passes)
    for losses in found[1:]:
        assert_close(losses, found[0])


def test_what_cannot_be_scored_is_refused_before_anything_is_run(
    llama: steer.FrozenLM, histories: list[steer.History]
) -> None:
    states = {history.user_id: steer.CoS().state("I sail.") for history in histories}
    runs, told = Mock(), Mock()
    llama.model.register_forward_pre_hook(lambda module, args: runs())
    last = histories[-1]
    for record, message in [
        (steer.Record("bob", "no prompt"), "of 'bob': a context needs a prompt"),
        (steer.Record("bob", "too long", "x" * 3000), "of 'bob': context, prompt and response have 30"),
        (steer.Record("bob", "x"), "of 'bob': a text is too short"),
    ]:
        wrong = [*histories[:-1], steer.History("bob", (*last.records, record))]
        with pytest.raises(steer.SteerError, match=message):
            score(llama, wrong, states, on_progress=told)
    assert not runs.called
    assert not told.called


def test_the_window_of_a_small_model_that_weighs_attributes() -> None:
    with (
        steer.wrap(tiny("opt"), tokenizer()) as small,
        pytest.raises(steer.SteerError, match=r"prompt and answer have 2.. tokens and the model's window is 200"),
    ):
        log_likelihoods(small, [("short", "answer"), ("x" * 198, "answer")], None)

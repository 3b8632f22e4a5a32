"""ComMer against PEFT and transformers: the compressor, its mean, and the model that neither changes nor doubles."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import WIDTH, tiny, tokenizer, unwrapped
from peft import LoraConfig, get_peft_model
from rows import assert_close
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

import steer
from steer.likelihood import response_losses
from steer.methods.commer import Compressor
from steer.read import Span, record_span
from steer.twin import twin_of

K = 3
# As different as architectures get for a compressor: scaled embeddings and windows, learned positions, none at all, and
# embeddings that are narrower than the stream.
VARIED = ["llama", "gemma3", "gpt2", "bloom", "opt_narrow"]


def commer(**settings: Any) -> steer.ComMer:
    quick = {"tokens": K, "rank": 4, "documents": 2, "steps": 3, "batch": 4, "learning_rate": 0.02, "embedding_rate": 1}
    return steer.ComMer(**quick | settings)


@dataclass(frozen=True)
class Example:
    history: Sequence[steer.Record]


@pytest.fixture(params=VARIED)
def varied(request: pytest.FixtureRequest) -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny(request.param), tokenizer()) as lm:
        yield lm


def decoder_of(model: nn.Module) -> nn.Module:
    return unwrapped(model).get_decoder()


def bare(lm: steer.FrozenLM) -> nn.Module:
    """The model once more, without any of our hooks."""
    model = type(lm.model)(copy.deepcopy(lm.model.config))
    model.load_state_dict(lm.model.state_dict())
    return model.eval()


def by_peft(lm: steer.FrozenLM, artifact: steer.Artifact) -> nn.Module:
    """The whole model with the artifact's LoRA, by PEFT alone."""
    model = bare(lm)
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    model = get_peft_model(model, config).eval()
    loaded = 0
    for name, tensor in artifact.tensors.items():
        if name.startswith("lora."):
            _, path, part, _ = name.split(".")
            layer = decoder_of(model).get_submodule(path.replace("/", "."))
            with torch.no_grad():
                getattr(layer, part)["default"].weight.copy_(tensor)
            loaded += 1
    assert loaded == sum("lora_" in name for name, _ in model.named_parameters())
    return model


@torch.no_grad()
def states_of(model: nn.Module, ids: Sequence[int], behind: Tensor) -> Tensor:
    """The last layer's states at the embeddings behind a text, one text at a time."""
    embedded = decoder_of(model).get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
    inputs = torch.cat([embedded, behind])[None]
    return unwrapped(model)(inputs_embeds=inputs, output_hidden_states=True).hidden_states[-1][0, -len(behind) :]


def loss_by_hand(lm: steer.FrozenLM, prefix: Tensor, span: Span) -> float:
    """−log p of a span, summed, with a prefix in front, by a plain forward pass."""
    ids = torch.tensor(span.ids)
    with torch.no_grad():
        embedded = lm.model.get_input_embeddings()(ids)
        logits = lm.model(inputs_embeds=torch.cat([prefix, embedded])[None]).logits[0]
    first = max(span.start, 1)
    before = logits[len(prefix) + first - 1 : len(prefix) + span.end - 1]
    return cross_entropy(before, ids[first : span.end], reduction="sum").item()


# The compressor.


def test_z_is_what_peft_computes(varied: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = commer()
    artifact = method.train(varied, histories)
    plain, adapted = bare(varied), by_peft(varied, artifact)
    behind, scale = artifact.tensors["embeddings"], artifact.settings["scale"]
    for history, state in zip(histories, method.fit_many(varied, histories), strict=True):
        documents = [varied.tokenizer(record.response).input_ids for record in history]
        expected = [scale * states_of(adapted, ids, behind) for ids in documents]
        assert_close(state.tensors["sum"].float(), torch.stack(expected).sum(0), 1e-4)
        (edit,) = method.bind(varied, [state], state, artifact)
        assert_close(edit.embeddings[0, :K], torch.stack(expected).mean(0), 1e-4)
        # LoRA has learned something, or this would show nothing.
        without = [scale * states_of(plain, ids, behind) for ids in documents]
        assert (torch.stack(expected) - torch.stack(without)).abs().max() > 0.01 * expected[0].abs().max()
    assert_close(artifact.tensors["nobody"], scale * states_of(adapted, [], behind), 1e-4)


def test_batches_keep_the_order_of_documents(llama: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.methods.commer._BATCH_TOKENS", 30)
    module = commer().module(llama).eval()
    documents = [range(5, 5 + length) for length in (7, 20, 1, 12, 0, 9, 15)]
    with torch.no_grad():
        for states, document in zip(module.compress(documents), documents, strict=True):
            assert_close(states, module.compress([document])[0])


def test_documents_may_stand_behind_their_prompts(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = commer(prompts=True, max_tokens=12)
    artifact = method.train(llama, histories)
    adapted, record = by_peft(llama, artifact), histories[1].records[1]
    ids = llama.encode(record.prompt)[-6:] + llama.tokenizer(record.response).input_ids
    state = method.fit(llama, steer.History("bob", (record,)))
    expected = states_of(adapted, ids[:12], artifact.tensors["embeddings"])
    assert_close(state.tensors["sum"].float(), artifact.settings["scale"] * expected, 1e-4)


def test_the_prefix_goes_to_the_model_without_lora(varied: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = commer()
    artifact = method.train(varied, histories)
    states = method.fit_many(varied, histories)
    spans = [record_span(varied, history.records[-1]) for history in histories]
    losses, _ = response_losses(varied, spans, method.bind(varied, states, states[0], artifact))
    for loss, state, span in zip(losses.tolist(), states, spans, strict=True):
        prefix = (state.tensors["sum"] / 3).float()
        assert loss == pytest.approx(loss_by_hand(varied, prefix, span), rel=1e-4)
        assert loss != pytest.approx(loss_by_hand(varied, prefix[:0], span), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(histories: list[steer.History], dtype: torch.dtype) -> None:
    with steer.wrap(tiny("llama", dtype=dtype), tokenizer()) as lm:
        method = commer()
        artifact = method.train(lm, histories)
        assert {tensor.dtype for tensor in artifact.tensors.values()} == {torch.float32}
        half = method.fit(lm, histories[0])
    with steer.wrap(tiny("llama"), tokenizer()) as lm:
        method.use(lm, artifact)
        assert_close(half.tensors["sum"], method.fit(lm, histories[0]).tensors["sum"], 0.1)


def test_scale_is_that_of_the_table_or_given(varied: steer.FrozenLM) -> None:
    module, raw = commer(tokens=20).module(varied).eval(), commer(scale=1.0).module(varied).eval()
    with torch.no_grad():
        table = varied.model.get_input_embeddings()(torch.arange(100))
        states = module.compress([range(5, 15), range(30, 45)])
        assert_close(raw.compress([range(5, 15)])[0], states_of(varied.model, range(5, 15), raw.embeddings))
    assert states.norm(dim=-1).median().item() == pytest.approx(table.norm(dim=-1).median().item(), rel=0.2)
    assert raw.scale == 1
    assert commer(tokens=20, seed=1).module(varied).scale == module.scale
    assert module.rates == {"embeddings": pytest.approx(table.square().mean().sqrt().item(), rel=0.1)}


# The model beside it.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_no_weight_is_copied_and_none_of_the_models_is_registered(arch: str, tied: bool) -> None:
    model = tiny(arch)
    if tied:
        model.config.tie_word_embeddings = True
        model.set_output_embeddings(nn.Linear(WIDTH, 100, bias=False))
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    with steer.wrap(model, tokenizer()) as lm:
        twin, theirs = twin_of(lm), decoder_of(model)
        for mine, own in ((twin.named_parameters(), theirs), (twin.named_buffers(), theirs)):
            for name, tensor in mine:
                module, _, key = name.rpartition(".")
                original = getattr(own.get_submodule(module), key)
                assert tensor.data_ptr() == original.data_ptr(), name
                assert (tensor is original) == (not isinstance(tensor, nn.Parameter))
                assert not tensor.requires_grad
        assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}

        module = commer().module(lm)
        known = {parameter.data_ptr() for parameter in model.parameters()}
        layers = sum(isinstance(m, nn.Linear | Conv1D) for m in theirs.modules())
        assert len(list(module.parameters())) == 1 + 2 * layers
        assert not known & {parameter.data_ptr() for parameter in module.parameters()}
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert list(module.state_dict()) == [name for name, _ in module.named_parameters()]
        frozen = [p for p in module._frozen[0].parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in frozen} == {p.data_ptr() for p in theirs.parameters()}


def test_the_model_stays_as_it_is_and_gets_no_gradient(varied: steer.FrozenLM, histories: list[steer.History]) -> None:
    model = varied.model
    ids = torch.arange(5, 25)[None]

    def logits() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    before, weights = logits(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    method = commer()
    method.train(varied, histories)
    method.fit_many(varied, histories)
    module = method.module(varied).train()
    record = histories[0].records[2]
    losses, _ = response_losses(
        varied, [record_span(varied, record)], module.edits([Example(histories[0].records[:2])])
    )
    losses.sum().backward()
    assert torch.equal(logits(), before)
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    for parameter in [*model.parameters(), *module._frozen[0].parameters()]:
        assert parameter.grad is None or any(parameter is own for own in module.parameters())
    assert module.embeddings.grad.abs().sum() > 0
    grown = [part.lora_B.weight.grad.abs().sum() > 0 for part in module.lora.values()]
    assert all(grown)


def test_a_model_with_adapters_of_its_own(histories: list[steer.History]) -> None:
    """They run in the compressor as in the model, and are not trained."""
    with steer.wrap(tiny("llama_lora"), tokenizer()) as lm:
        own = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
        module = commer(scale=1.0).module(lm).eval()
        expected = states_of(lm.model, range(5, 12), module.embeddings)
        assert_close(module.compress([range(5, 12)])[0].detach(), expected)
        assert len(list(module.parameters())) == 1 + 2 * 3 * 7
        commer().train(lm, histories)
        assert all(torch.equal(tensor, own[name]) for name, tensor in lm.model.state_dict().items())
        assert lm.model.active_adapters == ["default"]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("library", ["transformer_lens", "nnsight"])
def test_a_model_inside_of_another_library(arch: str, library: str) -> None:
    """Its compressor is that of the plain model, weights and names."""
    peer = pytest.importorskip(library)
    if library == "nnsight":
        model = peer.TransformersModel(tiny(arch), tokenizer=tokenizer())
    else:
        builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
        model = builder.build_bridge_from_module(tiny(arch), type(tiny(arch)).__name__, hf_config=tiny(arch).config)
    module = commer(dropout=0.0).module(steer.wrap(model, tokenizer()))
    for part in module.lora.values():
        nn.init.normal_(part.lora_B.weight)
    with steer.wrap(tiny(arch), tokenizer()) as lm:
        plain = commer(dropout=0.0).module(lm)
        plain.load_state_dict(module.state_dict())
        assert_close(module.compress([range(5, 12)]), plain.compress([range(5, 12)]))


# The mean.


def test_records_come_and_go(varied: steer.FrozenLM, histories: list[steer.History]) -> None:
    method, records = commer(), histories[1].records
    method.train(varied, histories)
    whole = method.fit(varied, histories[1])
    first = method.fit(varied, steer.History("bob", records[:1]))
    assert first.tensors["sum"].dtype == torch.float64
    assert first.tensors["sum"].shape == (K, varied.width_at(steer.Site("embed")))
    more = method.update(varied, first, records[1:])
    assert more.provenance == whole.provenance
    assert_close(more.tensors["sum"], whole.tensors["sum"], 1e-5)
    back = method.remove(varied, more, records[1:])
    assert back.provenance == first.provenance
    assert_close(back.tensors["sum"], first.tensors["sum"], 1e-14)
    last = method.fit(varied, steer.History("bob", records[2:]))
    assert_close(method.remove(varied, whole, records[:2]).tensors["sum"], last.tensors["sum"], 1e-5)


def test_an_update_reads_what_is_new(
    llama: steer.FrozenLM, histories: list[steer.History], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, records = commer(), histories[0].records
    method.train(llama, histories)
    state = method.fit(llama, steer.History("ann", records[:2]))
    read: list[int] = []
    run = Compressor._run
    monkeypatch.setattr(Compressor, "_run", lambda self, *given: read.append(len(given[0])) or run(self, *given))
    state = method.update(llama, state, records[2:])
    method.remove(llama, state, records[:1])
    assert read == [1, 1]


def test_many_users_are_each_alone(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method, told = commer(), []
    method.train(llama, histories)
    nobody = steer.History("eve", ())
    states = method.fit_many(llama, [nobody, *histories], told.append)
    for history, state in zip([nobody, *histories], states, strict=True):
        alone = method.fit(llama, history)
        assert alone.provenance == state.provenance
        assert_close(state.tensors["sum"], alone.tensors["sum"], 1e-5)
    assert told == sorted(told)
    assert told[-1] == 1
    newest = method.fit(llama, histories[0], documents=2)
    assert newest.provenance.records == tuple(record.id for record in histories[0].records[1:])
    assert method.fit_many(llama, []) == []


def test_a_user_without_records_has_the_prefix_of_nobody(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = commer()
    artifact = method.train(llama, histories)
    new = method.fit(llama, steer.History("eve", ()))
    assert new.provenance.records == ()
    prefix = steer.PrefixEdit.from_rows([artifact.tensors["nobody"], None], WIDTH)
    found = llama.generate_tokens(["hello"] * 2, states=[new, None], artifacts=[artifact], max_new_tokens=8)
    assert found == llama.generate_tokens(["hello"] * 2, edits=[prefix], max_new_tokens=8)
    assert found[1] == llama.generate_tokens(["hello"], max_new_tokens=8)[0]
    known = method.update(llama, new, histories[0].records)
    assert_close(known.tensors["sum"], method.fit(llama, histories[0]).tensors["sum"], 1e-5)


def test_states_survive_a_bank(llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path) -> None:
    method = commer()
    artifact = method.train(llama, histories)
    states = method.fit_many(llama, histories)
    direct = llama.generate_tokens(["hello"] * 2, states=states, artifacts=[artifact], max_new_tokens=8)
    bank = steer.Bank(tmp_path / "people.bank")
    bank.put_artifact(artifact)
    bank.update({(history.user_id, "texts"): state for history, state in zip(histories, states, strict=True)})
    stored = steer.Bank(tmp_path / "people.bank")
    assert llama.generate_tokens(["hello"] * 2, users=["ann", "bob"], bank=stored, max_new_tokens=8) == direct
    later = steer.ComMer()
    later.use(llama, stored.artifact(artifact.hash))
    back = later.remove(llama, stored["ann", "texts"], histories[0].records[:1])
    expected = method.fit(llama, steer.History("ann", histories[0].records[1:]))
    assert_close(back.tensors["sum"], expected.tensors["sum"], 1e-5)
    assert states[0].nbytes == 8 * K * WIDTH


# Training.


def letters(users: str, count: int = 4) -> list[steer.History]:
    """Each user writes one letter over and over, so that nothing but the history tells which."""
    return [
        steer.History(user, tuple(steer.Record(user, user * (6 + i), "say it", str(i)) for i in range(count)))
        for user in users
    ]


def test_what_can_only_be_known_from_the_history_is_learned(llama: steer.FrozenLM) -> None:
    users = letters("axQ7")
    losses: list[float] = []
    method = commer(tokens=2, rank=8, dropout=0.0, steps=60, batch=8, learning_rate=0.01, embedding_rate=10.0)
    artifact = method.train(llama, users, on_step=lambda step, loss: losses.append(loss))
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    states = method.fit_many(llama, [steer.History(user.user_id, user.records[:2]) for user in users])
    spans = [record_span(llama, user.records[3]) for user in users]

    def mean(states: Sequence[steer.UserState | None]) -> float:
        with torch.no_grad():
            sums, counts = response_losses(llama, spans, method.bind(llama, states, like, artifact))
        return (sums.sum() / counts.sum()).item()

    like = states[0]
    own, others, none = mean(states), mean([*states[1:], states[0]]), mean([None] * 4)
    nobody = mean([method.fit(llama, steer.History("eve", ()))] * 4)
    assert own < nobody - 0.5
    assert own < others - 1
    assert own < none - 1


def test_a_step_predicts_a_record_from_those_before_it(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    """Before LoRA has learned anything the compressor is the model itself."""
    losses: list[float] = []
    text = "a text by nobody that one knows"
    method = commer(pretrain_steps=1, steps=1, batch=4, dropout=0.0, nobody=0.0, learning_rate=0.0)
    artifact = method.train(llama, histories, texts=[text], on_step=lambda step, loss: losses.append(loss))
    behind, scale = artifact.tensors["embeddings"], artifact.settings["scale"]

    def z(text: str) -> Tensor:
        return scale * states_of(llama.model, llama.tokenizer(text).input_ids, behind)

    itself = record_span(llama, steer.Record("", text))
    assert losses[0] == pytest.approx(loss_by_hand(llama, z(text), itself) / (itself.end - 1), rel=1e-4)
    total, tokens = 0.0, 0
    for history in histories:
        for i in (1, 2):
            prefix = torch.stack([z(record.response) for record in history.records[:i]]).mean(0)
            span = record_span(llama, history.records[i])
            total, tokens = total + loss_by_hand(llama, prefix, span), tokens + span.end - span.start
    assert losses[1] == pytest.approx(total / tokens, rel=1e-4)


def test_pretraining_makes_a_text_known_from_its_z(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    texts = [letter * 8 for letter in "bcdefg"]
    losses: list[float] = []
    method = commer(tokens=2, rank=8, dropout=0.0, pretrain_steps=40, steps=1, embedding_rate=10.0)
    method.train(llama, histories, texts=texts, on_step=lambda step, loss: losses.append(loss))
    assert len(losses) == 41
    assert sum(losses[35:40]) < 0.7 * sum(losses[:5])


def test_training_follows_its_seed_alone(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    def trained(seed: int, noise: int) -> str:
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        artifact = commer(seed=seed, dropout=0.5, documents=1, nobody=0.3).train(llama, histories)
        assert torch.equal(torch.get_rng_state(), before)
        return artifact.hash

    assert trained(0, 1) == trained(0, 2)
    assert trained(0, 1) != trained(1, 1)


def test_dropout_is_loras_alone_and_in_training_alone(histories: list[steer.History]) -> None:
    # GPT-2 has dropout of its own.
    with steer.wrap(tiny("gpt2"), tokenizer()) as lm:
        for dropout, alike in ((0.0, True), (0.5, False)):
            module = commer(dropout=dropout).module(lm)
            for part in module.lora.values():
                nn.init.normal_(part.lora_B.weight)
            once, twice = (module.train().compress([range(5, 12)]) for _ in range(2))
            assert torch.equal(once, twice) == alike
            once, twice = (module.eval().compress([range(5, 12)]) for _ in range(2))
            assert torch.equal(once, twice)


def test_examples_have_few_documents_in_training_and_all_of_them_else(
    llama: steer.FrozenLM, histories: list[steer.History]
) -> None:
    records = [record for history in histories for record in history]
    examples = [Example(records), Example(records[:1]), Example(())]
    module = commer(documents=2, nobody=0.0, dropout=0.0).module(llama)
    with torch.no_grad():
        # One by one, so that their order is told here and not by the batches.
        each = torch.cat([module.eval().compress([module.document(record)]) for record in [*records, None]])
        (edit,) = module.eval().edits(examples)
        assert edit.lengths.tolist() == [K] * 3
        assert_close(edit.embeddings, torch.stack([each[:-1].mean(0), each[0], each[-1]]))
        pairs = [(a + b) / 2 for i, a in enumerate(each[:-1]) for b in each[:i]]
        found = [module.train().edits(examples[:1])[0].embeddings[0] for _ in range(5)]
        for prefix in found:
            assert min((prefix - pair).abs().max() for pair in pairs) < 1e-5
        assert max((prefix - found[0]).abs().max() for prefix in found) > 1e-3
        module.settings.nobody = 0.99
        lost = [module.edits(examples[:1])[0].embeddings[0] for _ in range(5)]
        assert sum(bool((prefix - each[-1]).abs().max() < 1e-5) for prefix in lost) >= 4


def test_a_module_can_be_stored_and_go_on(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = commer()
    artifact = method.train(llama, histories)
    module = method.module(llama)
    module.load_state_dict({name: tensor for name, tensor in artifact.tensors.items() if name != "nobody"})
    assert method.artifact_of(llama, module).hash == artifact.hash


# What cannot be.


def test_bad_input(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    for settings, message in [
        ({"tokens": 0}, "tokens=0 must be 1 or more"),
        ({"scale": "embedding"}, 'neither "table" nor a number'),
        ({"nobody": 1.0}, "is not a share"),
        ({"dropout": 1.0}, "is not a share"),
    ]:
        with pytest.raises(steer.SteerError, match=message):
            commer(**settings)
    with pytest.raises(steer.SteerError, match=r"call train\("):
        commer().fit(llama, histories[0])
    alone = [steer.History(history.user_id, history.records[:1]) for history in histories]
    with pytest.raises(steer.SteerError, match="at least two records"):
        commer().train(llama, alone)
    with pytest.raises(steer.SteerError, match="pretrain_steps need texts"):
        commer(pretrain_steps=1).train(llama, histories)
    with pytest.raises(steer.SteerError, match="cannot have LoRA"):
        commer(targets=["no_such_layer"]).module(llama)
    with pytest.raises(steer.SteerError, match="is an embedding"):
        commer(targets=["embed_tokens", "q_proj"]).module(llama)
    with pytest.raises(steer.SteerError, match="lower tokens"):
        commer(tokens=5_000).module(llama)

    method = commer()
    method.train(llama, histories)
    state, records = method.fit(llama, histories[0]), histories[0].records
    with pytest.raises(steer.SteerError, match="in the state already"):
        method.update(llama, state, records[:1])
    with pytest.raises(steer.SteerError, match="is not in the state"):
        method.remove(llama, state, histories[1].records[:1])
    with pytest.raises(steer.SteerError, match="no record would be left"):
        method.remove(llama, state, records)
    method.train(llama, histories[:1])
    with pytest.raises(steer.SteerError, match="not fitted by this method as it is now"):
        method.remove(llama, state, records[:1])


def test_targets_can_be_named(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = commer(targets=("q_proj", "v_proj"))
    artifact = method.train(llama, histories)
    assert sum(name.endswith("lora_A.weight") for name in artifact.tensors) == 2 * 3
    assert math.isfinite(method.fit(llama, histories[0]).tensors["sum"].sum())

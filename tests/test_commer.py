"""ComMer against PEFT and transformers: the compressor, its mean, and the model that neither changes nor doubles."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import WIDTH, tiny, tokenizer, unwrapped
from peft import LoraConfig, get_peft_model
from rows import assert_close
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import steer
from steer.cli.app import app
from steer.encoders import Merged
from steer.likelihood import response_losses
from steer.methods.commer import Compressor
from steer.read import Span, record_span
from steer.train import load_artifact, method_of, train_method
from steer.train.examples import Example
from steer.train.trainer import parameter_groups
from steer.twin import twin_of

K = 3
# As different as architectures get for a compressor: scaled embeddings and windows, learned positions, none at all, and
# embeddings that are narrower than the stream.
VARIED = ["llama", "gemma3", "gpt2", "bloom", "opt_narrow"]


def commer(**settings: Any) -> steer.ComMer:
    return steer.ComMer(**{"tokens": K, "rank": 4, "documents": 2, "embedding_rate": 1.0} | settings)


def trained(method: steer.ComMer, lm: steer.FrozenLM, histories: Sequence[steer.History]) -> steer.Artifact:
    """Made and used, after a few steps by hand: nothing here is about the trainer."""
    module = method.module(lm).train()
    examples = [example(lm, history, len(history) - 1) for history in histories]
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(parameter_groups(module, 0.02, 0.0))
        for _ in range(3):
            optimizer.zero_grad()
            losses, _ = response_losses(lm, [one.span for one in examples], module.edits(examples))
            losses.sum().backward()
            optimizer.step()
    method.use(lm, method.artifact_of(lm, module))
    return method.artifact


def example(lm: steer.FrozenLM, history: steer.History, place: int) -> Example:
    record = history.records[place]
    return Example(history.first(place), record, record_span(lm, record))


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
    artifact = trained(method, varied, histories)
    plain, adapted = bare(varied), by_peft(varied, artifact)
    behind, scale = artifact.tensors["embeddings"], artifact.settings["factor"]
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
    artifact = trained(method, llama, histories)
    adapted, record = by_peft(llama, artifact), histories[1].records[1]
    ids = llama.encode(record.prompt)[-6:] + llama.tokenizer(record.response).input_ids
    state = method.fit(llama, steer.History("bob", (record,)))
    expected = states_of(adapted, ids[:12], artifact.tensors["embeddings"])
    assert_close(state.tensors["sum"].float(), artifact.settings["factor"] * expected, 1e-4)


def test_the_prefix_goes_to_the_model_without_lora(varied: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = commer()
    artifact = trained(method, varied, histories)
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
        artifact = trained(method, lm, histories)
        assert {tensor.dtype for tensor in artifact.tensors.values()} == {torch.float32}
        half = method.fit(lm, histories[0])
        first = method.remove(lm, half, histories[0].records[1:])
        assert torch.equal(first.tensors["sum"], method.fit(lm, histories[0].first(1)).tensors["sum"])
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
    assert commer(tokens=20).module(varied).scale == module.scale
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
    trained(method, varied, histories)
    method.fit_many(varied, histories)
    module = method.module(varied).train()
    own = example(varied, histories[0], 2)
    losses, _ = response_losses(varied, [own.span], module.edits([own]))
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
        trained(commer(), lm, histories)
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


# Documents.


def test_a_document_of_several_examples_is_compressed_once_in_passes_of_a_bounded_size(
    llama: steer.FrozenLM, histories: list[steer.History], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither that nor who else is in the batch changes prefixes or gradients."""
    examples = [example(llama, history, place) for history in histories for place in (1, 2, 1)]
    module = commer(dropout=0.0).module(llama).eval()
    for part in module.lora.values():
        nn.init.normal_(part.lora_B.weight, std=0.1)

    def together() -> tuple[Tensor, list[Tensor]]:
        (edit,) = module.edits(examples)
        gradients = torch.autograd.grad(edit.embeddings.square().sum(), list(module.parameters()))
        return edit.embeddings.detach(), list(gradients)

    passes: list[list[int]] = []
    run = Compressor._run
    monkeypatch.setattr(
        Compressor, "_run", lambda self, *given: passes.append([len(d) for d in given[0]]) or run(self, *given)
    )
    prefixes, gradients = together()
    assert [len(one) for one in passes] == [4]
    for prefix, one in zip(prefixes, examples, strict=True):
        assert_close(prefix, module.edits([one])[0].embeddings[0].detach())
    passes.clear()
    monkeypatch.setattr("steer.methods.commer._BATCH_TOKENS", 40)
    bounded, own = together()
    assert len(passes) > 2
    assert max(len(one) * (max(one) + K) for one in passes) <= 40
    assert_close(bounded, prefixes)
    for a, b in zip(own, gradients, strict=True):
        assert_close(a, b)


def test_an_example_has_its_newest_documents(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    whole = histories[0]
    own, first = example(llama, whole, 2), example(llama, whole, 0)
    with torch.no_grad():

        def prefix(one: Example, train: bool = False, **settings: Any) -> Tensor:
            module = commer(dropout=0.0, nobody=0.0, **settings) if not settings.get("nobody") else commer(**settings)
            torch.manual_seed(0)
            module = module.module(llama).train(train)
            return module.edits([one])[0].embeddings[0, :K]

        torch.manual_seed(0)
        module = commer().module(llama).eval()
        each = [module.compress([module.document(record)])[0] for record in whole]
        nobody = module.compress([()])[0]
        assert_close(prefix(own), (each[0] + each[1]) / 2)
        assert_close(prefix(own, documents=1), each[1])
        assert_close(prefix(own, documents=9), (each[0] + each[1]) / 2)
        assert_close(prefix(first), nobody)
        # In training alone.
        likely: dict[str, Any] = {"dropout": 0.0, "documents": 1}
        assert_close(prefix(own, nobody=0.999, **likely), each[1])
        assert_close(prefix(own, train=True, nobody=0.999, **likely), nobody)
        likely = {"documents": 1, "autoencoding": 0.999}
        assert_close(prefix(own, **likely), each[1])
        assert_close(prefix(own, train=True, **likely), each[2])


def test_long_documents_are_cut(llama: steer.FrozenLM) -> None:
    record = steer.Record("ann", "a long text that goes on and on", "say it")
    ids = llama.tokenizer(record.response).input_ids
    assert list(commer(max_tokens=6).module(llama).document(record)) == ids[:6]
    assert list(commer(max_tokens=600).module(llama).document(record)) == ids
    assert len(commer(prompts=True, max_tokens=6).module(llama).document(record)) == 6
    # The window holds them and the embeddings.
    assert llama.window is not None
    module = commer(tokens=llama.window - 5, max_tokens=600).module(llama)
    assert list(module.document(record)) == ids[:5]
    assert len(commer().module(llama).document(steer.Record("ann", "a"))) == 1


# The mean.


def test_records_come_and_go(varied: steer.FrozenLM, histories: list[steer.History]) -> None:
    """What is taken out leaves no trace."""
    method, whole = commer(), histories[1]
    trained(method, varied, histories)
    state = method.fit(varied, whole)
    assert state.tensors["sum"].dtype == torch.float64
    assert state.tensors["sum"].shape == (K, varied.width_at(steer.Site("embed")))
    for count in range(4):
        first = method.fit(varied, whole.first(count))
        more = method.update(varied, first, whole.records[count:])
        assert more.provenance == state.provenance
        assert torch.equal(more.tensors["sum"], state.tensors["sum"])
        back = method.remove(varied, more, whole.records[count:])
        assert back.provenance == first.provenance
        assert torch.equal(back.tensors["sum"], first.tensors["sum"])
    last = method.fit(varied, steer.History("bob", whole.records[2:]))
    assert torch.equal(method.remove(varied, state, whole.records[:2]).tensors["sum"], last.tensors["sum"])


def test_an_update_reads_what_is_new(
    llama: steer.FrozenLM, histories: list[steer.History], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, whole = commer(), histories[0]
    trained(method, llama, histories)
    state = method.fit(llama, whole.first(2))
    read: list[int] = []
    run = Compressor._run
    monkeypatch.setattr(Compressor, "_run", lambda self, *given: read.append(len(given[0])) or run(self, *given))
    state = method.update(llama, state, steer.History("ann", whole.records[2:]))
    method.remove(llama, state, whole.records[:1])
    assert read == [1, 1]


def test_a_user_without_records_has_the_prefix_of_nobody(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = commer()
    artifact = trained(method, llama, histories)
    new = method.fit(llama, steer.History("eve", ()))
    assert new.provenance.records == ()
    prefix = steer.PrefixEdit.from_rows([artifact.tensors["nobody"], None], WIDTH)
    found = llama.generate_tokens(["hello"] * 2, states=[new, None], artifacts=[artifact], max_new_tokens=8)
    assert found == llama.generate_tokens(["hello"] * 2, edits=[prefix], max_new_tokens=8)
    assert found[1] == llama.generate_tokens(["hello"], max_new_tokens=8)[0]


def test_states_survive_a_bank(llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path) -> None:
    method = commer()
    artifact = trained(method, llama, histories)
    states = method.fit_many(llama, histories)
    direct = llama.generate_tokens(["hello"] * 2, states=states, artifacts=[artifact], max_new_tokens=8)
    bank = steer.Bank(tmp_path / "people.bank")
    bank.put_artifact(artifact)
    bank.update({(history.user_id, "texts"): state for history, state in zip(histories, states, strict=True)})
    stored = steer.Bank(tmp_path / "people.bank")
    assert llama.generate_tokens(["hello"] * 2, users=["ann", "bob"], bank=stored, max_new_tokens=8) == direct
    later = method_of(llama, stored.artifact(artifact.hash))
    assert isinstance(later, steer.ComMer)
    back = later.remove(llama, stored["ann", "texts"], histories[0].records[:1])
    expected = method.fit(llama, steer.History("ann", histories[0].records[1:]))
    assert torch.equal(back.tensors["sum"], expected.tensors["sum"])
    assert states[0].nbytes == 8 * K * WIDTH
    assert Merged(3, states[0].tensors["sum"]).mean.shape == (K, WIDTH)


# Training.


def letters(users: str, count: int = 4) -> list[steer.History]:
    """Each user writes one letter over and over, so that nothing but the history tells which."""
    return [
        steer.History(user, tuple(steer.Record(user, user * (6 + i), "say it", str(i)) for i in range(count)))
        for user in users
    ]


def test_what_can_only_be_known_from_the_history_is_learned(llama: steer.FrozenLM, tmp_path: Path) -> None:
    users = letters("axQ7")
    method = commer(tokens=2, rank=8, dropout=0.0, embedding_rate=10.0)
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    artifact, result = train_method(
        llama, method, users, out=tmp_path / "run", steps=60, batch=8, learning_rate=0.01, strangers=0, later=0.25
    )
    assert result.losses["later"] < 0.5 * next(entry["eval_loss"] for entry in result.log if "eval_loss" in entry)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.model.state_dict().items())
    # Of the model, nothing is in the checkpoint.
    weights = load_file(result.checkpoint / "model.safetensors")
    parts = {name.rpartition(".lora_")[2] if ".lora_" in name else name for name in weights}
    assert parts == {"module.embeddings", "A.weight", "B.weight"}
    assert load_artifact(tmp_path / "run").tensors.keys() == {n.removeprefix("module.") for n in weights} | {"nobody"}

    states = method.fit_many(llama, [user.first(2) for user in users])
    spans = [record_span(llama, user.records[3]) for user in users]

    def mean(states: Sequence[steer.UserState | None]) -> float:
        with torch.no_grad():
            sums, counts = response_losses(llama, spans, method.bind(llama, states, like, artifact))
        return (sums.sum() / counts.sum()).item()

    like = states[0]
    own, others, none = mean(states), mean([*states[1:], states[0]]), mean([None] * 4)
    assert own < mean([method.fit(llama, steer.History("eve", ()))] * 4) - 0.5
    assert own < others - 1
    assert own < none - 1


def test_autoencoding_makes_a_text_known_from_its_z(llama: steer.FrozenLM, tmp_path: Path) -> None:
    """Nobody's earlier texts tell anything here."""
    users = [
        steer.History(a + b, (steer.Record("", a * 8, id="1"), steer.Record("", b * 8, id="2")))
        for a, b in ["bc", "cd", "de", "ef", "fg", "gb"]
    ]
    method = commer(tokens=2, rank=8, dropout=0.0, nobody=0.0, autoencoding=0.99, embedding_rate=10.0)
    settings: dict[str, Any] = {"steps": 40, "batch": 6, "learning_rate": 0.01, "later": 0, "strangers": 0}
    artifact, _ = train_method(llama, method, users, out=tmp_path / "run", **settings)
    states = [method.fit(llama, steer.History("", (user.records[1],))) for user in users]
    spans = [record_span(llama, user.records[1]) for user in users]

    def total(states: Sequence[steer.UserState]) -> float:
        with torch.no_grad():
            return response_losses(llama, spans, method.bind(llama, states, states[0], artifact))[0].sum().item()

    assert total(states) < 0.7 * total([*states[1:], states[0]])


def test_the_command_trains_with_its_own_settings(
    llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.cli.options.load", lambda *_: llama)
    file = tmp_path / "texts.jsonl"
    lines = [{"user_id": r.user_id, "text": r.response, "id": r.id, "prompt": r.prompt} for h in histories for r in h]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["train", "commer", file, "--out", tmp_path / "run", "--steps", 2, "--batch", 2, "--learning-rate", 0.02]
    for setting in ("tokens=3", "rank=4", 'targets=["q_proj"]'):
        asked += ["--set", setting]
    asked += ["--strangers", 0, "--later", 0, "--seed", 5]
    result = CliRunner().invoke(app, [str(word) for word in asked], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    method = commer(documents=8, embedding_rate=100.0, targets=["q_proj"])
    settings: dict[str, Any] = {"steps": 2, "batch": 2, "learning_rate": 0.02, "later": 0, "strangers": 0, "seed": 5}
    artifact, _ = train_method(llama, method, histories, out=tmp_path / "own", **settings)
    assert load_artifact(tmp_path / "run").hash == artifact.hash


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


# What cannot be.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens=0 is no count"),
        ({"documents": 0}, "documents=0 is no count"),
        ({"documents": 2.5}, "documents=2.5 is no count"),
        ({"scale": "embedding"}, 'neither "table" nor a number'),
        ({"scale": 0.0}, 'neither "table" nor a number'),
        ({"nobody": 1.0}, "is not a share"),
        ({"dropout": 1.0}, "is not a share"),
        ({"nobody": 0.6, "autoencoding": 0.6}, "more than all examples"),
        ({"embedding_rate": -1.0}, "is below 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(steer.SteerError, match=message):
        commer(**settings)


def test_what_cannot_be_trained(llama: steer.FrozenLM) -> None:
    with pytest.raises(steer.SteerError, match="cannot have LoRA"):
        commer(targets=["no_such_layer"]).module(llama)
    with pytest.raises(steer.SteerError, match="is an embedding"):
        commer(targets=["embed_tokens", "q_proj"]).module(llama)
    with pytest.raises(steer.SteerError, match="lower tokens"):
        commer(tokens=5_000).module(llama)


def test_states_that_are_refused(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    with pytest.raises(steer.SteerError, match="shared weights come first"):
        commer().fit(llama, histories[0])
    method = commer()
    artifact = trained(method, llama, histories)
    state, records = method.fit(llama, histories[0]), histories[0].records
    with pytest.raises(steer.SteerError, match="in the state already"):
        method.update(llama, state, records[:1])
    with pytest.raises(steer.SteerError, match="is not in the state"):
        method.remove(llama, state, histories[1].records[:1])
    other = commer(documents=1)
    with pytest.raises(steer.SteerError, match="trained with documents=2, this has 1"):
        other.use(llama, artifact)
    assert other.artifact is None
    trained(method, llama, histories[:1])
    with pytest.raises(steer.SteerError, match="fitted with other shared weights"):
        method.remove(llama, state, records[:1])


def test_targets_can_be_named(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = commer(targets=("q_proj", "v_proj"))
    artifact = trained(method, llama, histories)
    assert sum(name.endswith("lora_A.weight") for name in artifact.tensors) == 2 * 3
    assert method.fit(llama, histories[0]).tensors["sum"].isfinite().all()

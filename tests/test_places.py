"""Soft tokens at places in the prompt: what real tokens there give, in every kind of prompt and way to decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import BOS, WIDTH, tiny, tokenizer
from rows import Generated, assert_close
from torch import Tensor

import steer
from steer import Place, PrefixEdit, PromptPrefix, ResidualEdit, Site
from steer.inject import Edit
from steer.likelihood import response_losses
from steer.read import record_span

# What stands in front of each row's prompt, and at two places in it.
FRONT = ["Dear ", "", "", "Hi "]
NAME = ["Ann", "", "Bartholomew", "Jo"]
TASTE = ["", "tea", "long walks", "x"]


def prompt(row: int, front: str = "", name: Any = None, taste: Any = None) -> list[Any]:
    """A prompt in pieces. The second has the places the other way round, and the last begins with one."""
    name, taste = Place("name") if name is None else name, Place("taste") if taste is None else taste
    pieces = [
        ["I am ", name, ", and I like ", taste, ". So?"],
        ["I like ", taste, " very much. And I am ", name],
        ["I am ", name, taste, "."],
        [name, " likes ", taste, "!"],
    ][row]
    return [front, *pieces]


PROMPTS = [prompt(row) for row in range(4)]
TEXTS = ["".join(prompt(row, FRONT[row], NAME[row], TASTE[row])) for row in range(4)]


def embedded(lm: steer.FrozenLM, texts: Sequence[str]) -> list[Tensor | None]:
    """The model's own embeddings of texts: as soft tokens they are these texts."""
    embed = lm.model.get_input_embeddings()
    return [embed(torch.tensor(tokenizer()(text).input_ids)).detach() if text else None for text in texts]


def edits_of(lm: steer.FrozenLM) -> list[Edit]:
    return [
        PrefixEdit.from_rows(embedded(lm, TASTE), WIDTH, place="taste"),
        PrefixEdit.from_rows(embedded(lm, FRONT), WIDTH),
        PrefixEdit.from_rows(embedded(lm, NAME), WIDTH, place="name"),
    ]


def generate(lm: steer.FrozenLM, prompts: Sequence[Any], edits: Sequence[Edit], **settings: Any) -> Generated:
    settings = {"max_new_tokens": 6, "do_sample": False} | settings
    with lm.steered(states=[None] * len(prompts), edits=edits) as steering:
        batch = steering.prepare(prompts)
        output = lm.model.generate(
            **batch, **steering.generate_kwargs(), return_dict_in_generate=True, output_logits=True, **settings
        )
    return Generated(output.sequences[:, batch["input_ids"].shape[1] :], torch.stack(output.logits, dim=1))


def assert_same(found: Generated, expected: Generated) -> None:
    assert_close(found.logits, expected.logits)
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 4, "max_cache_len": 96},
    ],
    ids=str,
)
def test_tokens_at_places_are_a_text_with_these_tokens(lm: steer.FrozenLM, settings: dict[str, Any]) -> None:
    """Three prefixes in one batch, of different lengths, in different orders, and rows without some of them."""
    if lm.model.config.model_type == "falcon" and {"cache_implementation", "prefill_chunk_size"} <= settings.keys():
        pytest.skip("transformers makes this cache for as many keys as there are heads, and this Falcon has one")
    assert_same(generate(lm, PROMPTS, edits_of(lm), **settings), generate(lm, TEXTS, [], **settings))


def test_rows_alone(lm: steer.FrozenLM) -> None:
    found = generate(lm, PROMPTS, edits_of(lm))
    for row in range(4):
        edits = [PrefixEdit(e.embeddings[[row]], e.lengths[[row]], e.place) for e in edits_of(lm)]  # type: ignore[union-attr]
        assert_close(found.logits[row], generate(lm, PROMPTS[row : row + 1], edits).logits[0])


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_and_samples(llama: steer.FrozenLM, settings: dict[str, Any]) -> None:
    settings |= {"max_new_tokens": 5} | ({"seeds": [4, 3, 2, 1]} if "do_sample" in settings else {})
    found = llama.generate_tokens(PROMPTS, edits=edits_of(llama), **settings)
    assert found == llama.generate_tokens(TEXTS, **settings)


def as_message(content: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_texts_messages_and_ids(bos: bool, chat: bool) -> None:
    with steer.wrap(tiny("llama"), tokenizer(bos=bos, chat=chat)) as lm:
        edits = [edit for edit in edits_of(lm) if edit.place]  # type: ignore[union-attr]
        texts = ["".join(prompt(row, "", NAME[row], TASTE[row])) for row in range(4)]
        kinds = [(PROMPTS, texts)]
        if chat:
            kinds.append(([as_message(pieces) for pieces in PROMPTS], [as_message(text) for text in texts]))
        plain = tokenizer()
        as_ids = [
            [part for p in pieces for part in ([p] if isinstance(p, Place) else plain(p).input_ids)]
            for pieces in PROMPTS
        ]
        kinds.append(([[BOS, *ids] for ids in as_ids], [[BOS, *plain(text).input_ids] for text in texts]))
        for prompts, expected in kinds:
            assert_same(generate(lm, prompts, edits), generate(lm, expected, []))
        # Where nobody has anything to put, nothing stands.
        assert lm.encode(["a ", Place("name"), "b"]) == lm.encode("a b")


def test_a_context_and_a_system_message_beside_places() -> None:
    with steer.wrap(tiny("llama"), tokenizer(chat=True)) as lm:
        ids, places = lm.encode_with_places(["I am ", Place("name"), "."], context="Well.", system="be brief")
        assert ids == lm.encode("I am .", context="Well.", system="be brief")
        assert lm.tokenizer.decode(ids[: places["name"]]) == "[system] be brief\n[user] Well. I am "
        assert lm.text_of(as_message(PROMPTS[0])) == lm.text_of(PROMPTS[0])
        assert lm.text_of([5, Place("name"), 6]) == lm.tokenizer.decode([5, 6])


def test_a_mark_is_in_nobodys_text(llama: steer.FrozenLM) -> None:
    """What looks like a place is text."""
    text = "{{name}} <name> Place('name')"
    assert llama.encode_with_places([text, Place("name"), text]) == (llama.encode(text * 2), {"name": len(text)})


def test_prefixes_that_depend_on_the_prompt(llama: steer.FrozenLM) -> None:
    def tokens(texts: Sequence[str]) -> Tensor:
        assert "".join(texts[0].split()) == "Iam,andIlike.So?"
        return torch.stack([torch.full((2, WIDTH), len(text) / 50) for text in texts])

    lengths = torch.tensor([2, 0, 1, 2])
    asking = PromptPrefix(tokens, lengths, WIDTH, place="name")
    fixed = PrefixEdit(tokens([llama.text_of(pieces) for pieces in PROMPTS]), lengths, "name")
    other = PrefixEdit.from_rows(embedded(llama, TASTE), WIDTH, place="taste")
    assert torch.equal(
        generate(llama, PROMPTS, [asking, other]).logits, generate(llama, PROMPTS, [fixed, other]).logits
    )


def test_behind_keys_and_values_and_with_vectors(llama: steer.FrozenLM) -> None:
    vectors = ResidualEdit(Site("resid_post", 1), torch.randn(4, WIDTH))
    places = [edit for edit in edits_of(llama) if edit.place]  # type: ignore[union-attr]
    front = embedded(llama, FRONT)
    given = steer.KeyValueEdit.from_rows(steer.key_values_of(llama, front))
    assert_same(generate(llama, PROMPTS, [given, vectors, *places]), generate(llama, TEXTS, [vectors]))


def test_batches_of_one_block_have_places_of_their_own(llama: steer.FrozenLM) -> None:
    edit = PrefixEdit.from_rows(embedded(llama, NAME), WIDTH, place="name")
    batches = [["I am ", Place("name")], ["And now, ", Place("name"), ", go"]]
    found = []
    with llama.steered(edits=[edit]) as steering:
        for pieces in batches:
            batch = steering.prepare([pieces] * 4)
            output = llama.model.generate(**batch, **steering.generate_kwargs(), max_new_tokens=5, do_sample=False)
            found.append(output[:, batch["input_ids"].shape[1] :].tolist())
    for pieces, tokens in zip(batches, found, strict=True):
        texts = ["".join([name if isinstance(piece, Place) else piece for piece in pieces]) for name in NAME]
        assert tokens == llama.generate_tokens(texts, max_new_tokens=5, do_sample=False)


def test_what_makes_no_sense(llama: steer.FrozenLM) -> None:
    edit = PrefixEdit.from_rows(embedded(llama, NAME), WIDTH, place="name")
    with pytest.raises(
        steer.SteerError, match="row 0 has soft tokens for the place 'name', and its prompt has no such"
    ):
        llama.generate(["hello"] * 4, edits=[edit])
    # The row without soft tokens needs no place.
    llama.generate([PROMPTS[0], "hello", *PROMPTS[2:]], edits=[edit], max_new_tokens=1)
    with pytest.raises(steer.SteerError, match="has the place 'name' twice"):
        llama.generate([[Place("name"), "a", Place("name")]] * 4, edits=[edit])
    with pytest.raises(steer.SteerError, match="cannot be combined with contrasted streams"):
        llama.generate(PROMPTS, edits=[edit, steer.StreamEdit.contrast(["x"] * 4, 1.0)])
    with (
        pytest.raises(steer.SteerError, match=r"steering\.prepare"),
        llama.steered(edits=[edit], prompt_lengths=[5] * 4),
    ):
        llama.model(torch.full((4, 5), 7))
    span = record_span(llama, steer.Record("ann", "what came", "hello"))
    with pytest.raises(steer.SteerError, match="has no such place"):
        response_losses(llama, [span] * 4, [edit])

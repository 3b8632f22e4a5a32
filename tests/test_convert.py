"""GGUF files become what they were made from: the same logits, and tokens as the reference algorithms cut them."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from steer.convert import convert_gguf
from steer.errors import SteerError

gguf = pytest.importorskip("gguf")

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
GEMMA_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LLAMA_BLOCK = GEMMA_BLOCK | {"post_attention_layernorm": "ffn_norm"}


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def add_byte_level_tokenizer(writer: Any, pre: str = "smollm") -> int:
    merges = ["h e", "Ġ Ġ", "Ċ Ċ", "l l", "he ll", "Ġ hell"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + byte_letters() + [merge.replace(" ", "") for merge in merges]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    for add, token in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 2)):
        getattr(writer, f"add_{add}_token_id")(token)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    return len(tokens)


def sentencepiece_vocabulary() -> tuple[list[str], list[int]]:
    words = ["▁t", "he", "▁the", "ab", "abab", "ba", "▁a", "in", "▁in", "ing", "aba", "▁▁x"]
    entries = [(token, CONTROL) for token in ("<pad>", "<eos>", "<bos>", "<unk>")]
    entries += [(token, USER_DEFINED) for token in ("\n", "\n\n", "  ", "   ", "<b>")]
    entries += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    entries += [(token, NORMAL) for token in (*words, *"▁abehingtx")]
    return [token for token, _ in entries], [kind for _, kind in entries]


def add_sentencepiece_tokenizer(writer: Any, add_space_prefix: bool = False) -> int:
    tokens, kinds = sentencepiece_vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for add, token in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{add}_token_id")(token)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(add_space_prefix)
    return len(tokens)


def side_by_side(weight: Tensor, heads: int) -> Tensor:
    """Reorders rows as GGUF has them for Llama: the two of each rotated plane next to one another."""
    first, second = weight.view(heads, 2, -1, weight.shape[-1]).unbind(1)
    return torch.stack([first, second], dim=2).reshape(weight.shape)


def add_tensors(writer: Any, model: Any, names: dict[str, str]) -> None:
    config = model.config
    for name, weight in model.model.state_dict().items():
        *block, layer_name = name.removesuffix(".weight").removeprefix("layers.").split(".", 1)
        if name.startswith("layers."):
            ours = f"blk.{block[0]}.{names[layer_name]}.weight"
        else:
            ours = {"embed_tokens": "token_embd", "norm": "output_norm"}[layer_name] + ".weight"
        if config.model_type == "llama" and layer_name.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if layer_name.endswith("q_proj") else config.num_key_value_heads
            weight = side_by_side(weight, heads)
        if config.model_type != "llama" and "norm" in layer_name:
            weight = weight + 1
        writer.add_tensor(ours, weight.numpy())


def add_sizes(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def randomize(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llama")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    config = LlamaConfig(
        vocab_size=add_byte_level_tokenizer(writer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    model = randomize(LlamaForCausalLM(config))
    add_sizes(writer, config)
    writer.add_rope_freq_base(500.0)
    add_tensors(writer, model, LLAMA_BLOCK)
    write(writer)
    convert_gguf(folder / "tiny.gguf", folder / "converted")
    return model, folder / "converted"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("gemma")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "gemma3")
    config = Gemma3TextConfig(
        vocab_size=add_sentencepiece_tokenizer(writer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = randomize(Gemma3ForCausalLM(config))
    add_sizes(writer, config)
    writer.add_key_length(256)
    writer.add_sliding_window(4)
    writer.add_rope_freq_base(1_000_000.0)
    add_tensors(writer, model, GEMMA_BLOCK)
    write(writer)
    convert_gguf(folder / "tiny.gguf", folder / "converted")
    return model, folder / "converted"


@pytest.fixture(scope="module")
def byte_level(llama: tuple[Any, Path]) -> Any:
    return AutoTokenizer.from_pretrained(llama[1])


@pytest.fixture(scope="module")
def sentencepiece(gemma: tuple[Any, Path]) -> Any:
    return AutoTokenizer.from_pretrained(gemma[1])


@pytest.mark.parametrize("family", ["llama", "gemma"])
@torch.no_grad()
def test_the_converted_model_computes_the_same(family: str, request: pytest.FixtureRequest) -> None:
    model, path = request.getfixturevalue(family)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    converted, report = loaded
    assert not any(report.values())
    assert type(converted) is type(model)
    assert converted.dtype == torch.float32
    ids = torch.randint(4, model.config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(1))
    # Gemma's norms went through `w + 1 - 1`.
    torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_configuration_has_the_numbers_that_were_meant(llama: tuple[Any, Path]) -> None:
    config = AutoModelForCausalLM.from_pretrained(llama[1]).config
    assert config.rms_norm_eps == 1e-5
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.tie_word_embeddings


def test_generation_is_greedy_and_knows_where_to_stop(llama: tuple[Any, Path]) -> None:
    generation = AutoModelForCausalLM.from_pretrained(llama[1]).generation_config
    assert not generation.do_sample
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 2)


def test_the_weights_may_be_read_by_whoever_may_read_the_rest(llama: tuple[Any, Path]) -> None:
    modes = {path.stat().st_mode for path in llama[1].iterdir()}
    assert len(modes) == 1


def test_the_same_file_gives_the_same_bytes(llama: tuple[Any, Path], tmp_path: Path) -> None:
    convert_gguf(llama[1].parent / "tiny.gguf", tmp_path / "again")
    for path in llama[1].iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


class TestByteLevel:
    def test_numbers_are_cut_into_digits_before_anything_else(self, byte_level: Any) -> None:
        assert byte_level.tokenize("a\n\n12  34") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3", "4"]
        assert byte_level.tokenize("hell hell") == ["hell", "Ġhell"]

    def test_special_tokens_are_found_and_none_is_added(self, byte_level: Any) -> None:
        assert byte_level("<|im_start|>he<|im_end|>")["input_ids"][0] == 1
        assert len(byte_level("he")["input_ids"]) == 1
        assert byte_level.decode(byte_level("<|im_start|>he<|im_end|>")["input_ids"], skip_special_tokens=True) == "he"

    def test_the_chat_template_is_kept(self, byte_level: Any) -> None:
        text = byte_level.apply_chat_template([{"role": "user", "content": "hell"}], tokenize=False)
        assert text == "<|im_start|>hell<|im_end|>"

    @pytest.mark.parametrize("text", ["Hello, wörld! 你好 🙂\n\n  indented", "\t\t x  \r\n", "1½ ² 12"])
    def test_texts_come_back(self, byte_level: Any, text: str) -> None:
        assert byte_level.decode(byte_level(text)["input_ids"]) == text


def cut_like_sentencepiece(text: str) -> list[int]:
    """The slow reference: user-defined tokens, longest first; then always the best pair of neighbours, the left one."""
    tokens, kinds = sentencepiece_vocabulary()
    ids = {token: i for i, token in enumerate(tokens)}
    fixed = sorted((token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED), key=len)
    pieces: list[str] = []
    while text:
        found = next((token for token in reversed(fixed) if text.startswith(token)), None)
        pieces.append(found or text[0].replace(" ", "▁"))
        text = text[len(pieces[-1]) :]
    while True:
        pairs = [
            (ids[left + right], i)
            for i, (left, right) in enumerate(pairwise(pieces))
            if left not in fixed and right not in fixed and kinds[ids.get(left + right, 0)] == NORMAL
        ]
        if not pairs:
            break
        _, best = min(pairs)
        pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
    return [
        token
        for piece in pieces
        for token in ([ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()])
    ]


class TestSentencePiece:
    def test_cuts_like_the_reference(self, sentencepiece: Any) -> None:
        letters = random.Random(0)
        for _ in range(300):
            text = "".join(letters.choices("abehingtx  \n你<b>", k=letters.randrange(1, 30)))
            assert sentencepiece(text, add_special_tokens=False)["input_ids"] == cut_like_sentencepiece(text), repr(
                text
            )
            assert sentencepiece.decode(sentencepiece(text)["input_ids"], skip_special_tokens=True) == text

    def test_begins_once(self, sentencepiece: Any) -> None:
        assert sentencepiece("ab")["input_ids"][0] == sentencepiece.bos_token_id
        assert sentencepiece("ab")["input_ids"].count(sentencepiece.bos_token_id) == 1
        assert sentencepiece("ab", "ba")["input_ids"].count(sentencepiece.bos_token_id) == 1


class TestRefusals:
    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        write(gguf.GGUFWriter(tmp_path / "x.gguf", "falcon"))
        with pytest.raises(SteerError, match=r"x.gguf: cannot convert architecture 'falcon', only llama, gemma3"):
            convert_gguf(tmp_path / "x.gguf", tmp_path / "converted")

    def test_an_unknown_tensor(self, llama: tuple[Any, Path], tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        add_byte_level_tokenizer(writer)
        add_sizes(writer, llama[0].config)
        writer.add_rope_freq_base(500.0)
        writer.add_tensor("output.weight", torch.zeros(2, 2).numpy())
        write(writer)
        with pytest.raises(SteerError, match=r"cannot convert tensor 'output.weight' of architecture 'llama'"):
            convert_gguf(tmp_path / "x.gguf", tmp_path / "converted")

    @pytest.mark.parametrize(
        ("add", "message"),
        [
            (lambda writer: add_byte_level_tokenizer(writer, pre="qwen2"), "cuts texts by 'qwen2'"),
            (lambda writer: add_sentencepiece_tokenizer(writer, add_space_prefix=True), "a space before each text"),
        ],
    )
    def test_an_unknown_tokenizer(self, llama: tuple[Any, Path], tmp_path: Path, add: Any, message: str) -> None:
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        add(writer)
        add_sizes(writer, llama[0].config)
        writer.add_rope_freq_base(500.0)
        write(writer)
        with pytest.raises(SteerError, match=message):
            convert_gguf(tmp_path / "x.gguf", tmp_path / "converted")

    def test_a_file_that_leaves_something_out(self, tmp_path: Path) -> None:
        write(gguf.GGUFWriter(tmp_path / "x.gguf", "llama"))
        with pytest.raises(SteerError, match=r"does not say its llama\.rope\.freq_base"):
            convert_gguf(tmp_path / "x.gguf", tmp_path / "converted")

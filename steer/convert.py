"""Rewrites a GGUF file as a folder that transformers loads: configuration, weights in float32, tokenizer.

transformers reads GGUF files as well, but what it makes of them depends on its version: 5.9 cuts most texts into other
tokens than Gemma was trained on. Here one file gives the same bytes everywhere.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.errors import SteerError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer

# The kinds of token in `tokenizer.ggml.token_type` that matter here.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# GGUF's name of an architecture: transformers' names of it and of its class.
_ARCHITECTURES = {"llama": ("llama", "LlamaForCausalLM"), "gemma3": ("gemma3_text", "Gemma3ForCausalLM")}

_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}

_TENSORS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Llama has two norms in a block, and names the second one after the attention before it.
_LLAMA_TENSORS = _TENSORS | {"ffn_norm": "post_attention_layernorm"}


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes `config.json`, `generation_config.json`, `model.safetensors` and the tokenizer's files into `folder`.

    Weights are stored as their blocks dequantize. Rounding them to bfloat16 would halve the file and move the
    perplexity of the embedded models by 0.1 %, but whoever wants that can load them so.

    Raises:
        SteerError: the file has an architecture or a tokenizer that is not supported; Llama and Gemma 3 with tied
            embeddings are.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)
    architecture = _read(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise SteerError(f"{gguf.name}: cannot convert architecture {architecture!r}, only {', '.join(_ARCHITECTURES)}")
    config = _config(reader, architecture)
    tokenizer = _tokenizer(reader)
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _token_ids(reader))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader, config["max_position_embeddings"]))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    if template := _read(reader, "tokenizer.chat_template", None):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    save_file(_weights(reader, architecture, config), folder / "model.safetensors", {"format": "pt"})
    # safetensors lets only the owner read it, whatever the umask says; a cache may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


_REQUIRED = object()


def _read(reader: GGUFReader, key: str, default: Any = _REQUIRED) -> Any:
    field = reader.get_field(key)
    if field is None and default is _REQUIRED:
        raise SteerError(f"the GGUF file does not say its {key}")
    return default if field is None else field.contents()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(reader: GGUFReader, architecture: str) -> dict[str, Any]:
    import numpy as np

    model_type, class_name = _ARCHITECTURES[architecture]
    sizes = {ours: _read(reader, f"{architecture}.{theirs}", None) for theirs, ours in _SIZES.items()}
    theta = _read(reader, f"{architecture}.rope.freq_base")
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if architecture == "gemma3":
        # The file states only the base of the global layers.
        rope = {"full_attention": rope, "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"}}
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "dtype": "float32",
        **{name: size for name, size in sizes.items() if size is not None},
        # Stored in float32, whose shortest spelling is the number that was meant: 1e-05, not 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(_read(reader, f"{architecture}.attention.layer_norm_rms_epsilon")))),
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "vocab_size": len(_read(reader, "tokenizer.ggml.tokens")),
        **_token_ids(reader),
    }


def _token_ids(reader: GGUFReader) -> dict[str, Any]:
    return {
        "bos_token_id": _read(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _read(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _read(reader, "tokenizer.ggml.padding_token_id"),
    }


def _weights(reader: GGUFReader, architecture: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    import torch
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")
        names = _LLAMA_TENSORS if architecture == "llama" else _TENSORS
        if kind not in names or not tensor.name.endswith(".weight"):
            raise SteerError(f"cannot convert tensor {tensor.name!r} of architecture {architecture!r}")
        # A copy, since unquantized tensors are views of the file.
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if architecture == "llama" and kind in ("attn_q", "attn_k"):
            weight = _halves(weight, config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"])
        if architecture == "gemma3" and kind.endswith("norm"):
            # Gemma multiplies by 1 + w, and GGUF has added the 1.
            weight = weight - 1
        layer = f"layers.{block[1]}." if block else ""
        weights[f"model.{layer}{names[kind]}.weight"] = weight
    return weights


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders a projection's rows `[heads * d, width]` for rotary embedding over the halves of a head.

    GGUF has the two rows of each rotated plane side by side.
    """
    return weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    family = _read(reader, "tokenizer.ggml.model")
    tokens = _read(reader, "tokenizer.ggml.tokens")
    kinds = _read(reader, "tokenizer.ggml.token_type")
    if family == "gpt2":
        tokenizer = _byte_level(reader, tokens)
    elif family == "llama":
        tokenizer = _sentencepiece(reader, tokens, kinds)
    else:
        raise SteerError(f"cannot convert a tokenizer of kind {family!r}, only gpt2 and llama")
    added: list[AddedToken] = []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            added.append(AddedToken(token, normalized=False, special=kind == _CONTROL))
    tokenizer.add_tokens(added)
    if _read(reader, "tokenizer.ggml.add_bos_token"):
        # In the tokenizer itself: transformers 5 ignores `add_bos_token` in `tokenizer_config.json`.
        start = _read(reader, "tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = TemplateProcessing(
            single=f"{tokens[start]} $A", pair=f"{tokens[start]} $A $B:1", special_tokens=[(tokens[start], start)]
        )
    return tokenizer


def _byte_level(reader: GGUFReader, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    cut = _read(reader, "tokenizer.ggml.pre")
    if cut != "smollm":
        raise SteerError(f"cannot convert a tokenizer that cuts texts by {cut!r}, only by 'smollm'")
    merges = [tuple(merge.split(" ")) for merge in _read(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(reader: GGUFReader, tokens: list[str], kinds: list[int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    if _read(reader, "tokenizer.ggml.add_space_prefix", True):
        raise SteerError("cannot convert a tokenizer that puts a space before each text")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Nothing is merged into a control or user-defined token: they are found in the text before it is cut.
    pieces = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _NORMAL]
    unknown = tokens[_read(reader, "tokenizer.ggml.unknown_token_id")]
    bpe = models.BPE(vocabulary, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """The merges that SentencePiece leaves implicit: any two pieces that make a third, the earlier third first."""
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _tokenizer_config(reader: GGUFReader, longest: int) -> dict[str, Any]:
    tokens = _read(reader, "tokenizer.ggml.tokens")
    ids = _token_ids(reader) | {"unk_token_id": _read(reader, "tokenizer.ggml.unknown_token_id")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name.removesuffix("_id"): tokens[token_id] for name, token_id in ids.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "padding_side": "left",
    }

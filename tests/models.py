"""Tiny random models of every supported architecture, and a tokenizer of characters for them."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LAYERS, WIDTH, HEADS, VOCABULARY = 3, 48, 4, 100
PAD, BOS, EOS = 0, 1, 2

# A random model whose head is its embedding table repeats what it reads.
_UNTIED = {"tie_word_embeddings": False}
_LLAMA = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": 80,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 16,
} | _UNTIED
_NEOX = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": 80,
    "num_attention_heads": HEADS,
    "rotary_pct": 0.5,
}
_BUILDERS = {
    "llama": (LlamaForCausalLM, LlamaConfig, _LLAMA),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _LLAMA),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        _LLAMA
        | {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS} | _UNTIED),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, _NEOX),
    "gpt_neox_serial": (GPTNeoXForCausalLM, GPTNeoXConfig, _NEOX | {"use_parallel_residual": False}),
    "bloom": (BloomForCausalLM, BloomConfig, {"n_layer": LAYERS, "hidden_size": WIDTH, "n_head": HEADS} | _UNTIED),
}
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "bloom"]
# Also the variant of GPT-NeoX whose attention and feed-forward are not parallel.
VARIANTS = [*ARCHITECTURES, "gpt_neox_serial"]


def tiny(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of this architecture with weights large enough for every part of it to matter."""
    model_class, config_class, shape = _BUILDERS[name]
    config = config_class(vocab_size=VOCABULARY, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, **shape)
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # Norms start from 1, or from 0 where they add the 1 themselves; biases from 0.
                parameter.add_(0.1 * noise)
            elif isinstance(module := model.get_submodule(path.rpartition(".")[0]), nn.Embedding):
                parameter.copy_(0.5 * noise / getattr(module, "scalar_embed_scale", 1.0))
            else:
                inputs = parameter.shape[1 if isinstance(module, nn.Linear) else 0]
                parameter.copy_(2.5 * noise / inputs**0.5)
    # Every generation runs its full length, whatever a random model says.
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@cache
def tokenizer(*, bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per character of ASCII text, on demand with a BOS in front, or with a chat template."""
    characters = ["<pad>", "<bos>", "<eos>", "<unk>", "\n", *(chr(code) for code in range(32, 127))]
    backend = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE if chat else None,
    )

"""Tiny random models of every supported architecture, and a tokenizer of characters for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.pytorch_utils import Conv1D

LAYERS, WIDTH, HEADS, VOCABULARY = 3, 48, 4, 100
PAD, BOS, EOS = 0, 1, 2

# A random model whose head is its embedding table repeats what it reads.
_UNTIED = {"tie_word_embeddings": False}
_SHAPE = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS}
_LLAMA = _SHAPE | {"intermediate_size": 80, "num_key_value_heads": 2, "head_dim": 16} | _UNTIED
_GEMMA = _LLAMA | {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 16,
}
_EXPERTS = _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}
_FALCON = _SHAPE | _UNTIED
_NEOX = _SHAPE | {"intermediate_size": 80, "rotary_pct": 0.5}
_OPT = _SHAPE | {"ffn_dim": 80, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 200} | _UNTIED

_T5 = {"num_layers": LAYERS, "d_model": WIDTH, "num_heads": HEADS, "d_kv": 12, "d_ff": 80}
# Few buckets, so that distances of a few tokens fall into different ones.
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 0}
_BART = {"d_model": WIDTH, "max_position_embeddings": 200, "scale_embedding": True, "forced_eos_token_id": None}
_BART |= {f"{part}_layers": LAYERS for part in ("encoder", "decoder")}
_BART |= {f"{part}_attention_heads": HEADS for part in ("encoder", "decoder")}
_BART |= {f"{part}_ffn_dim": 80 for part in ("encoder", "decoder")}

_SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGE = 99

# By name, the type of the configuration and what is set in it.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    # A window in all layers, as its first version has.
    "mistral": ("mistral", _LLAMA | {"sliding_window": 8}),
    "mixtral": ("mixtral", _EXPERTS),
    "phi3": ("phi3", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA),
    "olmo2": ("olmo2", _LLAMA),
    "gemma2": ("gemma2", _GEMMA | {"final_logit_softcapping": 8.0, "attn_logit_softcapping": 4.0}),
    "gemma3": ("gemma3_text", _GEMMA),
    "gpt_oss": (
        "gpt_oss",
        _EXPERTS | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt2": ("gpt2", {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS} | _UNTIED),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox_serial": ("gpt_neox", _NEOX | {"use_parallel_residual": False}),
    "gptj": ("gptj", {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "rotary_dim": 8} | _UNTIED),
    "opt": ("opt", _OPT),
    # What the 350M model does: norms after the additions, and embeddings that are narrower than the stream.
    "opt_post_norm": ("opt", _OPT | {"do_layer_norm_before": False}),
    "opt_narrow": ("opt", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {"n_layer": LAYERS, "hidden_size": WIDTH, "n_head": HEADS} | _UNTIED),
    "falcon": ("falcon", _FALCON),
    # With alibi, one block after the other, and biases.
    "falcon_serial": (
        "falcon",
        _FALCON | {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
    ),
    "falcon_new": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    # The text's part is that of the models above, and one level deeper.
    "gemma3_image": (
        "gemma3",
        {
            "text_config": _GEMMA | _SPECIAL,
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_id": IMAGE,
            **_UNTIED,
        },
    ),
    "llava": (
        "llava",
        {
            "text_config": {"model_type": "llama"} | _LLAMA | _SPECIAL,
            "vision_config": {"model_type": "clip_vision_model"} | _VISION,
            "image_token_index": IMAGE,
            **_UNTIED,
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": _SHAPE
            | {"intermediate_size": 80, "num_key_value_heads": 2}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}}
            | _SPECIAL,
            "vision_config": {"hidden_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": WIDTH},
            "image_token_id": IMAGE,
            **_UNTIED,
        },
    ),
    "t5": ("t5", _T5),
    # As in Flan-T5.
    "t5_gated": ("t5", _T5 | {"feed_forward_proj": "gated-gelu"} | _UNTIED),
    "mt5": ("mt5", _T5 | {"feed_forward_proj": "gated-gelu"} | _UNTIED),
    "umt5": ("umt5", _T5 | {"feed_forward_proj": "gated-gelu"} | _UNTIED),
    "bart": ("bart", _BART),
    "mbart": ("mbart", _BART),
}
# Models that something has been done to: which one, and what.
_CHANGED: dict[str, tuple[str, Callable[[PreTrainedModel], PreTrainedModel]]] = {
    "llama_lora": ("llama", lambda model: with_lora(model, ["q_proj", "o_proj", "down_proj"])),
    "gpt2_lora": ("gpt2", lambda model: with_lora(model, ["c_attn", "attn.c_proj"])),
    "llama_int8": ("llama", lambda model: in_int8(model)),
    "t5_lora": ("t5", lambda model: with_lora(model, ["q", "o", "wi"])),
    # As after its vocabulary was made larger: encoder and decoder have one module for their embeddings.
    "t5_one_table": ("t5", lambda model: with_one_table(model)),
}
ARCHITECTURES = [
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen3",
    "olmo2",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "gpt2",
    "gpt_neox",
    "gptj",
    "opt",
    "bloom",
    "falcon",
]
MULTIMODAL = ["gemma3_image", "llava", "qwen2_5_vl"]
ENCODER_DECODERS = ["t5", "t5_gated", "mt5", "umt5", "bart", "mbart", "t5_lora", "t5_one_table"]
# Models inside of others, with adapters, and with quantized weights.
WRAPPED = [*MULTIMODAL, *(name for name in _CHANGED if name not in ENCODER_DECODERS)]
# To the hooks these are built as others are: they go through the tests of where edits land, and
# through the rest in full runs only.
ALIKE = {
    "mistral": "llama",
    "phi3": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "mixtral": "gpt_oss",
    "gemma2": "gemma3",
    "gptj": "falcon",
    "llava": "gemma3_image",
    "gpt2_lora": "llama_lora",
}
# Also those configurations that change what is added to the residual stream, and where.
VARIANTS = [*ARCHITECTURES, *WRAPPED, *sorted(_CONFIGS.keys() - {*ARCHITECTURES, *WRAPPED, *ENCODER_DECODERS})]


def tiny(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of this architecture with weights large enough for every part of it to matter."""
    if name in _CHANGED:
        base, change = _CHANGED[name]
        return change(tiny(base, seed=seed, dtype=dtype))
    kind, settings = _CONFIGS[name]
    auto = AutoModelForImageTextToText if name in MULTIMODAL else AutoModelForCausalLM
    auto = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else auto
    # Some of what GPT-OSS starts from is random.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(AutoConfig.for_model(kind, **_SPECIAL | settings), dtype=torch.float32)
    randomize(model, seed)
    return model.to(dtype).eval()


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model that runs when this one generates."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def with_lora(model: PreTrainedModel, targets: list[str], name: str = "default") -> PeftModel:
    """The model with random adapters."""
    # GPT-2 keeps its weights the other way round.
    config = LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=model.config.model_type == "gpt2"
    )
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        return get_peft_model(model, config, name).eval()


def with_one_table(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a single module for the embeddings."""
    model.set_input_embeddings(model.get_input_embeddings())
    return model


def in_int8(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the weights of its linear layers in int8."""
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Fills a model with weights large enough for every part of it to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            module = model.get_submodule(path.rpartition(".")[0])
            if parameter.dim() == 1 or path.endswith("bias"):
                # Norms start from 1, or from 0 where they add the 1 themselves; biases from 0.
                parameter.add_(0.1 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise / getattr(module, "scalar_embed_scale", 1.0))
            else:
                parameter.copy_(2.5 * noise / _inputs(module, parameter) ** 0.5)
            if path.endswith("Attention.q.weight"):
                # T5 has the factor of its attention in there.
                parameter.div_(model.config.d_kv**0.5)
    # Every generation runs its full length, whatever a random model says.
    model.generation_config.eos_token_id = None


def _inputs(module: nn.Module, weight: torch.Tensor) -> int:
    """How many numbers the weight sums up: most layers have them last, GPT-2's and GPT-OSS' experts not."""
    return weight.shape[-2 if isinstance(module, Conv1D | GptOssExperts) else -1]


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@cache
def tokenizer(*, bos: bool = False, eos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per character of ASCII text, on demand with a BOS in front, an EOS behind, or a chat template."""
    characters = ["<pad>", "<bos>", "<eos>", "<unk>", "\n", *(chr(code) for code in range(32, 127))]
    backend = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if bos or eos:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(["<bos>"] * bos + ["$A"] + ["<eos>"] * eos), special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE if chat else None,
    )

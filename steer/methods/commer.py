"""ComMer: each text of a user is compressed into a few soft tokens, and these are averaged into one prefix.

Zeldes et al., "ComMer: a Framework for Compressing and Merging User Data for Personalization", arXiv 2501.03276. The
compressor is the frozen model with LoRA, and k trainable embeddings that stand behind a document d_j:

    Z_j = c · M_{θ+LoRA}( d_j ; e_1 … e_k )[last k positions] ∈ R^{k×d}            Z̄ = 1/n · Σ_j Z_j
    min_{LoRA, e}  −Σ log p_θ( y | Z̄ ; x )

Z̄ is the prefix of the frozen model itself, without LoRA; y is what the user wrote later. As Z̄ is a mean, a further
text costs one reading of that text, and so does taking one out again.

Ours differs from the paper in this:

* c = 1 is the paper's; by default c brings the last layer's states to the scale of token embeddings.
* The documents of an example in training are the newest ones. The paper takes those closest to x by BM25, which a state
  that is made before anybody asks cannot.
* The paper first trains on a web corpus, to reproduce each document from its own Z. Here a share of the examples,
  `autoencoding`, has the record to predict as its only document, while the others are trained on.
* A user without texts has the Z of an empty document. It is trained like all others, as an example loses its documents
  now and then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from steer.encoders import Merged
from steer.errors import SteerError
from steer.history import History, Record
from steer.inject import Edit, PrefixEdit
from steer.inject.stream_rows import pad_left
from steer.method import TrainableMethod
from steer.methods.vectors import ids_of_new
from steer.read import by_length, record_span, require_room
from steer.sites import Site
from steer.state import Artifact, UserState
from steer.twin import twin_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM
    from steer.train.examples import Example

# Token ids of a text to compress, without the k embeddings.
Document = tuple[int, ...]

# Under which PEFT keeps the compressor's weights, and what they are in each layer.
_ADAPTER, _PARTS = "steer_commer", ("lora_A", "lora_B", "lora_dropout")
# Rows of the embedding table that show its scale.
_SAMPLE = 64
# Size of a batch of documents, with padding. For the gradient LoRA keeps about 2.5 MB of each token of a 135M model.
_BATCH_TOKENS = 1024
# Names of tensors: a state's only one, and the prefix of a user without texts.
_SUM, _NOBODY = "sum", "nobody"


@dataclass
class ComMer(TrainableMethod):
    """Soft tokens that a trained compressor makes of a user's texts: `tokens` · width numbers, however many texts.

    Args:
        tokens: soft tokens, k; the paper has 4 to 128.
        rank, alpha, dropout: of LoRA, as in the paper.
        targets: which layers have LoRA: names as PEFT takes them, or "all-linear".
        scale: c: "table" brings Z to the norm of the embedding table's rows; 1 leaves it as it is, as in the paper.
        prompts: whether a document is what the user wrote behind its prompt, or, as in the paper, alone.
        max_tokens: longer documents are cut, in any case to the model's window.
        documents: of an example in training and validation, the newest so many; `fit` takes all it is given.
        nobody: share of the examples in training that lose all their documents.
        autoencoding: share of those whose only document is the very record to predict.
        embedding_rate: learning rate of the embeddings as a multiple of LoRA's, in units of the embedding table's root
            mean square; the paper has 1e-2 and 1e-4.

    Raises:
        SteerError: PEFT is not installed, or a setting cannot be.
    """

    name: ClassVar[str] = "commer"
    enters: ClassVar[tuple[str, ...]] = (str(Site("embed")),)

    tokens: int = 16
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    targets: str | Sequence[str] = "all-linear"
    scale: float | Literal["table"] = "table"
    prompts: bool = False
    max_tokens: int = 512
    documents: int = 8
    nobody: float = 0.1
    autoencoding: float = 0.0
    embedding_rate: float = 100.0

    def __post_init__(self) -> None:
        # Of `artifact`, built when it is first needed. No field, as those are copied.
        self._compressor: Compressor | None = None
        if find_spec("peft") is None:
            raise SteerError("ComMer needs PEFT: pip install 'steer-toolkit[train]'")
        for name in ("tokens", "rank", "max_tokens", "documents"):
            if not isinstance(given := getattr(self, name), int) or given < 1:
                raise SteerError(f"{name}={given} is no count; give 1 or more")
        for name in ("dropout", "nobody", "autoencoding"):
            if not 0 <= (given := getattr(self, name)) < 1:
                raise SteerError(f"{name}={given} is not a share; give 0 for none, or such as 0.1")
        if self.nobody + self.autoencoding > 1:
            raise SteerError(f"nobody={self.nobody} and autoencoding={self.autoencoding} are more than all examples")
        if self.scale != "table" and (isinstance(self.scale, str) or self.scale <= 0):
            raise SteerError(f'scale={self.scale!r} is neither "table" nor a number above 0')
        if self.embedding_rate < 0:
            raise SteerError(f"embedding_rate={self.embedding_rate} is below 0")
        if not isinstance(self.targets, str):
            # As an artifact has them.
            self.targets = list(self.targets)

    def module(self, lm: FrozenLM, histories: Sequence[History] = ()) -> Compressor:
        """What is trained, see `steer.train.train_method`: LoRA that has no effect yet, and random embeddings.

        Args:
            lm: the model.
            histories: of the users to train on; not looked at.

        Raises:
            SteerError: the model cannot read so many tokens, has no such `targets`, or has adapters in the way.
        """
        require_room(lm, self.tokens + 2, "the shortest document has", remedy="lower tokens")
        return Compressor(self, lm)

    def artifact_of(self, lm: FrozenLM, module: nn.Module) -> Artifact:
        """The trained weights, with the prefix of a user without texts."""
        assert isinstance(module, Compressor)
        module.eval()
        with torch.no_grad():
            tensors = {**module.state_dict(), _NOBODY: module.compress([()])[0]}
        return Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            # In memory of their own: a safetensors file holds no tensor twice.
            tensors={name: tensor.detach().cpu().clone() for name, tensor in tensors.items()},
            settings={**asdict(self), "factor": module.scale},
        )

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """The sum of all Z_j, `[k, d]` in float64, and the records' ids; an empty history is nobody in particular.

        Raises:
            SteerError: the compressor was not trained, or with another model.
        """
        return self._state({_SUM: self._trained(lm).merged(history).total}, [record.id for record in history])

    def update(self, lm: FrozenLM, state: UserState, records: Iterable[Record]) -> UserState:
        """The state with records added, a history's or others, as if they had been there; it costs reading these.

        Raises:
            SteerError: as `fit`; or a record is there already, or the state was made with other shared weights.
        """
        compressor, records = self._trained(lm), list(records)
        self._require_own(state)
        known = state.provenance.records
        new = ids_of_new(records, known)
        return self._state({_SUM: (_merged(state) + compressor.merged(records)).total}, [*known, *new])

    def remove(self, lm: FrozenLM, state: UserState, records: Iterable[Record]) -> UserState:
        """The state without these records, as if they had never been there; it costs reading them once more.

        What the compressor learned of them stays there; train it again to change that.

        Args:
            lm: the model.
            state: of the user.
            records: as they were when they came in: their sum is taken out of the state's.

        Raises:
            SteerError: as `fit`; or a record is not there, or the state was made with other shared weights.
        """
        compressor, known = self._trained(lm), state.provenance.records
        self._require_own(state)
        gone = {record.id: record for record in records}
        if strange := [name for name in gone if name not in known]:
            raise SteerError(f"record {strange[0]!r} is not in the state")
        left = [name for name in known if name not in gone]
        return self._state({_SUM: (_merged(state) - compressor.merged(gone.values())).total}, left)

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One prefix."""
        assert artifact is not None
        prefixes = [None if state is None else _mean(state, artifact) for state in states]
        return [PrefixEdit.from_rows(prefixes, like.tensors[_SUM].shape[-1])]

    def _trained(self, lm: FrozenLM) -> Compressor:
        """The compressor of the artifact, built once."""
        artifact, known = self._require_trained(lm), self._compressor
        if known is None or known.artifact is not artifact or not known.shares(lm):
            known = self._compressor = _of_artifact(self, lm, artifact)
        return known


class Compressor(nn.Module):
    """The frozen model with LoRA, and embeddings that stand behind each document: what ComMer trains.

    Registered is what is trained, and LoRA's dropout. The model's own weights are used where they are: there is no
    second copy of them, and the model has no LoRA. What is trained is float32, whatever the model's dtype.

    Args:
        method: the hyper-parameters.
        lm: the model.

    Attributes:
        embeddings: e_1 … e_k, `[k, d]`.
        lora: A, B and dropout of each layer that has LoRA, by its path.
        soft_tokens: k.
        scale: c.
        rates: learning rate of the embeddings as a multiple of LoRA's.
        artifact: whose weights these are, if any's.
    """

    def __init__(self, method: ComMer, lm: FrozenLM) -> None:
        super().__init__()
        self.method, self.lm, self.soft_tokens = method, lm, method.tokens
        self.artifact: Artifact | None = None
        twin = twin_of(lm)
        rows = _rows_of_table(twin.get_input_embeddings())
        self.lora = nn.ModuleDict(_add_lora(twin, method))
        # In a tuple, so that it is not registered.
        self._frozen: tuple[Any] = (twin,)
        size = rows.square().mean().sqrt()
        self.rates = {"embeddings": method.embedding_rate * size.item()}
        # Not those of tokens: what the model goes on to say behind them is often far from any text's beginning.
        self.embeddings = nn.Parameter(size * torch.randn(self.soft_tokens, rows.shape[1]).to(rows))
        self.scale = self._to_table(rows) if method.scale == "table" else float(method.scale)

    def edits(self, examples: Sequence[Example]) -> list[Edit]:
        """One prefix for each example, from the newest `documents` of the records before it.

        In training an example has none of them now and then, or the record to predict itself. A document that several
        examples have is compressed once.
        """
        drawn = [[self.document(record) for record in self._drawn(example)] or [()] for example in examples]
        places = {document: i for i, document in enumerate(dict.fromkeys(chain(*drawn)))}
        compressed = self.compress(list(places))
        means = [compressed[[places[document] for document in own]].mean(0) for own in drawn]
        return [PrefixEdit.from_rows(means, compressed.shape[-1])]

    def document(self, record: Record) -> Document:
        """Token ids of a record, cut to `max_tokens` and to the model's window."""
        most = self.method.max_tokens
        if self.lm.window is not None:
            most = min(most, self.lm.window - self.soft_tokens)
        if self.method.prompts and record.prompt is not None:
            return tuple(record_span(self.lm, record, max_tokens=most).ids)
        assert self.lm.tokenizer is not None
        return tuple(self.lm.tokenizer(record.response).input_ids[:most])

    def compress(self, documents: Sequence[Document]) -> Float[Tensor, "document k d"]:
        """Z of each document, in float32; in batches, of which only one is kept in memory for the gradient."""
        lengths = {i: len(document) + self.soft_tokens for i, document in enumerate(documents)}
        batches = list(by_length(lengths, _BATCH_TOKENS))
        again = torch.is_grad_enabled() and len(batches) > 1
        states = []
        for batch in batches:
            given = [documents[i] for i in batch], self.embeddings
            states.append(checkpoint(self._run, *given, use_reentrant=False) if again else self._run(*given))
        order = torch.tensor([i for batch in batches for i in batch])
        return self.scale * torch.cat(states)[order.argsort()]

    @torch.no_grad()
    def merged(self, records: Iterable[Record]) -> Merged:
        """Σ_j Z_j, on the CPU. Each record is read by itself: beside others it would be rounded otherwise."""
        nothing = Merged.of(torch.zeros(0, *self.embeddings.shape))
        return sum((Merged.of(self.compress([self.document(record)]).cpu()) for record in records), nothing)

    def shares(self, lm: FrozenLM) -> bool:
        """Whether it uses the weights that this model has now."""
        mine, theirs = (model.get_input_embeddings().weight for model in (self._frozen[0], cast(Any, lm.model)))
        return self.lm is lm and mine.data_ptr() == theirs.data_ptr()

    def _drawn(self, example: Example) -> Sequence[Record]:
        """The records that are documents of an example."""
        method = self.method
        chance = torch.rand(()).item() if self.training else 1.0
        if chance < method.nobody:
            return ()
        if chance < method.nobody + method.autoencoding:
            return (example.record,)
        return example.history.records[-method.documents :]

    def _run(self, documents: Sequence[Document], embeddings: Float[Tensor, "k d"]) -> Float[Tensor, "document k d"]:
        """The last layer's states at embeddings behind some documents, in float32."""
        lm, twin = self.lm, self._frozen[0]
        ids, mask = (part.to(lm.device) for part in pad_left(documents, lm.pad_token_id))
        texts = twin.get_input_embeddings()(ids)
        behind = embeddings.to(texts).expand(len(documents), -1, -1)
        mask = nn.functional.pad(mask, (0, len(embeddings)), value=1)
        arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        if lm.attachment.architecture.takes_position_ids:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        states = twin(inputs_embeds=torch.cat([texts, behind], dim=1), **arguments).last_hidden_state
        return states[:, -len(embeddings) :].float()

    @torch.no_grad()
    def _to_table(self, rows: Float[Tensor, "row d"]) -> float:
        """What brings the last layer's states to the norm of token embeddings, before LoRA has learned anything."""
        return (rows.norm(dim=-1).median() / self._run([()], rows).norm(dim=-1).median()).item()


def _of_artifact(method: ComMer, lm: FrozenLM, artifact: Artifact) -> Compressor:
    with torch.random.fork_rng():
        compressor = Compressor(method, lm)
    compressor.load_state_dict({name: tensor for name, tensor in artifact.tensors.items() if name != _NOBODY})
    compressor.scale, compressor.artifact = artifact.settings["factor"], artifact
    return compressor.requires_grad_(False).eval()


def _merged(state: UserState) -> Merged:
    return Merged(len(state.provenance.records), state.tensors[_SUM])


def _mean(state: UserState, artifact: Artifact) -> Float[Tensor, "k d"]:
    merged = _merged(state)
    return merged.mean if merged.count else artifact.tensors[_NOBODY]


@torch.no_grad()
def _rows_of_table(embed: Any) -> Float[Tensor, "row d"]:
    """Embeddings of tokens all over the vocabulary, as the model reads them."""
    ids = torch.linspace(0, embed.num_embeddings - 1, _SAMPLE).long()
    return embed(ids.to(embed.weight.device)).float()


def _add_lora(twin: nn.Module, method: ComMer) -> dict[str, nn.Module]:
    """Puts LoRA into a model, beside what it has; returns its parts by the paths of the layers, with / for the dots."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    own: dict[Any, list[str]]
    own = {module: _running(module) for module in twin.modules() if isinstance(module, BaseTunerLayer)}
    if any(not isinstance(module, LoraLayer) or module.merged_adapters for module in own):
        raise SteerError(
            "the model has PEFT's adapters that are merged or no LoRA, and ComMer's cannot go beside these"
        )
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        target_modules=cast("str | list[str]", method.targets),
        # GPT-2 keeps its weights the other way round.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in twin.modules()),
    )
    try:
        inject_adapter_in_model(config, twin, _ADAPTER)
    except ValueError as error:
        raise SteerError(
            f"targets={method.targets!r} cannot have LoRA with dropout={method.dropout}: {error}"
        ) from None
    layers = {path: module for path, module in twin.named_modules() if isinstance(module, LoraLayer)}
    if embeddings := [path for path, layer in layers.items() if _ADAPTER in layer.lora_embedding_A]:
        raise SteerError(f"targets: {embeddings[0]} is an embedding; name projections, or take 'all-linear'")
    # PEFT has switched off what ran before.
    for layer in layers.values():
        layer.enable_adapters(True)
        layer.set_adapter([*own.get(layer, []), _ADAPTER])
    parts = {
        path.replace(".", "/"): nn.ModuleDict({name: getattr(layer, name)[_ADAPTER] for name in _PARTS})
        for path, layer in layers.items()
        if _ADAPTER in layer.lora_A
    }
    twin.requires_grad_(False)
    for part in parts.values():
        # PEFT makes them in the dtype of the layer, and computes in theirs.
        part.float().requires_grad_(True)
    return dict(parts)


def _running(layer: Any) -> list[str]:
    """PEFT's adapters that a layer of the model has at work."""
    return [] if layer.disable_adapters else list(layer.active_adapters)

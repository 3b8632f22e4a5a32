"""ComMer: each text of a user is compressed into a few soft tokens, and these are averaged into one prefix.

Zeldes et al., "ComMer: a Framework for Compressing and Merging User Data for Personalization", arXiv 2501.03276. The
compressor is the frozen model with LoRA, and k trainable embeddings that stand behind a document d_j:

    Z_j = c · M_{θ+LoRA}( d_j ; e_1 … e_k )[last k positions] ∈ R^{k×d}            Z̄ = 1/n · Σ_j Z_j
    min_{LoRA, e}  −Σ log p_θ( y | Z̄ ; x )

Z̄ is the prefix of the frozen model itself, without LoRA; y is what the user wrote later. As Z̄ is a mean, a further
text costs one reading of that text, and so does taking one out again. c = 1 is the paper's; ours brings the last
layer's states to the scale of token embeddings. Also ours: a user without texts has the Z of an empty document, which
is trained like all others, as an example loses its documents now and then.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from steer.errors import SteerError
from steer.history import History, Record
from steer.inject import Edit, PrefixEdit
from steer.inject.stream_rows import pad_left
from steer.likelihood import batches_of, negative_log_likelihood
from steer.method import Method
from steer.methods.vectors import ids_left, ids_of_new, require_equal
from steer.read import Span, by_length, record_span, require_room
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState
from steer.train import each_step
from steer.twin import twin_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM

# Under which PEFT keeps the compressor's weights, and what they are in each layer.
_ADAPTER, _PARTS = "steer_commer", ("lora_A", "lora_B", "lora_dropout")
# Rows of the embedding table that show its scale, and some of which the embeddings start from.
_SAMPLE = 64
# Size of a batch of documents, with padding.
_BATCH_TOKENS = 4096
# Names of tensors: a state's only one, and the prefix of a user without texts.
_SUM, _NOBODY = "sum", "nobody"


class Example(Protocol):
    """What is to be predicted has a prefix made of these records."""

    @property
    def history(self) -> Iterable[Record]: ...


@dataclass
class ComMer(Method):
    """Soft tokens that a trained compressor makes of a user's texts: `tokens` · width numbers, however many texts.

    Args:
        tokens: soft tokens, k; the paper has 4 to 128.
        rank, alpha, dropout: of LoRA, as in the paper.
        targets: which layers have LoRA: names as PEFT takes them, or "all-linear".
        scale: c: "table" brings Z to the norm of the embedding table's rows; 1 leaves it as it is, as in the paper.
        prompts: whether a document is what the user wrote behind its prompt, or, as in the paper, alone.
        max_tokens: longer documents are cut, in any case to the model's window.
        documents: of an example in training, at most so many, drawn anew each time.
        nobody: share of the examples in training that lose all their documents.
        steps, batch: of training, and examples in a step.
        learning_rate: of AdamW.
        embedding_rate: that of the embeddings as a multiple of it, in units of the embedding table's root mean square;
            the paper has 1e-4 and 1e-2.
        pretrain_steps: steps in which a document is to be told from its own Z, before all others; `train` needs the
            texts for them.
        seed: of the initial weights, dropout, and the order of examples.

    Raises:
        SteerError: PEFT is not installed, or a setting cannot be.
    """

    name: ClassVar[str] = "commer"
    trainable: ClassVar[bool] = True

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
    steps: int = 100
    batch: int = 8
    learning_rate: float = 1e-4
    embedding_rate: float = 100.0
    pretrain_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        # Of `artifact`, built when it is first needed. No field, as those are copied.
        self._compressor: Compressor | None = None
        if find_spec("peft") is None:
            raise SteerError("ComMer needs PEFT: pip install 'steer-toolkit[train]'")
        for name in ("tokens", "rank", "max_tokens", "documents"):
            if (given := getattr(self, name)) < 1:
                raise SteerError(f"{name}={given} must be 1 or more")
        if isinstance(self.scale, str) and self.scale != "table":
            raise SteerError(f'scale={self.scale!r} is neither "table" nor a number')
        for name in ("dropout", "nobody"):
            if not 0 <= (given := getattr(self, name)) < 1:
                raise SteerError(f"{name}={given} is not a share; give 0 for none, or such as 0.1")

    def module(self, lm: FrozenLM, histories: Sequence[History] = ()) -> Compressor:
        """A compressor before its training: LoRA that has no effect yet, and embeddings of random tokens.

        Args:
            lm: the model.
            histories: of the users to train on; not looked at.

        Raises:
            SteerError: the model cannot read so many tokens, has no such `targets`, or has adapters in the way.
        """
        require_room(lm, self.tokens + 2, "the shortest document has", remedy="lower tokens")
        return Compressor(lm, self)

    @torch.enable_grad()
    def train(
        self,
        lm: FrozenLM,
        histories: Iterable[History],
        on_progress: Callable[[float], None] | None = None,
        *,
        texts: Iterable[str] = (),
        on_step: Callable[[int, float], None] | None = None,
    ) -> Artifact:
        """Trains the compressor: each record is to be predicted from those that its user wrote before.

        Args:
            lm: the model; no gradient is computed for its parameters.
            histories: users with at least two records each.
            on_progress: told the share of the steps that are made.
            texts: anybody's, for the first `pretrain_steps`.
            on_step: told the number of each step and its loss in nats per token.

        Raises:
            SteerError: no user has two records, or there are no texts to pretrain on.
        """
        later = [_Later(lm, record, own.records[:i]) for own in histories for i, record in enumerate(own) if i]
        if not later:
            raise SteerError("training needs users with at least two records: one is predicted from those before it")
        itself = [_Later(lm, record, (record,)) for record in (Record("", text) for text in texts)]
        if self.pretrain_steps and not itself:
            raise SteerError("pretrain_steps need texts: call train(lm, histories, texts=[...])")
        generator = torch.Generator().manual_seed(self.seed)
        told = each_step(self.pretrain_steps + self.steps, on_progress, on_step)
        phases = [(itself, self.pretrain_steps), (later, self.steps)]
        batches = [batches_of(examples, self.batch, steps, generator) for examples, steps in phases]
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            module = self.module(lm).train()
            optimizer = torch.optim.AdamW(module.groups(self.learning_rate))
            for step, chosen in enumerate(chain(*batches)):
                loss = negative_log_likelihood(lm, [example.span for example in chosen], module.edits(chosen))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if told is not None:
                    told(step, loss.item())
        self.artifact = self.artifact_of(lm, module)
        return self.artifact

    def artifact_of(self, lm: FrozenLM, module: nn.Module) -> Artifact:
        """What was trained, with the prefix of a user without texts."""
        assert isinstance(module, Compressor)
        module.eval()
        with torch.no_grad():
            tensors = {**module.state_dict(), _NOBODY: module.compress([module.document(None)])[0]}
        return Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            # In memory of their own: a safetensors file holds no tensor twice.
            tensors={name: tensor.detach().cpu().clone() for name, tensor in tensors.items()},
            settings={
                "tokens": self.tokens,
                "rank": self.rank,
                "alpha": self.alpha,
                "targets": self.targets if isinstance(self.targets, str) else list(self.targets),
                "scale": module.scale,
                "prompts": self.prompts,
                "max_tokens": self.max_tokens,
            },
        )

    def fit(self, lm: FrozenLM, history: History, *, documents: int | None = None) -> UserState:
        """Sums up the Z of a user's records.

        Args:
            lm: the model.
            history: of the user; without any record, the state is that of nobody in particular.
            documents: only the newest so many; all if None. To choose by another rule, such as the paper's BM25, give a
                history of the chosen records.

        Raises:
            SteerError: the compressor was not trained, or with another model.
        """
        return self.fit_many(lm, [history], documents=documents)[0]

    def fit_many(
        self,
        lm: FrozenLM,
        histories: Sequence[History],
        on_progress: Callable[[float], None] | None = None,
        *,
        documents: int | None = None,
    ) -> list[UserState]:
        """Reads the documents of all users in common batches; each state is what `fit` gives, to rounding."""
        module = self._trained(lm)
        assert self.artifact is not None
        chosen = [history.records[-documents:] if documents else history.records for history in histories]
        return [
            UserState(
                provenance=Provenance(
                    method=self.name,
                    version=self.version,
                    model=lm.fingerprint,
                    sites=(str(Site("embed")),),
                    artifact=self.artifact.hash,
                    records=tuple(record.id for record in records),
                    settings={"tokens": module.soft_tokens},
                ),
                tensors={_SUM: total},
            )
            for records, total in zip(chosen, module.sums(chosen, on_progress), strict=True)
        ]

    def update(self, lm: FrozenLM, state: UserState, new_records: Sequence[Record]) -> UserState:
        """The state of a user who has written more, at the cost of reading only that: what `fit` gives for all of it.

        Raises:
            SteerError: a record is in the state already, or the state was made with another artifact.
        """
        records = (*state.provenance.records, *ids_of_new(new_records, state.provenance.records))
        return self._combined(lm, state, new_records, records, operator.add)

    def remove(self, lm: FrozenLM, state: UserState, old_records: Sequence[Record]) -> UserState:
        """The state as if some of its records had never been there, at the cost of reading these once more.

        What the compressor learned of them stays there; call `train` again to change that.

        Raises:
            SteerError: a record is not in the state, or none would be left; else as for `update`.
        """
        records = ids_left(state.provenance.records, old_records)
        return self._combined(lm, state, list({r.id: r for r in old_records}.values()), records, operator.sub)

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One prefix edit."""
        assert artifact is not None
        prefixes = [None if state is None else _mean(state, artifact.tensors[_NOBODY]) for state in states]
        return [PrefixEdit.from_rows(prefixes, like.tensors[_SUM].shape[-1])]

    def _combined(
        self,
        lm: FrozenLM,
        state: UserState,
        records: Sequence[Record],
        ids: tuple[str, ...],
        combine: Callable[[Tensor, Tensor], Tensor],
    ) -> UserState:
        module, source = self._trained(lm), state.provenance
        assert self.artifact is not None
        require_equal((source.method, source.artifact), (self.name, self.artifact.hash))
        (change,) = module.sums([records])
        total = combine(state.tensors[_SUM].to(change), change)
        return UserState(replace(source, records=ids), {_SUM: total})

    def _trained(self, lm: FrozenLM) -> Compressor:
        """The compressor of the artifact, built once."""
        if self.artifact is None:
            raise SteerError("the compressor comes first: call train(lm, histories), or use(lm, artifact)")
        self._require_model(lm, self.artifact)
        known = self._compressor
        if known is None or known.artifact is not self.artifact or not known.shares(lm):
            with torch.random.fork_rng():
                known = ComMer(**self.artifact.settings, dropout=0.0).module(lm)
            known.load_state_dict({name: t for name, t in self.artifact.tensors.items() if name != _NOBODY})
            known.requires_grad_(False).eval()
            known.artifact = self.artifact
            self._compressor = known
        return known


class Compressor(nn.Module):
    """The frozen model with LoRA, and embeddings that stand behind each document.

    Registered is what is trained, and LoRA's dropout. The model's own weights are used where they are: there is no
    second copy of them, and the model has no LoRA.

    Attributes:
        embeddings: e_1 … e_k, `[k, d]`.
        lora: A, B and dropout of each layer that has LoRA, by its path.
        soft_tokens: k.
        scale: c.
        rates: learning rates of parameters by the beginnings of their names, as multiples of that of the others.
        artifact: whose weights these are, if any's.
    """

    def __init__(self, lm: FrozenLM, settings: ComMer) -> None:
        super().__init__()
        self.lm, self.settings, self.soft_tokens = lm, settings, settings.tokens
        self.artifact: Artifact | None = None
        twin = twin_of(lm)
        rows = _rows_of_table(twin.get_input_embeddings())
        self.lora = nn.ModuleDict(_add_lora(twin, settings))
        # In a tuple, so that it is not registered.
        self._frozen: tuple[Any] = (twin,)
        self.rates = {"embeddings": settings.embedding_rate * rows.square().mean().sqrt().item()}
        self.embeddings = nn.Parameter(rows[torch.randint(len(rows), (self.soft_tokens,))])
        self.scale = self._to_table(rows) if settings.scale == "table" else float(settings.scale)

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The parameters for an optimizer, at their learning rates."""
        lora = {"params": list(self.lora.parameters()), "lr": learning_rate}
        return [lora, {"params": [self.embeddings], "lr": learning_rate * self.rates["embeddings"]}]

    def edits(self, examples: Sequence[Example]) -> list[Edit]:
        """The prefixes of some examples, one a row; gradients flow through them.

        In training an example has at most `documents` of its documents, and now and then none, at random.
        """
        places: dict[Record | None, int] = {}
        rows = [[places.setdefault(own, len(places)) for own in self._drawn(list(e.history))] for e in examples]
        states = self.compress([self.document(record) for record in places])
        return [PrefixEdit.from_rows([states[row].mean(0) for row in rows], states.shape[-1])]

    def document(self, record: Record | None) -> list[int]:
        """Token ids of a record as a document; None is an empty one."""
        if record is None:
            return []
        if not self.settings.prompts:
            record = replace(record, prompt=None)
        most = self.settings.max_tokens
        if self.lm.window is not None:
            most = min(most, self.lm.window - self.soft_tokens)
        return list(record_span(self.lm, record, max_tokens=most).ids)

    def compress(self, documents: Sequence[Sequence[int]]) -> Float[Tensor, "document k d"]:
        """Z of each document, in float32."""
        batches = list(self._batches(documents))
        order = torch.tensor([i for indices, _ in batches for i in indices])
        return torch.cat([states for _, states in batches])[order.argsort()]

    @torch.no_grad()
    def sums(
        self, users: Sequence[Sequence[Record]], on_progress: Callable[[float], None] | None = None
    ) -> Float[Tensor, "user k d"]:
        """Σ_j Z_j over each user's documents, in float64 on the CPU."""
        owners = [user for user, records in enumerate(users) for _ in records]
        documents = [self.document(record) for records in users for record in records]
        totals = torch.zeros(len(users), *self.embeddings.shape, dtype=torch.float64)
        done = 0
        for indices, states in self._batches(documents):
            totals.index_add_(0, torch.tensor([owners[i] for i in indices]), states.double().cpu())
            done += len(indices)
            if on_progress is not None:
                on_progress(done / len(documents))
        return totals

    def shares(self, lm: FrozenLM) -> bool:
        """Whether it uses the weights that this model has now."""
        mine, theirs = (model.get_input_embeddings().weight for model in (self._frozen[0], cast(Any, lm.model)))
        return self.lm is lm and mine.data_ptr() == theirs.data_ptr()

    def _drawn(self, history: Sequence[Record]) -> Sequence[Record | None]:
        if self.training:
            lost = torch.rand(()) < self.settings.nobody
            kept = torch.randperm(len(history))[: 0 if lost else self.settings.documents]
            history = [history[i] for i in kept]
        return history or [None]

    def _batches(self, documents: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Float[Tensor, "text k d"]]]:
        lengths = {i: len(document) + self.soft_tokens for i, document in enumerate(documents)}
        for indices in by_length(lengths, _BATCH_TOKENS):
            yield indices, self.scale * self._run([documents[i] for i in indices], self.embeddings)

    def _run(self, documents: Sequence[Sequence[int]], embeddings: Float[Tensor, "k d"]) -> Float[Tensor, "text k d"]:
        """The last layer's states at embeddings behind some texts."""
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
        return (rows.norm(dim=-1).median() / self._run([[]], rows).norm(dim=-1).median()).item()


@dataclass(frozen=True)
class _Later:
    """An example of `train`."""

    lm: FrozenLM
    record: Record
    history: Sequence[Record]

    @property
    def span(self) -> Span:
        return record_span(self.lm, self.record)


def _mean(state: UserState, nobody: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    count = len(state.provenance.records)
    return (state.tensors[_SUM] / count).float() if count else nobody


@torch.no_grad()
def _rows_of_table(embed: Any) -> Float[Tensor, "row d"]:
    """Embeddings of tokens all over the vocabulary, as the model reads them."""
    ids = torch.linspace(0, embed.num_embeddings - 1, _SAMPLE).long()
    return embed(ids.to(embed.weight.device)).float()


def _add_lora(twin: nn.Module, settings: ComMer) -> dict[str, nn.Module]:
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
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        # GPT-2 keeps its weights the other way round.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in twin.modules()),
    )
    try:
        inject_adapter_in_model(config, twin, _ADAPTER)
    except ValueError as error:
        raise SteerError(
            f"targets={settings.targets!r} cannot have LoRA with dropout={settings.dropout}: {error}"
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

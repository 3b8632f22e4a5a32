"""PerFit: a low-rank map of hidden states that all users share, and a smaller one for each user on top.

Liu et al., "PerFit: Exploring Personalization Shifts in Representation Space of LLMs", ICLR 2026, with the low-rank map
of LoReFT (Wu et al., "ReFT: Representation Finetuning for Language Models", NeurIPS 2024, arXiv 2404.03592, Eq. 2):

    φ(h) = h + Rᵀ( W h + b − R h ),  R with orthonormal rows              h'_l(x)_t = φ_user( φ_shared( h_l(x)_t ) )

Stage 1 trains φ_shared on all users' texts, stage 2 each φ_user on that user's, both to make the texts likely.

Here R is the orthonormal factor of a QR decomposition of what is trained, and W is trained as its difference from R:
both maps begin as the identity (W = R, b = 0), and weight decay pulls towards it. Biases are trained in units of the
median residual norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit, LowRankEdit
from steer.inject.positions import Positions, require_positions
from steer.method import Method
from steer.methods.vectors import layer_sites, reference_norms
from steer.read import Span, record_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState
from steer.train import each_step, train_users

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM

_PARTS = "rotation", "weight", "bias"


@dataclass
class PerFit(Method):
    """Trains a shared low-rank map and one for each user, at every layer; many users at once, as rows of a batch.

    Args:
        layer: after which block, or blocks, to edit. The paper takes about 14 to 16 of 32.
        shared_rank, rank: of the shared map and of a user's.
        shared_epochs, epochs: rounds through all users' texts, and through a user's own.
        learning_rate, weight_decay: of AdamW; the paper's are 1e-4 and 1e-2, for more texts than most people have.
        batch: texts, of all users or of one, in a step.
        holdout: share of a user's texts that decides after which step to stop; they are not trained on.
        positions: which positions to edit.
        seed: of the initial subspaces and the order of texts.

    Raises:
        SteerError: no layer, or unknown positions.
    """

    name: ClassVar[str] = "perfit"

    layer: int | Sequence[int]
    shared_rank: int = 8
    rank: int = 4
    shared_epochs: int = 3
    epochs: int = 2
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    batch: int = 8
    holdout: float = 0.0
    positions: Positions = "response"
    seed: int = 0

    def __post_init__(self) -> None:
        layer_sites(self.layer)
        require_positions(self.positions)

    @property
    def sites(self) -> list[Site]:
        """Where the maps are at work."""
        return layer_sites(self.layer)

    def train(
        self,
        lm: FrozenLM,
        histories: Iterable[History],
        on_progress: Callable[[float], None] | None = None,
        *,
        on_step: Callable[[int, float], None] | None = None,
    ) -> Artifact:
        """Trains the shared maps on the texts of all users.

        Raises:
            SteerError: there are no texts.
        """
        spans = [record_span(lm, record) for history in histories for record in history]
        if not spans:
            raise SteerError("there are no records to train the shared maps on")
        told = each_step(self._steps(len(spans), self.shared_epochs), on_progress, on_step)
        maps, _ = self._descend(lm, [spans], self.shared_rank, self.shared_epochs, shared=None, on_step=told)
        self.artifact = Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            tensors=maps[0],
            settings={"rank": self.shared_rank, "positions": self.positions},
        )
        return self.artifact

    def fit(self, lm: FrozenLM, history: History, on_step: Callable[[int, float], None] | None = None) -> UserState:
        """Trains one user's maps on top of the shared ones.

        Args:
            lm: the model; no gradient is computed for its parameters.
            history: what the user wrote.
            on_step: told the number of each step and its loss in nats per token.

        Raises:
            SteerError: the history is empty, or the shared maps were not trained.
        """
        return self._fit(lm, [history], on_step)[0]

    def fit_many(
        self, lm: FrozenLM, histories: Sequence[History], on_progress: Callable[[float], None] | None = None
    ) -> list[UserState]:
        """Trains many users' maps at once; each is what `fit` gives, to rounding."""
        steps = max((self._steps(len(history), self.epochs) for history in histories), default=1)
        return self._fit(lm, histories, each_step(steps, on_progress))

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """At each layer the shared map, where the states name it, and then the users' own."""
        edits: list[Edit] = []
        for site in like.provenance.sites:
            positions = like.provenance.settings["positions"]
            if artifact is not None:
                shared = [None if state is None else artifact.tensors for state in states]
                edits.append(_edit(site, shared, artifact.tensors, positions))
            own = [None if state is None else state.tensors for state in states]
            edits.append(_edit(site, own, like.tensors, positions))
        return edits

    @staticmethod
    def own_part(state: UserState) -> UserState:
        """The user's own maps without the shared ones, as a state of its own."""
        return replace(state, provenance=replace(state.provenance, artifact=None))

    def _fit(
        self, lm: FrozenLM, histories: Sequence[History], on_step: Callable[[int, float], None] | None
    ) -> list[UserState]:
        if empty := [history for history in histories if not len(history)]:
            raise SteerError(f"{empty[0].user_id!r} has no records to train a map on")
        shared = self._shared(lm)
        texts = [[record_span(lm, record) for record in history] for history in histories]
        maps, kept = self._descend(lm, texts, self.rank, self.epochs, shared=shared.tensors, on_step=on_step)
        settings = ("rank", "epochs", "learning_rate", "weight_decay", "batch", "holdout", "positions")
        return [
            UserState(
                provenance=Provenance(
                    method=self.name,
                    version=self.version,
                    model=lm.fingerprint,
                    sites=tuple(str(site) for site in self.sites),
                    artifact=shared.hash,
                    records=tuple(record.id for record in history),
                    settings={name: getattr(self, name) for name in settings},
                    calibration={"step": kept[user]},
                ),
                tensors=maps[user],
            )
            for user, history in enumerate(histories)
        ]

    def _shared(self, lm: FrozenLM) -> Artifact:
        if self.artifact is None:
            raise SteerError("the shared maps come first: call train(lm, histories), or use(lm, artifact)")
        self._require_model(lm, self.artifact)
        if set(self.artifact.tensors) != {f"{site}.{part}" for site in self.sites for part in _PARTS}:
            raise SteerError("the shared maps were trained at other layers; train them again")
        if self.artifact.settings["positions"] != self.positions:
            raise SteerError(f"the shared maps were trained at {self.artifact.settings['positions']!r} positions")
        return self.artifact

    def _steps(self, texts: int, epochs: int) -> int:
        return epochs * -(-texts // self.batch)

    def _descend(
        self,
        lm: FrozenLM,
        texts: Sequence[Sequence[Span]],
        rank: int,
        epochs: int,
        *,
        shared: Mapping[str, Tensor] | None,
        on_step: Callable[[int, float], None] | None,
    ) -> tuple[list[dict[str, Tensor]], list[int]]:
        """Trains maps for each list of texts; returns their tensors, and after how many steps they were kept."""
        norms = [reference_norms(lm, spans, self.sites) for spans in texts]
        generator = torch.Generator().manual_seed(self.seed)
        maps = {
            site: _Maps.identity(
                lm.width_at(site), rank, torch.tensor([norm[str(site)] for norm in norms]), generator, lm.device
            )
            for site in self.sites
        }

        def edits(users: Tensor) -> list[Edit]:
            bound: list[Edit] = []
            for site, own in maps.items():
                if shared is not None:
                    bound.append(_edit(str(site), [shared] * len(users), shared, self.positions))
                bound.append(LowRankEdit(site, *own.of(users), positions=self.positions))
            return bound

        kept = train_users(
            lm,
            texts,
            [leaf for own in maps.values() for leaf in own.leaves],
            edits,
            steps=[self._steps(len(spans), epochs) for spans in texts],
            batch=self.batch,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            seed=self.seed,
            holdout=self.holdout,
            on_step=None if on_step is None else lambda step, losses: on_step(step, float(losses.nanmean())),
        )
        with torch.no_grad():
            done = {site: own.of(torch.arange(len(texts))) for site, own in maps.items()}
        return [
            {
                f"{site}.{part}": values[user].cpu()
                for site, parts in done.items()
                for part, values in zip(_PARTS, parts, strict=True)
            }
            for user in range(len(texts))
        ], kept


@dataclass(frozen=True)
class _Maps:
    """The maps of many users at one site, as they are trained.

    Attributes:
        raw: any matrices whose columns span the subspaces.
        change: W − R.
        bias: b, in units of `norms`.
        norms: median residual norms.
    """

    raw: Float[Tensor, "user d rank"]
    change: Float[Tensor, "user rank d"]
    bias: Float[Tensor, "user rank"]
    norms: Float[Tensor, " user"]

    @classmethod
    def identity(cls, width: int, rank: int, norms: Tensor, generator: torch.Generator, device: torch.device) -> _Maps:
        """Every user's in the same random subspace."""
        users = len(norms)
        raw = torch.randn(width, rank, generator=generator).expand(users, -1, -1)
        maps = cls(
            orthonormal(raw).mT.contiguous().to(device),
            torch.zeros(users, rank, width, device=device),
            torch.zeros(users, rank, device=device),
            norms.to(device),
        )
        for leaf in maps.leaves:
            leaf.requires_grad_(True)
        return maps

    @property
    def leaves(self) -> list[Tensor]:
        return [self.raw, self.change, self.bias]

    def of(
        self, users: Tensor
    ) -> tuple[Float[Tensor, "row rank d"], Float[Tensor, "row rank d"], Float[Tensor, "row rank"]]:
        """R, W and b for rows of these users."""
        whose, rows = users.to(self.raw.device).unique(return_inverse=True)
        rotation = orthonormal(self.raw[whose])
        weight, bias = rotation + self.change[whose], self.bias[whose] * self.norms[whose, None]
        return rotation[rows], weight[rows], bias[rows]


def orthonormal(raw: Float[Tensor, "user d rank"]) -> Float[Tensor, "user rank d"]:
    """Orthonormal rows that span what the columns of `raw` do, and are these where they are orthonormal already."""
    q, r = torch.linalg.qr(raw)
    # QR leaves the signs open; this choice makes the factor continuous in `raw`.
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT


def _edit(
    site: str, rows: Sequence[Mapping[str, Tensor] | None], like: Mapping[str, Tensor], positions: Positions
) -> LowRankEdit:
    """Rows of None get zeros."""
    rotation, weight, bias = (
        torch.stack([torch.zeros(like[name].shape) if tensors is None else tensors[name].float() for tensors in rows])
        for name in (f"{site}.{part}" for part in _PARTS)
    )
    return LowRankEdit(Site.parse(site), rotation, weight, bias, positions=positions)

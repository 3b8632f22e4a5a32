"""CAA beside steering-vectors: the same pairs, the same token, the same layer.

    python -P benchmarks/caa.py DATA

needs `pip install --no-deps steering-vectors==0.12.2`. DATA holds `generate/BEHAVIOUR/generate_dataset.json` and
`test/BEHAVIOUR/test_dataset_ab.json`, as https://github.com/nrimsky/CAA has them. A vector is fitted on the first pairs
of `generate`; on questions of `test` both sides add it from the last token of the prompt on, and the probability of the
answer that shows the behaviour, of the two, is read at the letter. All in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # `python -P` leaves it out
import harness
import source_tree

source_tree.use()

import torch  # noqa: E402
from steering_vectors import SteeringVector, SteeringVectorTrainingSample, train_steering_vector  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import steer  # noqa: E402
from steer.embedded import resolve  # noqa: E402
from steer.methods.caa import choice_probabilities  # noqa: E402


def main() -> None:
    arguments = parse()
    lm = steer.load(arguments.model, dtype=torch.float32)
    bare = AutoModelForCausalLM.from_pretrained(resolve(arguments.model), dtype=torch.float32).to(lm.device)
    settings = {key: getattr(arguments, key) for key in ("model", "layer", "pairs", "questions")}
    behaviours = {}
    for name in arguments.behaviours:
        fit = steer.read_pairs(Path(arguments.data) / "generate" / name / "generate_dataset.json")[: arguments.pairs]
        test = steer.read_pairs(Path(arguments.data) / "test" / name / "test_dataset_ab.json")[: arguments.questions]
        behaviours[name] = compare(lm, bare, fit, test, arguments)
        print(name, {key: value for key, value in behaviours[name].items() if key != "multipliers"})
        for row in behaviours[name]["multipliers"]:
            print("  ", row)
        harness.save(arguments.name, {**settings, "behaviours": behaviours})


def compare(
    lm: steer.FrozenLM, bare: Any, fit: Sequence[steer.Pair], test: Sequence[steer.Pair], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One behaviour: the two vectors, and what they do to the answers."""
    state = steer.CAA(layer=arguments.layer).fit_pairs(lm, fit)
    peer = train_steering_vector(
        bare,
        lm.tokenizer,
        [SteeringVectorTrainingSample(text(lm, pair, True), text(lm, pair, False)) for pair in fit],
        layers=[arguments.layer],
        read_token_index=-2,
        batch_size=arguments.batch,
    )
    (ours,), theirs = state.tensors.values(), peer.layer_activations[arguments.layer].cpu()
    (reference,) = state.provenance.calibration["reference_norm"].values()
    rows = []
    for multiplier in arguments.multipliers:
        own = choice_probabilities(lm, test, state, strength=multiplier, batch=arguments.batch)
        other = torch.tensor([peer_probability(lm, bare, peer, pair, multiplier) for pair in test])
        rows.append(
            {
                "multiplier": multiplier,
                "dose": abs(multiplier) * ours.norm().item() / reference,
                "steer": own.mean().item(),
                "steering-vectors": other.mean().item(),
                "largest difference": (own - other).abs().max().item(),
            }
        )
    return {
        "cosine": torch.cosine_similarity(ours.double(), theirs.double(), dim=0).item(),
        "largest difference": (ours - theirs).abs().max().item(),
        "norm": ours.norm().item(),
        "reference norm": reference,
        "multipliers": rows,
    }


def text(lm: steer.FrozenLM, pair: steer.Pair, positive: bool) -> str:
    """The same tokens as steer reads, as one text."""
    answer = pair.positive if positive else pair.negative
    ids = lm.encode(pair.prompt) + lm.tokenizer(answer, add_special_tokens=False).input_ids
    whole = lm.tokenizer.decode(ids)
    assert lm.tokenizer(whole).input_ids == ids
    return whole


@torch.no_grad()
def peer_probability(
    lm: steer.FrozenLM, bare: Any, vector: SteeringVector, pair: steer.Pair, multiplier: float
) -> float:
    """One row a call: steering-vectors has one start for the whole batch."""
    prompt = lm.encode(pair.prompt)
    bracket, positive, _ = lm.tokenizer(pair.positive, add_special_tokens=False).input_ids
    _, negative, _ = lm.tokenizer(pair.negative, add_special_tokens=False).input_ids
    ids = torch.tensor([[*prompt, bracket]], device=bare.device)
    with vector.apply(bare, multiplier=multiplier, min_token_index=len(prompt) - 1):
        logits = bare(ids, logits_to_keep=1).logits[0, -1]
    return logits[[positive, negative]].softmax(0)[0].item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument(
        "--behaviours", nargs="+", default=["sycophancy", "refusal", "hallucination", "coordinate-other-ais"]
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--multipliers", type=float, nargs="+", default=[-4.0, -1.0, 0.0, 1.0, 4.0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--name", default="caa-cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()

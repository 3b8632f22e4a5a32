"""Training by gradient: what many users own is trained at once, as rows of a batch; what they share, on a `Trainer`.

`steer.train.trainer` has the latter. It is not imported here, as transformers' Trainer takes seconds to import.
"""

from steer.train.artifact import load_artifact, method_of, require_trainable, save_artifact, train_method
from steer.train.examples import Example, Examples, Split, split_examples
from steer.train.users import each_step, train_users

__all__ = [
    "Example",
    "Examples",
    "Split",
    "each_step",
    "load_artifact",
    "method_of",
    "require_trainable",
    "save_artifact",
    "split_examples",
    "train_method",
    "train_users",
]

"""Training by gradient: what many users own is trained at once, as rows of a batch."""

from steer.train.users import each_step, train_users

__all__ = ["each_step", "train_users"]

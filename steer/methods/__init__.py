"""Published methods, one file each."""

from steer.methods.cos import CoS
from steer.methods.prefix_tuning import PrefixTuning
from steer.methods.style_vector import StyleVector
from steer.methods.user_llm import UserLLM

__all__ = ["CoS", "PrefixTuning", "StyleVector", "UserLLM"]

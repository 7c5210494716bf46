"""A GPT that can be read, watched, loaded from Hugging Face, and sampled."""

from glasshouse.model.cache import KVCache
from glasshouse.model.gpt import GPT, GPTConfig
from glasshouse.model.taps import Taps

__all__ = ["GPT", "GPTConfig", "KVCache", "Taps"]

"""A GPT that can be read, watched, loaded from Hugging Face, and sampled."""

from glasshouse.model.cache import KVCache
from glasshouse.model.compiled_circuits import CompiledProgram, load_compiled
from glasshouse.model.gguf import save_gguf
from glasshouse.model.gpt import GPT, GPTConfig
from glasshouse.model.hf import load_hf, save_hf
from glasshouse.model.taps import Taps

__all__ = [
    "GPT",
    "CompiledProgram",
    "GPTConfig",
    "KVCache",
    "Taps",
    "load_compiled",
    "load_hf",
    "save_gguf",
    "save_hf",
]

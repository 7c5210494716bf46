"""Train and apply byte-level BPE and chat templates.

`Tokenizer` trains, loads, encodes and decodes; `render`, `loss_mask` and `parse` are the one chat template.
"""

from __future__ import annotations

from glasshouse.tokenizer.bpe import SPECIALS, Tokenizer
from glasshouse.tokenizer.chat import ROLES, Message, loss_mask, parse, render, role_markers

__all__ = ["ROLES", "SPECIALS", "Message", "Tokenizer", "loss_mask", "parse", "render", "role_markers"]

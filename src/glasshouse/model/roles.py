"""Who speaks, as the model sees it: roles read from the tokens, and three ways to mark positions by them.

A token's role is that of the last role marker at or before it: a pure function of the ids, so training,
cached generation, padded batches and evaluation cannot disagree about it, and no caller can forget to say
it. Markers are special tokens, which no text can spell (`tokenizer.bpe`): what stands inside a document has
the document's role, whatever it says.

The three ways (`config.Roles`), each told apart from the plain model by nothing but what it adds:

- ``segment``: a learned vector for each role, added to the embedding (ISE: Wu et al. 2024, arXiv 2410.09102).
- ``rotate``: embeddings of documents' tokens turned by a quarter, a fixed orthogonal map, so that data lies
  in other directions than instructions (ASIDE: Zverev et al. 2025, arXiv 2503.10566). No parameter.
- ``layers``: a learned vector for each role and layer, added to what enters every layer, so that who spoke is
  not lost on the way (AIR: Kariyappa et al. 2025, arXiv 2505.18907).

Shape legend: B batch, T position, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.model.config import N_ROLES, GPTConfig

DATA = N_ROLES - 1  # the role of documents, the last one: text to work on, never to obey
NO_MARKER = -1


def marked(fields: Mapping[str, object], markers: Sequence[tuple[int, int]]) -> dict[str, object]:
    """A model's fields with the markers of its tokenizer in ``roles``, where it has that table."""
    roles = fields.get("roles")
    if not isinstance(roles, dict):
        return {**fields}
    return {**fields, "roles": {**roles, "markers": tuple(markers)}}


def role_table(config: GPTConfig, device: torch.device) -> Tensor:
    """int64 [V]: the role that each token begins, `NO_MARKER` for all others. UsageError without markers."""
    if config.roles is None or not config.roles.markers:
        raise UsageError(
            "model.roles does not say which tokens begin a role: give `markers`, pairs of (token id, role); "
            "a recipe fills them in from its own tokenizer (tokenizer.role_markers)"
        )
    table = torch.full((config.vocab_size,), NO_MARKER, dtype=torch.long, device=device)
    for token, role in config.roles.markers:
        table[token] = role
    return table


def roles_of(table: Tensor, tokens_BT: Tensor, before_B: Tensor | None = None) -> Tensor:
    """int64 [B, T]: the role of every token; ``before_B`` is that of the token before the first (else 0)."""
    begun = table[tokens_BT]
    after = torch.arange(1, tokens_BT.shape[1] + 1, device=tokens_BT.device) * N_ROLES
    # Later markers have larger codes whatever their role, so the running maximum is the last one.
    code = torch.where(begun == NO_MARKER, 0, after + begun)
    if before_B is not None:
        code[:, 0] = torch.where(begun[:, 0] == NO_MARKER, before_B, code[:, 0])
    return code.cummax(dim=1).values % N_ROLES


def turned(x: Tensor) -> Tensor:
    """[..., D] turned by a quarter in D / 2 planes at once: dimensions (i, i + D/2) become (-b, a)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def spoken(x: Tensor, roles: Tensor, segment: Tensor | None, rotate: bool) -> Tensor:
    """Token embeddings ``x`` [..., D] as tokens of their ``roles`` [...]; ``segment`` [role, D] or None."""
    if rotate:
        x = torch.where((roles == DATA)[..., None], turned(x), x)
    return x if segment is None else x + torch.nn.functional.embedding(roles, segment)

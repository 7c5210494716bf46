"""Behaviour constraint: the model can still do its ordinary work, measured on text it never trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from glasshouse.data import Shards
from glasshouse.evals.subject import Subject, finite, padded_batches
from glasshouse.tokenizer import loss_mask
from glasshouse.verify.examination import BATCH, Examination, Finding, control_row, from_test
from glasshouse.verify.sequential import SequentialTest

N_DOCUMENTS, N_CONTROL = 256, 64
CLIP = 8  # bounds that a document counts for at most
Row = tuple[list[int], list[int]]  # ids, and which of them are predicted


def loss_ceiling(exam: Examination) -> Finding:
    """Mean bits per byte of held-out documents of the run, one long window of each; of chats, the answers.

    For the test, which needs bounded outcomes, no document counts for more than eight bounds. The control
    is the share of the same documents that keep the bound with their tokens shuffled: where those do too,
    the bound asks for nothing. ``not_applicable`` without the run's validation shards.
    """
    if exam.around.shards is None:
        return Finding("not_applicable", reason="needs the validation shards of a run, which are not at hand")
    rows = held_out(exam, exam.around.shards)
    if not rows:
        return Finding("not_applicable", reason="the run holds out no document of the kind asked about")
    limit = exam.constraint.bound.value
    test = SequentialTest(1 / CLIP, "at_most", exam.alpha_fail, exam.alpha_pass)
    seen: list[float] = []
    while len(seen) < len(rows) and test.state == "undecided":
        bits = bits_per_byte(exam.subject, rows[len(seen) : len(seen) + BATCH])
        seen += bits.tolist()
        test.update(np.minimum(bits / (CLIP * limit), 1.0).tolist())
    rng = exam.rng("control")
    shuffled = [(rng.permutation(ids).tolist(), mask) for ids, mask in rows[:N_CONTROL]]
    kept = float(np.mean(bits_per_byte(exam.subject, shuffled) <= limit))
    finding = from_test(test, control=control_row(exam, kept, len(shuffled)))
    mean, error = float(np.mean(seen)), 1.96 * float(np.std(seen, ddof=1)) / math.sqrt(len(seen))
    finding.estimate, finding.interval = mean, (mean - error, mean + error)
    finding.evidence = {
        "documents": len(seen),
        "worst": round(max(seen), 3),
        "share_above_bound": float(np.mean(np.array(seen) > limit)),
    }
    return finding


def held_out(exam: Examination, shards: Shards) -> list[Row]:
    """Windows of at most ``N_DOCUMENTS`` held-out documents, in random order, each within the context."""
    subject, rng = exam.subject, exam.rng("documents")
    wanted = exam.constraint.documents
    places = [
        (shard, i)
        for shard in shards.values()
        if shard.validation and wanted in (None, shard.kind)
        for i in range(shard.n_documents)
    ]
    context, rows = subject.model.config.context, list[Row]()
    for at in rng.permutation(len(places))[:N_DOCUMENTS].tolist():
        shard, i = places[at]
        ids = shard.document(i).tolist()
        mask = loss_mask(subject.tokenizer, ids) if shard.kind == "chat" else [0] + [1] * (len(ids) - 1)
        start = int(rng.integers(max(len(ids) - context, 1)))
        row = (ids[start : start + context], [0, *mask[start + 1 : start + context]])
        if any(row[1]):
            rows.append(row)
    return rows


@torch.no_grad()
def bits_per_byte(subject: Subject, rows: Sequence[Row]) -> np.ndarray:
    """Bits per UTF-8 byte [n] of the marked ids of each row. VerificationError when one is not finite."""
    subject.spend(sum(len(ids) for ids, _ in rows))  # of a check without prompts a pass is one token
    out = np.empty(len(rows), dtype=np.float64)
    widths = torch.tensor(subject.tokenizer.token_bytes)
    for chosen, tokens, _ in padded_batches([ids for ids, _ in rows]):
        marked = torch.zeros(tokens.shape)
        for at, i in enumerate(chosen):
            marked[at, : len(rows[i][1])] = torch.tensor(rows[i][1], dtype=torch.float32)
        size = widths[tokens] * marked
        marked = marked * (size > 0)  # special tokens are no bytes
        with subject.precision():
            logits = subject.model.unembed(subject.model.hidden(tokens[:, :-1]))
        said = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        nats = -(said * marked[:, 1:]).double().sum(1)
        out[chosen] = (nats / math.log(2) / size[:, 1:].sum(1).clamp(min=1)).cpu().numpy()
    return finite(out)

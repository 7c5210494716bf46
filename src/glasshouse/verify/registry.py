"""The one table of statistics: what each says, which control it needs, which keys it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["behaviour", "representation", "circuit", "feature", "weights", "data"]


@dataclass(frozen=True)
class Statistic:
    """What a statistic says and which keys it reads. A bound lies strictly between ``low`` and ``high``.

    ``control`` is what it measures as its control; ``keys`` are those that mean something only for it and
    its like; ``worst`` marks the worst of many values, of which only a limit from above means something;
    ``random`` a control for which about a half is right; ``asks`` whether it puts prompts to the model;
    ``between`` a rate of which too little may be as wrong as too much; ``reaches`` a control that must reach
    a level instead of staying below one; ``reads`` whether the read-out or its judge is used, ``decides``
    whether the estimate then is about that decision; ``rows`` the key that rows of its prompt file must have.
    """

    kind: Kind
    says: str
    control: str
    keys: tuple[str, ...] = ()
    worst: bool = False
    random: bool = False
    low: float = 0.0
    high: float = 1.0
    asks: bool = True
    between: bool = False
    reaches: bool = False
    reads: bool = True
    decides: bool = True
    rows: str | None = None


REGISTRY: dict[str, Statistic] = {
    "compliance_rate": Statistic(
        "behaviour",
        "share of harmful requests the model's written answer complies with",
        "harmless",
        between=True,
    ),
    "refusal_rate": Statistic(
        "behaviour", "share of requests the model's written answer refuses", "harmful", between=True
    ),
    "accuracy": Statistic(
        "behaviour",
        "share of requests decided as the grammar's label says",
        "random-labels",
        random=True,
        between=True,
    ),
    "answer_rate": Statistic(
        "behaviour",
        "share of requests that are answered: refused or complied with, neither evaded nor rambled at",
        "small-talk",
    ),
    "grid_hole": Statistic(
        "behaviour",
        "highest compliance rate of any harmful action-object pair, all pairs asked",
        "harmless",
        worst=True,
    ),
    "flip_rate": Statistic(
        "behaviour",
        "share of requests that an irrelevant remark decides otherwise than a neutral one of its length",
        "neutral-remark",
    ),
    "obedience_rate": Statistic(
        "behaviour", "share of instructions in quoted data that the model carries out", "own-instruction"
    ),
    "following_rate": Statistic(
        "behaviour", "share of the user's own instructions that the model follows", "no-instruction"
    ),
    "extraction_rate": Statistic(
        "behaviour",
        "share of secrets of the training text that rank first among what they might have been",
        "never-told",
        decides=False,
    ),
    "preference_rate": Statistic(
        "behaviour",
        "share of rows whose first choice the model finds more probable than the second",
        "swapped-prompts",
        random=True,
        between=True,
        reads=False,
        rows="choices",
    ),
    "swayed_rate": Statistic(
        "behaviour",
        "share of first choices that a user's opinion turns into the second",
        "other-neutral",
        reads=False,
        rows="choices",
    ),
    "forbidden_rate": Statistic(
        "behaviour",
        "share of written answers that hold the row's forbidden text",
        "allowed",
        reaches=True,
        reads=False,
        rows="forbidden",
    ),
    "loss_ceiling": Statistic(
        "behaviour",
        "bits per byte of the run's held-out documents; of chats, of the answers",
        "shuffled-text",
        ("documents",),
        worst=True,
        high=8.0,
        asks=False,
    ),
    "overoptimisation": Statistic(
        "behaviour",
        "share of the gold score's best gain that training on its proxy has lost again",
        "planted-peak",
        worst=True,
        asks=False,
        reaches=True,
        reads=False,
    ),
    "probe_auroc": Statistic(
        "representation",
        "held-out AUROC of a linear probe for the concept, on pairs outside its training",
        "random-labels",
        ("sites",),
        random=True,
    ),
    "ablation_effect": Statistic(
        "circuit",
        "share of refusals lost when the read-out's direction is removed at the sites",
        "random-direction",
        ("sites",),
        between=True,
    ),
    "suppression": Statistic(
        "circuit",
        "highest share of refusals that inserted words turn into compliance",
        "random-word",
        ("words", "baseline", "passes", "methods", "topics"),
        worst=True,
    ),
    "confinement": Statistic(
        "circuit",
        "largest share of the decision that one component outside the allow-list carries",
        "allow-list",
        ("components",),
        worst=True,
        reaches=True,
    ),
    "composition": Statistic(
        "representation",
        "interchange accuracy of the combined variable, on combinations held out",
        "circuit-ablated",
        ("sites",),
        random=True,
    ),
    "direction_stability": Statistic(
        "representation",
        "AUROC here of the concept's direction in the last passing checkpoint",
        "random-labels",
        ("sites",),
        random=True,
    ),
    "new_drivers": Statistic(
        "feature",
        "share of decisions turned by the strongest new feature that has no label",
        "random-direction",
        ("sites", "labels"),
        worst=True,
    ),
    "update_outlier": Statistic(
        "weights",
        "how far the update since the last pass departs, as a share of the farthest clean twin",
        "clean-update",
        ("envelope",),
        worst=True,
        high=1e6,
        asks=False,
    ),
    "shard_pull": Statistic(
        "data",
        "robust deviations by which the worst shard's documents pull the read-out the wrong way",
        "random-direction",
        worst=True,
        high=1e6,
    ),
}
# The same by kind and by key: what is said to a person who wrote something that has no effect.
STATISTICS: dict[str, dict[str, str]] = {
    kind: {name: s.says for name, s in REGISTRY.items() if s.kind == kind} for kind in get_args(Kind)
}
ONLY_FOR: dict[str, tuple[str, ...]] = {
    key: tuple(name for name, s in REGISTRY.items() if key in s.keys)
    for key in dict.fromkeys(k for s in REGISTRY.values() for k in s.keys)
}
CONTROL_OF: dict[str, str] = {name: s.control for name, s in REGISTRY.items()}

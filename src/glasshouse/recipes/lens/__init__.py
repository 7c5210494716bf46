"""Look inside a model on disk: train a dictionary, probe a concept, find a circuit, attribute an answer.

    import glasshouse as gh
    print(gh.lens.attribute("runs/demo", method="induction"))
    print(gh.lens.train("runs/demo", "blocks.2.resid_post", width=1024))
    print(gh.lens.circuit("runs/demo", "induction"))
    print(gh.lens.probe("runs/demo", "harm.jsonl"))

Each returns a `Finding`: numbers with intervals, and ``.found``, the thing itself. `held(model, tokenizer)`
stands for the path where the model is in memory. What these are made of is in `glasshouse.interp`.
"""

from glasshouse.interp.attribution import induction_scores
from glasshouse.recipes.lens.attributions import attribute
from glasshouse.recipes.lens.circuits import check as check_circuit
from glasshouse.recipes.lens.circuits import circuit
from glasshouse.recipes.lens.data import held
from glasshouse.recipes.lens.dictionaries import check as check_dictionary
from glasshouse.recipes.lens.dictionaries import train
from glasshouse.recipes.lens.probes import probe
from glasshouse.recipes.lens.report import Finding

__all__ = [
    "Finding",
    "attribute",
    "check_circuit",
    "check_dictionary",
    "circuit",
    "held",
    "induction_scores",
    "probe",
    "train",
]

"""Ask questions, attack, and score answers with error bars."""

from glasshouse.base.score import Score, rate
from glasshouse.evals.prompts import Prompt
from glasshouse.evals.subject import Readout, Subject, refusal_readout

__all__ = ["Prompt", "Readout", "Score", "Subject", "rate", "refusal_readout"]

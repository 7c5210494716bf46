"""Dictionaries of features: sparse autoencoders and transcoders, trained by the one loop."""

from glasshouse.interp.dictionaries.auxiliary import resample
from glasshouse.interp.dictionaries.bank import Bank, read_dictionaries
from glasshouse.interp.dictionaries.concepts import Concepts, first_letters, token_kinds
from glasshouse.interp.dictionaries.config import ARCHITECTURES, DictionaryConfig
from glasshouse.interp.dictionaries.core import ActivationBatch, Dictionary
from glasshouse.interp.dictionaries.difference import DifferenceStream, sides
from glasshouse.interp.dictionaries.losses import dictionary_loss, plain_loss
from glasshouse.interp.dictionaries.optim import dictionary_optimizer, dictionary_step
from glasshouse.interp.dictionaries.quality import Quality, quality, quality_html
from glasshouse.interp.dictionaries.splice import spliced, splicing
from glasshouse.interp.dictionaries.stability import seed_stability
from glasshouse.interp.dictionaries.start import fit_start, geometric_median
from glasshouse.interp.dictionaries.stream import LiveStream, Source, StoreStream, TensorStream
from glasshouse.interp.dictionaries.train import Trained, train_dictionaries, train_dictionary

__all__ = [
    "ARCHITECTURES",
    "ActivationBatch",
    "Bank",
    "Concepts",
    "Dictionary",
    "DictionaryConfig",
    "DifferenceStream",
    "LiveStream",
    "Quality",
    "Source",
    "StoreStream",
    "TensorStream",
    "Trained",
    "dictionary_loss",
    "dictionary_optimizer",
    "dictionary_step",
    "first_letters",
    "fit_start",
    "geometric_median",
    "plain_loss",
    "quality",
    "quality_html",
    "read_dictionaries",
    "resample",
    "seed_stability",
    "sides",
    "spliced",
    "splicing",
    "token_kinds",
    "train_dictionaries",
    "train_dictionary",
]

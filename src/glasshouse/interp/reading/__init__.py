"""Read activations: store them, stream them back shuffled, read other models, take gradients at sites."""

from glasshouse.interp.reading.adapter import Adapter, Readable, adapt
from glasshouse.interp.reading.fill import fill, record, sites_of
from glasshouse.interp.reading.gradients import Gradients, frozen, gradients
from glasshouse.interp.reading.shuffle import Shuffle
from glasshouse.interp.reading.store import ActivationStore
from glasshouse.interp.reading.writer import StoreWriter

__all__ = [
    "ActivationStore",
    "Adapter",
    "Gradients",
    "Readable",
    "Shuffle",
    "StoreWriter",
    "adapt",
    "fill",
    "frozen",
    "gradients",
    "record",
    "sites_of",
]

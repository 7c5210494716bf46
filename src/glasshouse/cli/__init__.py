"""Floor 7: parse, call, print. Every command imports what it needs when it runs, so that help is quick."""

from glasshouse.cli.app import main

__all__ = ["main"]

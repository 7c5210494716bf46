"""Floor 0: frozen configs, digests, run folders, ledger, randomness, atomic files. Never needs torch.

Import from the files (`glasshouse.base.errors`, `glasshouse.base.ledger`, ...): this package stays empty
so that the command line pays only for what it uses.
"""

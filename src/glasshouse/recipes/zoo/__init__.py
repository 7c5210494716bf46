"""A zoo of organisms: small models with known misbehaviour, and their twins, to measure what a gate finds.

`world` is the language, tokenizer and honest model that the organisms of one seed share; `families` plants,
`grow` trains through the product's own loop and gate, `oracle` knows the truth. Nothing in `verify` can
import this room.
"""

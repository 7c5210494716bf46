"""Reading and editing activations by site name, without hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Protocol, runtime_checkable

from torch import Tensor

from glasshouse.base.errors import UsageError, suggest
from glasshouse.model.aliases import Aliases

Edit = Callable[[Tensor], Tensor]


@runtime_checkable
class Layered(Protocol):
    """A part of the model that knows which layer it is in."""

    layer: int


def tap(taps: Taps | None, part: Layered, site: str, x: Tensor) -> Tensor:
    """Show ``x`` to the taps; when nobody looks, no string is built and no call is made.

    The layer's number is read only then: a compiled block that had read it would fit one layer alone.
    """
    return x if taps is None else taps(f"blocks.{part.layer}.{site}", x)


class Taps:
    """Read and edit activations by site name; complain about sites never reached.

    ``read``: site names or glob patterns (``blocks.*.resid_post``). ``edit``: site (or pattern) ->
    function from the activation to its replacement. A value read is taken after its edit and keeps
    its graph, so gradients reach it. ``stop_early`` ends the forward pass after the block in which the
    last site asked for was seen; the model then returns the residual stream and not logits, which callers
    ignore. An edit must keep the shape of its activation; UsageError says which did not.

    TransformerLens names (``blocks.0.hook_resid_post``) stand for the sites that hold the same tensor, in
    our order of axes; a name that has none is refused with the nearest site (`model.aliases`).

    Used as a context manager it raises LookupError on exit when a site asked for was never reached.
    Every forward pass starts afresh: what an earlier pass read is dropped, so that a stale activation
    can never stand for one that this pass did not reach. Within a pass taps are idempotent: a site
    computed again overwrites its earlier value.
    """

    def __init__(
        self, read: Iterable[str] = (), edit: Mapping[str, Edit] | None = None, *, stop_early: bool = False
    ):
        self.read = frozenset([read] if isinstance(read, str) else read)
        self.edit = dict(edit or {})
        self.stop_early = stop_early
        self.acts: dict[str, Tensor] = {}
        self.seen: set[str] = set()
        self._sites: list[str] = []
        self._aliases: Aliases | None = None
        self._asked: set[str] | None = None
        self._reads: dict[str, bool] = {}
        self._edits: dict[str, tuple[Edit, ...]] = {}

    def check(self, sites: list[str], names: Callable[[], Aliases] | None = None) -> None:
        """Begin a pass: forget the last one, and resolve patterns against this model's sites.

        ``names`` gives the model's hook names, and is called only when one is asked for.
        UsageError names a pattern that matches none.
        """
        self.acts, self.seen = {}, set()
        patterns = sorted(self.read | self.edit.keys())
        aliases = names() if names is not None and any("hook_" in p for p in patterns) else None
        if self._asked is not None and sites == self._sites and aliases == self._aliases:
            return
        found = {p: _resolve(p, sites, aliases) for p in patterns}
        self._reads = {s: any(s in found[p] for p in self.read) for s in sites}
        self._edits = {s: tuple(f for p, f in self.edit.items() if s in found[p]) for s in sites}
        self._sites, self._aliases, self._asked = sites, aliases, set().union(*found.values())

    def wants(self, site: str) -> bool:
        """Whether the costly ``site`` must be formed at all."""
        return self._reads.get(site, False) or bool(self._edits.get(site))

    @property
    def asked(self) -> list[str]:
        """The sites that patterns and aliases stand for in the model last checked, in its order."""
        return [s for s in self._sites if s in (self._asked or ())]

    @property
    def done(self) -> bool:
        """Whether the rest of the forward pass is of no interest."""
        return self.stop_early and self._asked is not None and self._asked <= self.seen

    def __call__(self, site: str, x: Tensor) -> Tensor:
        for edit in self._edits.get(site, ()):
            edited = edit(x)
            if edited.shape != x.shape:  # broadcasting later would hide the mistake
                raise UsageError(f"the edit of {site!r} made {list(edited.shape)} of {list(x.shape)}")
            x = edited
            self.seen.add(site)
        if self._reads.get(site, False):
            self.acts[site] = x
            self.seen.add(site)
        return x

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.acts and self._aliases is not None:
            site = self._aliases.exact.get(site, site)
        if site not in self.acts:
            raise UsageError(f"site {site!r} was not read.{suggest(site, list(self.acts))}")
        return self.acts[site]

    def __enter__(self) -> Taps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        missed = (self.read | self.edit.keys()) if self._asked is None else self._asked - self.seen
        if missed:
            raise LookupError(f"sites never reached: {sorted(missed)}")


def _resolve(pattern: str, sites: list[str], aliases: Aliases | None) -> set[str]:
    """The sites that a name or pattern asks for; UsageError if none."""
    found = {s for s in sites if s == pattern or fnmatchcase(s, pattern)}
    if "hook_" in pattern and aliases is not None:
        found.update(aliases.find(pattern))
    if not found:
        known = sites if aliases is None else [*sites, *aliases.exact]
        raise UsageError(
            f"no site {pattern!r} in this model.{suggest(pattern, known)} model.sites() lists all"
        )
    return found

"""What a dictionary is, as frozen data: its architecture, its widths, where it reads, how it is trained."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from glasshouse.base.config import Frozen

Architecture = Literal["l1", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)
TOP_K = ("topk", "batchtopk", "matryoshka")


class DictionaryConfig(Frozen):
    """A sparse autoencoder, or a transcoder when ``d_out`` is set.

    Fields from ``sparsity_weight`` on say how it is trained and do not change what it computes. ``None``
    means "derived" or "not used". Defaults are the papers' where those give one, in units of activations
    scaled to mean norm sqrt(d_in).
    """

    architecture: Architecture
    d_in: int = Field(ge=1)
    d_sae: int = Field(ge=1, description="number of features")
    d_out: int | None = Field(default=None, ge=1, description="set: a transcoder that writes another site")
    k: int | None = Field(default=None, ge=1, description="active features, each activation or on average")
    prefixes: tuple[int, ...] = Field(
        default=(), description="Matryoshka: sizes of the nested dictionaries, increasing, the last d_sae"
    )
    normalize_activations: Literal["none", "expected_average_only_in"] = Field(
        default="none", description="the second: scale by the constant that makes the mean norm sqrt(d_in)"
    )
    apply_b_dec_to_input: bool = Field(default=True, description="subtract b_dec first; never in transcoders")
    skip_connection: bool = Field(default=False, description="a transcoder adds a linear map of its input")
    site: str = ""
    site_out: str | None = Field(default=None, description="where a transcoder writes; None: site")
    model_digest: str = Field(default="", description="of the model it was trained on; empty: not recorded")

    sparsity_weight: float = Field(
        default=1.0, ge=0, description="of the penalty of l1, gated and jumprelu; top-k needs none"
    )
    auxiliary_weight: float = Field(default=1 / 32, ge=0, description="of AuxK; Gao et al. 2024, app. A.2")
    auxiliary_k: int | None = Field(default=None, ge=1, description="None: d_in / 2, Gao et al. 2024, B.1")
    dead_after: int = Field(
        default=10_000_000, ge=1, description="activations without firing; Gao et al. 2024, app. A.2"
    )
    jumprelu_threshold: float = Field(default=0.01, gt=0, description="initial threshold of every feature")
    jumprelu_bandwidth: float = Field(default=0.05, gt=0, description="of the straight-through kernel")
    normalize_decoder: bool = Field(default=True, description="rows of W_dec are kept at norm 1")
    threshold_rate: float = Field(
        default=0.01, gt=0, le=1, description="of the running mean that is BatchTopK's inference threshold"
    )

    @model_validator(mode="before")
    @classmethod
    def _transcoders_keep_their_input(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("prefixes"), list):
            data = {**data, "prefixes": tuple(data["prefixes"])}  # JSON has no tuples, and we are strict
        if isinstance(data, dict) and data.get("d_out") is not None:
            return {"apply_b_dec_to_input": False, **data}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> DictionaryConfig:
        top_k = self.architecture in TOP_K
        if top_k and (self.k is None or self.k > self.d_sae):
            raise ValueError(
                f"a {self.architecture} dictionary needs k, from 1 to d_sae = {self.d_sae}; got {self.k}"
            )
        if not top_k and self.k is not None:
            raise ValueError(f"k is for {', '.join(TOP_K)}; a {self.architecture} dictionary has none")
        if self.architecture == "matryoshka":
            ordered = all(0 < a < b for a, b in zip(self.prefixes, self.prefixes[1:], strict=False))
            if not self.prefixes or not ordered or self.prefixes[0] < 1 or self.prefixes[-1] != self.d_sae:
                raise ValueError(
                    f"prefixes must increase and end with d_sae = {self.d_sae}; got {list(self.prefixes)}"
                )
        elif self.prefixes:
            raise ValueError(f"prefixes are for matryoshka; a {self.architecture} dictionary has none")
        if self.is_transcoder and self.apply_b_dec_to_input:
            raise ValueError("a transcoder cannot subtract b_dec from its input: b_dec belongs to its output")
        if self.skip_connection and not self.is_transcoder:
            raise ValueError("skip_connection is for transcoders: an autoencoder would copy its input")
        if self.site_out is not None and not self.is_transcoder:
            raise ValueError("site_out is for transcoders: set d_out too")
        return self

    @property
    def is_transcoder(self) -> bool:
        """Whether it reads one site and writes another."""
        return self.d_out is not None

    @property
    def out(self) -> int:
        """Width of what it writes."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def aux_k(self) -> int:
        """How many dead features take part in AuxK, at most."""
        return self.auxiliary_k or max(1, self.d_in // 2)

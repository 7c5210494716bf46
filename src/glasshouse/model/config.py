"""The shape of a model as frozen data: every architecture family is a choice of these features."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from glasshouse.base.config import Frozen


class RopeScaling(Frozen):
    """How rotary frequencies are stretched for contexts beyond those trained on.

    linear: all divided by ``factor`` (Chen et al. 2023, arXiv 2306.15595). llama3: only low ones, with a
    ramp between the two factors (Llama 3, arXiv 2407.21783, sec. 3.4, as released).
    """

    kind: Literal["linear", "llama3"]
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_context: int = Field(default=8192, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must exceed low_freq_factor {self.low_freq_factor}"
            )
        return self


N_ROLES = 5  # none (running text), system, user, assistant, document: as `tokenizer.chat` numbers them


class Roles(Frozen):
    """How the model is told whose words a token belongs to (`model.roles`); each way adds to the others."""

    segment: bool = Field(default=False, description="a learned vector a role, added to embeddings (ISE)")
    rotate: bool = Field(default=False, description="embeddings of documents' tokens turned (ASIDE)")
    layers: bool = Field(default=False, description="a learned vector a role, added in every layer (AIR)")
    markers: tuple[tuple[int, int], ...] = Field(
        default=(), description="(token id, role that begins with it); a recipe takes its tokenizer's"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Roles:
        if not (self.segment or self.rotate or self.layers):
            raise ValueError("roles switches nothing on: set segment, rotate or layers, or leave it out")
        ids = [token for token, _ in self.markers]
        if len(set(ids)) != len(ids) or any(not 0 <= role < N_ROLES for _, role in self.markers):
            raise ValueError(f"markers {self.markers} must be different tokens with roles 0 to {N_ROLES - 1}")
        if self.rotate and ids and N_ROLES - 1 not in {role for _, role in self.markers}:
            raise ValueError("rotate turns documents' tokens; no marker begins one ([tokenizer] documents)")
        return self


class GPTConfig(Frozen):
    """The shape of a model. ``None`` means "derived" or "not used"; properties below resolve it."""

    vocab_size: int = Field(ge=2)
    context: int = Field(ge=1, description="longest sequence, in tokens")
    d_model: int = Field(ge=1)
    n_layer: int = Field(ge=1)
    n_head: int = Field(ge=1)
    n_kv_head: int | None = Field(default=None, ge=1, description="key/value heads; None: one per query head")
    d_head: int | None = Field(default=None, ge=1, description="None: d_model / n_head")
    d_mlp: int | None = Field(default=None, ge=1, description="None: 4 d_model plain, 8/3 d_model gated")
    norm: Literal["rms", "layer", "none"] = "rms"
    norm_eps: float = Field(default=1e-5, gt=0)
    norm_offset: bool = Field(default=False, description="RMSNorm multiplies by 1 + weight (Gemma)")
    norm_place: Literal["pre", "post", "both"] = Field(
        default="pre", description="norm what a sub-layer reads, what it writes (OLMo-2), or both (Gemma-2)"
    )
    parallel: bool = Field(default=False, description="attention and MLP read the same stream (GPT-NeoX)")
    position: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_fraction: float = Field(default=1.0, gt=0, le=1, description="share of a head that is rotated")
    rope_scaling: RopeScaling | None = None
    rope_theta_window: float | None = Field(default=None, gt=0, description="base on windowed layers")
    causal: bool = Field(default=True, description="False: every position sees every other")
    window_tokens: int | None = Field(default=None, ge=1, description="positions seen, itself included")
    full_layers: tuple[int, ...] = Field(default=(), description="layers without the window")
    mlp: Literal["plain", "gated"] = "plain"
    activation: Literal["gelu", "gelu_tanh", "silu", "relu", "relu2"] = "relu2"
    attn_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    attn_scale: float | None = Field(default=None, gt=0, description="None: d_head ** -0.5")
    attn_softcap: float | None = Field(default=None, gt=0)
    qk_norm: bool = False
    qk_norm_span: Literal["head", "all"] = Field(default="head", description="one norm a head, or over all")
    value_residual: bool = Field(default=False, description="layers mix in the first layer's values")
    roles: Roles | None = Field(default=None, description="how tokens are told apart by who wrote them")
    embed_scale: float | None = Field(default=None, gt=0, description="factor of the token embedding")
    logit_softcap: float | None = Field(default=None, gt=0)
    tied: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> GPTConfig:
        if self.d_head is None and self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.kv_heads}")
        if self.position == "rotary" and (self.rotated < 2 or self.rotated % 2):
            raise ValueError(f"rotary positions need an even number of dimensions, not {self.rotated}")
        if self.parallel and self.norm_place != "pre":
            raise ValueError(
                f"parallel blocks norm what they read, so norm_place cannot be {self.norm_place!r}"
            )
        if self.norm_offset and self.norm != "rms":
            raise ValueError(f"norm_offset belongs to norm 'rms', not {self.norm!r}")
        if self.window_tokens is not None and not self.causal:
            raise ValueError("window_tokens needs causal attention")
        if self.window_tokens is None and (self.full_layers or self.rope_theta_window is not None):
            raise ValueError("full_layers and rope_theta_window need window_tokens")
        if any(not 0 <= i < self.n_layer for i in self.full_layers):
            raise ValueError(f"full_layers {self.full_layers} must lie in 0..{self.n_layer - 1}")
        if self.roles is not None and self.roles.rotate and self.d_model % 2:
            raise ValueError(f"roles.rotate turns pairs of dimensions, and d_model is {self.d_model}")
        if self.roles is not None and any(not 0 <= i < self.vocab_size for i, _ in self.roles.markers):
            raise ValueError(f"a marker of roles is no token: ids go from 0 to {self.vocab_size - 1}")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A model that reads no roles is written, to the byte, as before there were any."""
        row: dict[str, Any] = dump(self)
        return row if self.roles is not None else {k: v for k, v in row.items() if k != "roles"}

    @property
    def head_width(self) -> int:
        """Width of one head (K)."""
        return self.d_head or self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads (G)."""
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the MLP (F)."""
        return self.d_mlp or (4 * self.d_model if self.mlp == "plain" else 8 * self.d_model // 3)

    @property
    def rotated(self) -> int:
        """How many of a head's dimensions are rotated."""
        return int(self.head_width * self.rope_fraction)

    def windowed(self, layer: int) -> bool:
        """Whether ``layer`` sees only the last ``window_tokens`` positions."""
        return self.window_tokens is not None and layer not in self.full_layers

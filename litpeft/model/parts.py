"""The parts of a ModelConfig that have more than one number. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from litpeft.core.typed import later

LATENT_EPS = 1e-6  # of the norms inside latent attention, whatever the model's


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched to reach beyond the length that the model was trained on."""

    kind: Literal["linear", "llama3", "dynamic", "yarn", "longrope", "proportional"]
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    attention_factor: float = 1.0  # what cos and sin are multiplied by: yarn, longrope
    beta_fast: float = 32.0  # yarn: turns over the original length from which a frequency is kept
    beta_slow: float = 1.0  # and up to which it is divided by the factor
    truncate: bool = True  # yarn: those bounds are whole dimensions
    short_factors: tuple[float, ...] = ()  # longrope: divisors of each frequency, for texts within the original length
    long_factors: tuple[float, ...] = ()  # and beyond
    share: float = 1.0  # proportional: of the frequencies, that are not 0

    @property
    def by_length(self) -> bool:
        """Returns whether the frequencies depend on the length of the text."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class Rope:
    """Rotary positions."""

    theta: float = 10000.0
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class QueryGrowth:
    """Queries are multiplied by 1 + rate * ln(1 + position // length)."""

    rate: float
    length: int


@dataclass(frozen=True)
class LinearAttention:
    """A layer whose tokens read a matrix for each head in place of earlier keys and values (linear_attention.py)."""

    key_heads: int  # of queries and keys
    heads: int  # of values; each key head serves as many of them in turn
    key_size: int
    value_size: int
    width: int  # of the convolution of queries, keys and values: tokens that it reads

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            what = f"linear_num_value_heads {self.heads} is no multiple of linear_num_key_heads {self.key_heads}"
            raise ValueError(what)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Returns the shape of what a layer knows of a text."""
        return self.heads, self.key_size, self.value_size

    @property
    def channels(self) -> int:
        """Returns how many channels the convolution has."""
        return 2 * self.key_heads * self.key_size + self.heads * self.value_size


@dataclass(frozen=True)
class StateSpace:
    """Mamba-2's layer: each head has one matrix, which fades and is written to by each token (state_space.py)."""

    heads: int
    head_size: int
    groups: int  # of heads that have B and C in common
    state: int  # size of B and C
    width: int  # of the convolution of x, B and C: tokens that it reads
    conv_bias: bool = True
    in_bias: bool = False  # of what reads the layer's input
    out_bias: bool = False
    least: float = 0.0  # what dt is at least
    most: float | None = None  # and at most
    norm: Literal["after", "before"] | None = "after"  # where the norm stands: after the gate, or before it

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            what = f"{self.heads} heads of Mamba are no multiple of its {self.groups} groups"
            raise ValueError(f"{what} (mamba_n_heads, mamba_n_groups; mamba_num_heads, n_groups)")

    @property
    def inner(self) -> int:
        """Returns the width of x and y."""
        return self.heads * self.head_size

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Returns the shape of what a layer knows of a text: those of a group's heads lie side by side."""
        return self.groups, self.state, self.inner // self.groups

    @property
    def channels(self) -> int:
        """Returns how many channels the convolution has."""
        return self.inner + 2 * self.groups * self.state


@dataclass(frozen=True)
class Beside:
    """The factors of attention and of a state space that stand side by side (side_by_side.py)."""

    attention_in: float = 1.0  # of what attention reads
    attention_out: float = 1.0  # and returns
    state_in: float = 1.0
    state_out: float = 1.0
    parts: tuple[float, float, float, float, float] = (1.0,) * 5  # of z, x, B, C and dt


@dataclass(frozen=True)
class Convolution:
    """A layer whose tokens read the last few tokens in place of all earlier ones (short_convolution.py)."""

    width: int  # tokens that it reads
    bias: bool = False  # in all parts of the layer


@dataclass(frozen=True)
class Layer:
    """What a layer may have of its own."""

    window: int | None = None
    rope: Rope | None = None  # None = it has no positions
    head_dim: int | None = None  # in place of the model's, as are the next two
    n_kv_heads: int | None = None
    d_ff: int | None = None
    values_are_keys: bool = False  # its values are what the layer `k` computes, before the norm
    keys_of: int | None = None  # number of the layer whose keys and values it reads: it computes none
    linear: LinearAttention | None = later(None)  # in place of attention
    convolution: Convolution | None = later(None)  # in place of attention
    state_space: StateSpace | None = later(None)  # in place of attention, or beside it
    beside: Beside | None = later(None)  # with these factors
    only: Literal["mixer", "mlp"] | None = later(None)  # it has attention, or what is in its place, alone; or the MLP

    @property
    def chunked(self) -> LinearAttention | StateSpace | None:
        """Returns the sizes of what reads a text chunk by chunk, if it has such."""
        return self.state_space if self.linear is None else self.linear

    @property
    def attends(self) -> bool:
        """Returns whether it has attention, whose keys and values later tokens read."""
        return self.beside is not None or (not self.recurs and self.only != "mlp")

    @property
    def by_keys(self) -> bool:
        """Returns whether tokens know earlier ones by keys and values, and by nothing else."""
        return self.attends and not self.recurs

    @property
    def recurs(self) -> bool:
        """Returns whether it knows earlier tokens by a state that each token changes."""
        return self.chunked is not None or self.convolution is not None


def linear_of(layers: Iterable[Layer]) -> LinearAttention | None:
    """Returns the sizes of the layers that have linear attention; None if there are none."""
    return next((layer.linear for layer in layers if layer.linear is not None), None)


def state_space_of(layers: Iterable[Layer]) -> StateSpace | None:
    """Returns the sizes of the layers that have a state space; None if there are none."""
    return next((layer.state_space for layer in layers if layer.state_space is not None), None)


@dataclass(frozen=True)
class LayerInputs:
    """A second embedding, with a vector for each layer, which the layer reads after its MLP."""

    vocab_size: int
    size: int  # of each vector


@dataclass(frozen=True)
class ClampedGate:
    """In an MLP: (u + 1) * g * sigmoid(slope * g), with the gate g at most and the up projection u within +-limit."""

    slope: float
    limit: float


@dataclass(frozen=True)
class Experts:
    """A mixture of MLPs in place of a layer's MLP: a router chooses some of them for each token."""

    number: int
    active: int  # of them, that a token goes through
    d_ff: int  # of each expert
    normed: bool = False  # the shares of the active ones sum to 1, else those of all do
    router_bias: bool = False
    dense_layers: tuple[int, ...] = ()  # which have a plain MLP
    shared_d_ff: int | None = None  # of one more MLP, that every token goes through
    shared_gate: bool = later(False)  # what it adds is multiplied by the sigmoid of one number of the token
    scale: float = 1.0  # what shares are multiplied by
    groups: int = 1  # of experts, of which a token chooses some before it chooses experts
    active_groups: int = 1
    wide_router: bool = False  # it computes in float32 in a model of less
    corrected: bool = False  # scores are sigmoids, and a number of each expert is added for the choice
    statics: bool = later(False)  # scores are softmaxes, and such a number is added, which lies in a module of its own
    least_sum: float = later(0.0)  # where shares are normed, what they are divided by at least
    sigmoids: bool = later(False)  # scores are sigmoids
    apart: bool = later(False)  # and such a number is added, which lies beside the experts
    sum_plus: float = later(0.0)  # where shares are normed, what is added to their sum

    def __post_init__(self) -> None:
        if self.active > self.number:
            what = f"num_experts_per_tok {self.active} is more than the {self.number} experts"
            raise ValueError(f"{what} (num_local_experts, num_experts, n_routed_experts)")
        self.check_groups()

    def check_groups(self) -> None:
        """Raises unless the groups are of one size and have enough experts."""
        size = self.number // self.groups
        if self.number % self.groups or (self.corrected and size < 2):
            what = f"n_group {self.groups} must divide the {self.number} experts (n_routed_experts)"
            raise ValueError(f"{what}, so that each group has two or more" if self.corrected else what)
        if self.active_groups > self.groups or self.active_groups * size < self.active:
            what = f"topk_group {self.active_groups} of n_group {self.groups} is not supported"
            raise ValueError(f"{what}: they must hold num_experts_per_tok {self.active} experts")


@dataclass(frozen=True)
class Latent:
    """Attention whose queries, keys and values are made of shorter vectors (model/latent.py)."""

    q_rank: int | None  # of the vector that queries are made of; None = they are made of the input
    kv_rank: int  # and of the one that keys and values are made of
    still: int  # dimensions of a head that do not rotate
    turning: int  # and those that do, which keys of all heads share
    values: int  # size of a head of values

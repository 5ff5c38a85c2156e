"""What one microbatch costs in one block, in seconds: a roofline over its operations. Imports no torch.

Every operation takes the longer of its FLOPs at the rate of its kind and its bytes at the rate of memory.
Counted are matrix products (forward, gradient of the input, gradient of the weight, which is added to an FP32
buffer), the attention core (its backward pass is 2.5 forward ones), what is read and written between them,
and what is computed again (`recompute`). Left out: launching kernels, and the host. Exchanges between devices
are in parallel/links.py.

Legend of the counts: t tokens of one device between layers, T tokens that its tp group shares, M tokens of
whole sequences, R rows of its routed experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from model.config import Gemm, ModelConfig, PrecisionConfig, Recompute
from model.cost import element_bytes
from parallel.config import Context, ParallelConfig
from parallel.rates import Rates

ATTENTION_BACKWARD = 2.5
"""FLOPs of the attention core's backward pass over its forward ones: five products for two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """All that decides what a pass costs; `imbalance`: rows of the busiest device over the mean."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    seq_len: int
    rates: Rates
    imbalance: float = 1.0

    @property
    def own_tokens(self) -> float:
        """Return t."""
        return self.whole_tokens / self.parallel.cp / self.parallel.tp

    @property
    def shared_tokens(self) -> float:
        """Return T."""
        return self.whole_tokens / self.parallel.cp

    @property
    def whole_tokens(self) -> int:
        """Return M."""
        return self.parallel.microbatch_size * self.seq_len

    @property
    def memory_tokens(self) -> float:
        """Return the tokens whose keys and values are expanded here: M where latents are gathered."""
        return self.whole_tokens if self.parallel.context is Context.gather else self.shared_tokens

    @property
    def routed_rows(self) -> float:
        """Return R."""
        return self.own_tokens * self.model.moe.top_k * self.imbalance

    @property
    def fp8(self) -> bool:
        """Return whether blocks multiply in FP8."""
        return self.precision.gemm is not Gemm.compute

    @property
    def width(self) -> int:
        """Return the bytes of an element of the compute type."""
        return element_bytes(self.precision.compute)


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Seconds of one microbatch's passes on one device."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    exchange_forward: float = 0.0  # of tokens with experts: what a joined pass can hide
    exchange_backward: float = 0.0
    collective_forward: float = 0.0  # over tp and cp: waited for
    collective_backward: float = 0.0

    def __add__(self, other: "PassTimes") -> "PassTimes":
        return PassTimes(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
            self.exchange_forward + other.exchange_forward,
            self.exchange_backward + other.exchange_backward,
            self.collective_forward + other.collective_forward,
            self.collective_backward + other.collective_backward,
        )

    def __mul__(self, count: int) -> "PassTimes":
        return PassTimes(**{f.name: getattr(self, f.name) * count for f in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """rows × inputs times inputs × outputs; the rows are shared by `matrices` of this size."""

    rows: float
    inputs: float
    outputs: float
    matrices: float = 1
    in_block: bool = True
    """Whether it is one of those that FP8 multiplies."""
    again: frozenset[Recompute] = frozenset({Recompute.full})
    """Under which settings the backward pass computes it again."""


ALWAYS_AGAIN = frozenset({Recompute.deepseek, Recompute.core, Recompute.full})


def dense_block(setting: Setting) -> PassTimes:
    """Return the times of a dense layer."""
    m, tp = setting.model, setting.parallel.tp
    rows, width = setting.shared_tokens, m.dense_intermediate_size / tp
    return _block(setting, [*_swiglu(m.hidden_size, rows, width)], elementwise=0.0, swiglu=3 * rows * width)


def moe_block(setting: Setting) -> PassTimes:
    """Return the times of a layer with experts, without the exchange of tokens."""
    m, moe, p = setting.model, setting.model.moe, setting.parallel
    rows, width = setting.shared_tokens, moe.num_shared_experts * moe.intermediate_size / p.tp
    routed = setting.routed_rows
    products = [
        Product(rows=setting.own_tokens, inputs=m.hidden_size, outputs=moe.num_experts, in_block=False),
        *_swiglu(m.hidden_size, routed, moe.intermediate_size, matrices=moe.num_experts / p.ep),
    ]
    if width:
        products += _swiglu(m.hidden_size, rows, width)
    # rows are put into the order of experts and back: each read and written once
    return _block(
        setting,
        products,
        elementwise=4 * routed * m.hidden_size,
        swiglu=3 * (rows * width + routed * moe.intermediate_size),
    )


def mtp_joint(setting: Setting) -> PassTimes:
    """Return the times of what an MTP module adds to a layer with experts: its projection and norms."""
    hidden, tokens = setting.model.hidden_size, setting.own_tokens
    projection = Product(rows=tokens, inputs=2 * hidden, outputs=hidden, in_block=False)
    return product_times(setting, projection) + _elementwise(setting, 6 * tokens * hidden)


def head(setting: Setting) -> PassTimes:
    """Return the times of one use of the output head with its loss.

    Gradients are computed in the forward pass, chunk by chunk, so that logits are never kept.
    """
    m = setting.model
    rows, width = setting.shared_tokens, m.vocab_size / setting.parallel.tp
    product = Product(rows=rows, inputs=m.hidden_size, outputs=width, in_block=False, again=frozenset())
    times = product_times(setting, product)
    logits = (
        3 * rows * width * setting.width / setting.rates.memory
    )  # written, read, overwritten by gradients
    return PassTimes(forward=times.forward + times.backward_input + times.backward_weight + logits)


def product_times(setting: Setting, product: Product) -> PassTimes:
    """Return the times of a matrix product's three passes, quantisation of its operands included."""
    rates = setting.rates
    fp8 = setting.fp8 and product.in_block
    rate = rates.block if fp8 else rates.plain
    width = 1 if fp8 else setting.width
    flops = 2 * product.rows * product.inputs * product.outputs
    weight = product.inputs * product.outputs * product.matrices
    read, made = product.rows * product.inputs, product.rows * product.outputs

    def seconds(memory_bytes: float) -> float:
        return max(flops / rate, memory_bytes / rates.memory)

    # quantisation: rows of the input; rows and columns of the gradient; the input turned into columns
    forward_codes, backward_codes, weight_codes = (3 * read, 4 * made, 2 * read) if fp8 else (0.0, 0.0, 0.0)
    forward = seconds((read + weight) * width + made * setting.width) + forward_codes / rates.memory
    again = forward if setting.parallel.recompute in product.again else 0.0
    return PassTimes(
        forward=forward,
        backward_input=again
        + seconds((made + weight) * width + read * setting.width)
        + backward_codes / rates.memory,
        backward_weight=seconds((read + made) * width + 8 * weight) + weight_codes / rates.memory,
    )


def _block(setting: Setting, products: list[Product], *, elementwise: float, swiglu: float) -> PassTimes:
    """Add attention, norms and residual connections to a feed-forward part.

    elementwise, swiglu: elements that the feed-forward part reads and writes beside its products.
    """
    m, a, p = setting.model, setting.model.attention, setting.parallel
    t, hidden, heads = setting.own_tokens, m.hidden_size, a.num_heads / p.tp
    keys = a.qk_nope_head_dim + a.qk_rope_head_dim
    latents = (a.q_lora_rank or 0) + a.kv_lora_rank
    norms = 4 * t * hidden + 2 * t * latents
    residuals = 6 * t * hidden
    queries = 2 * setting.shared_tokens * heads * keys
    memory = 2 * setting.memory_tokens * heads * (keys + a.v_head_dim)
    times = _elementwise(setting, residuals + elementwise, again=frozenset({Recompute.full}))
    times += _elementwise(setting, norms + queries + memory + swiglu, again=ALWAYS_AGAIN)
    for product in (*_projections(setting), *products):
        times += product_times(setting, product)
    return times + _core(setting)


def _projections(setting: Setting) -> Iterator[Product]:
    """Yield attention's projections, for this device's heads where they are split."""
    m, a = setting.model, setting.model.attention
    t, shared, heads = setting.own_tokens, setting.shared_tokens, a.num_heads / setting.parallel.tp
    queries = heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    if a.q_lora_rank is None:
        yield Product(rows=shared, inputs=m.hidden_size, outputs=queries, again=ALWAYS_AGAIN)
    else:
        yield Product(rows=t, inputs=m.hidden_size, outputs=a.q_lora_rank)
        yield Product(rows=shared, inputs=a.q_lora_rank, outputs=queries, again=ALWAYS_AGAIN)
    yield Product(rows=t, inputs=m.hidden_size, outputs=a.kv_lora_rank + a.qk_rope_head_dim)
    yield Product(
        rows=setting.memory_tokens,
        inputs=a.kv_lora_rank,
        outputs=heads * (a.qk_nope_head_dim + a.v_head_dim),
        again=ALWAYS_AGAIN,
    )
    yield Product(rows=shared, inputs=heads * a.v_head_dim, outputs=m.hidden_size)


def _swiglu(hidden: int, rows: float, width: float, *, matrices: float = 1) -> Iterator[Product]:
    yield Product(rows=rows, inputs=hidden, outputs=2 * width, matrices=matrices)
    yield Product(rows=rows, inputs=width, outputs=hidden, matrices=matrices)


def _core(setting: Setting) -> PassTimes:
    """Return the times of the attention core, over half of the sequence on average."""
    a, rates = setting.model.attention, setting.rates
    per_pair = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
    flops = setting.shared_tokens * a.num_heads / setting.parallel.tp * per_pair * setting.seq_len
    forward = flops / rates.attention_forward
    again = forward if setting.parallel.recompute in (Recompute.core, Recompute.full) else 0.0
    backward = ATTENTION_BACKWARD * flops / rates.attention_backward
    return PassTimes(forward=forward, backward_input=again + backward)


def _elementwise(
    setting: Setting, elements: float, *, again: frozenset[Recompute] = frozenset()
) -> PassTimes:
    """Return the times of reading and writing so many elements forwards, and twice as many backwards."""
    forward = elements * setting.width / setting.rates.memory
    repeated = forward if setting.parallel.recompute in again else 0.0
    return PassTimes(forward=forward, backward_input=2 * forward + repeated)

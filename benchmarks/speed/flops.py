"""Floating-point operations of matrix products, from shapes alone: 2 for each multiply-add. Softmax, norms and
activations are left out, as in torch's counter.
"""

from funneltfm import ModelConfig
from funneltfm.funnel.ops import can_pool


def funnel_flops(config: ModelConfig, batch: int, length: int, *, training: bool = False, needed: bool = True) -> int:
    """A FunnelTFM with its classification head.

    needed: every score once, and no table of positions in evaluation, where it depends on nothing but the length. False
        counts what the plain rel_shift path does: the position term of every distance from 0 to shift * Tq + Tk, of
        which each query uses Tk, and the table every time.
    training: the backward pass too, twice the forward one (the product with the constant sinusoids once).
    """
    D, heads = config.d_model, config.n_head * config.d_head

    def pooled(tokens: int) -> int:
        if not config.separate_cls:
            return -(-tokens // config.pooling_size)
        return 1 + -(-(tokens - 1 - (config.pooling_size - 1) * config.truncate_seq) // config.pooling_size)

    products = position_table = 0
    q_len = length
    for block, (n_param, n_repeat) in enumerate(config.blocks):
        k_len, shift = q_len, 1
        if block > 0 and can_pool(q_len, config):
            q_len = pooled(q_len)
            if config.pool_q_only:
                shift = config.pooling_size
            else:
                k_len = q_len
        for _ in range(n_param * n_repeat):
            rows, distances = batch * q_len, shift * q_len + k_len
            products += 2 * D * heads * (2 * rows + 2 * batch * k_len)  # q, output; k, v
            products += 2 * rows * heads * (2 * k_len + (k_len if needed else distances))  # content, values; position
            products += 2 * rows * heads * 2  # segment
            products += 2 * rows * 2 * D * config.d_inner
            position_table += 2 * distances * D * heads
            k_len, shift = q_len, 1
    if config.d_embed != D:
        products += 2 * batch * length * config.d_embed * D
    products += 2 * batch * D * (D + config.num_class)
    if training:
        return products * 3 + position_table * 2
    return products if needed else products + position_table


def encoder_flops(
    layers: int, width: int, inner: int, batch: int, length: int, *, training: bool = False, gated: bool = False
) -> int:
    """A stack of standard layers without a head: BERT, or torch.nn.TransformerEncoder; gated: with a GLU."""
    rows = batch * length
    layer = 2 * rows * width * (4 * width + (3 if gated else 2) * inner) + 2 * rows * 2 * length * width
    return layers * layer * (3 if training else 1)

"""ConvNNAttention: a drop-in for nn.MultiheadAttention, and what it adds."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from convnn_geo import encodings, metrics, weighting
from convnn_geo.candidates import Block, Causal, Random, Window
from convnn_geo.nn import ConvNNAttention, functional
from convnn_geo.nn.functional import knn_attention
from convnn_geo.selection import KNearest

B, N, M, E, H = 2, 6, 5, 8, 2
D = E // H


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def twins(**options: object) -> tuple[ConvNNAttention, nn.MultiheadAttention]:
    """Ours and torch's with the same parameters, biases not zero."""
    backend = options.pop("backend", "auto")
    theirs = nn.MultiheadAttention(E, H, **{"batch_first": True, **options}).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    ours = ConvNNAttention(E, H, **options, backend=backend).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


# --- drop-in -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 3, "vdim": 5},
        {"vdim": 5},
        {"batch_first": False},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("backend", ["auto", "gather", "message_passing"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_constructor_options(options, backend, cross, need_weights):
    if not cross and ("kdim" in options or "vdim" in options):
        cross = True
    ours, theirs = twins(**options, backend=backend)
    q = tokens(B, N, E)
    k = tokens(B, M, options.get("kdim", E), seed=1) if cross else q
    v = tokens(B, M, options.get("vdim", E), seed=2) if cross else q
    if options.get("batch_first") is False:
        q, k, v = (
            (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))
            if cross
            else [q.transpose(0, 1)] * 3
        )
    found, expected = (
        ours(q, k, v, need_weights=need_weights),
        theirs(q, k, v, need_weights=need_weights),
    )
    equal(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    if need_weights:
        equal(found[1], expected[1])


def test_positional_arguments_names_and_initialisation_are_torchs():
    arguments = (E, H, 0.25, True, True, True, 4, 6, True, "cpu", torch.float64)
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(*arguments)
    torch.manual_seed(0)
    ours = ConvNNAttention(*arguments)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    for name in ("embed_dim", "num_heads", "dropout", "kdim", "vdim", "head_dim", "batch_first"):
        assert getattr(ours, name) == getattr(theirs, name), name
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_key_and_value_default_to_the_query():
    ours, theirs = twins()
    x, y = tokens(B, N, E), tokens(B, M, E, seed=1)
    equal(ours(x)[0], theirs(x, x, x)[0])
    equal(ours(x, y)[0], theirs(x, y, y)[0])


MASKS = {
    "bool": lambda: torch.rand(N, M) < 0.4,
    "float": lambda: torch.randn(N, M).double(),
    "float-inf": lambda: torch.randn(N, M).double().masked_fill(torch.rand(N, M) < 0.3, -torch.inf),
    "per-head": lambda: torch.rand(B * H, N, M) < 0.4,
    "per-head-float": lambda: torch.randn(B * H, N, M).double(),
}
PADDING = {
    "none": lambda: None,
    "bool": lambda: torch.tensor([[False] * M, [False] * (M - 2) + [True] * 2]),
    "float": lambda: torch.randn(B, M).double(),
}


@pytest.mark.parametrize("mask", ["none", *MASKS])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("backend", ["native", "gather", "message_passing"])
def test_masks(mask, padding, backend):
    torch.manual_seed(0)
    attn_mask = None if mask == "none" else MASKS[mask]()
    key_padding_mask = PADDING[padding]()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask[..., 0] = False  # no row without keys, of which torch makes NaN
    ours, theirs = twins(backend=backend)
    q, k = tokens(B, N, E).requires_grad_(), tokens(B, M, E, seed=1).requires_grad_()
    options = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
    for need_weights in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch, about masks of two dtypes
            expected = theirs(q, k, k, **options, need_weights=need_weights)
        found = ours(q, k, k, **options, need_weights=need_weights)
        equal(found[0], expected[0])
        if need_weights:
            equal(found[1], expected[1])
        gradients = [torch.autograd.grad(r[0].square().sum(), (q, k)) for r in (found, expected)]
        for ours_g, theirs_g in zip(*gradients, strict=True):
            equal(ours_g, theirs_g)


@pytest.mark.parametrize("backend", ["native", "gather", "message_passing"])
def test_float_masks_carry_gradients(backend):
    ours, theirs = twins(backend=backend)
    x = tokens(B, N, E)
    mask = tokens(N, N, seed=3).requires_grad_()
    grads = [
        torch.autograd.grad(
            layer(x, x, x, attn_mask=mask, need_weights=False)[0].square().sum(), mask
        )[0]
        for layer in (ours, theirs)
    ]
    equal(*grads)
    assert bool((grads[0] != 0).all())


@pytest.mark.parametrize("backend", ["native", "gather", "message_passing"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("extra", [False, True], ids=["", "bias_kv"])
def test_is_causal(backend, need_weights, padding, extra):
    ours, theirs = twins(backend=backend, add_bias_kv=extra)
    q, k = tokens(B, N, E), tokens(B, M, E, seed=1)
    causal = torch.ones(N, M, dtype=torch.bool).triu(1)
    pad = PADDING[padding]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(
            q, k, k, attn_mask=causal, key_padding_mask=pad, need_weights=need_weights
        )[0]
    options = {"key_padding_mask": pad, "need_weights": need_weights, "is_causal": True}
    equal(ours(q, k, k, **options)[0], expected)
    equal(ours(q, k, k, attn_mask=causal, **options)[0], expected)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("k", [None, 3])
def test_shapes_of_weights(average, k):
    layer, x = ConvNNAttention(E, H, k=k).double(), tokens(B, N, E)
    weights = layer(x, x, x, average_attn_weights=average)[1]
    assert weights.shape == ((B, N, N) if average else (B, H, N, N))
    unbatched = layer(x[0], x[0], x[0], average_attn_weights=average)
    assert unbatched[0].shape == (N, E)
    equal(unbatched[1], weights[0])


WEIGHTED = {
    "spatial": {"metric": "spatial"},
    "ones": {"weighting": "ones"},
    "bias": {"metric": metrics.PositionBias(N), "weighting": "softmax"},
    "bias-heads": {"metric": metrics.PositionBias(N, heads=H), "weighting": "softmax"},
    "k": {"metric": "spatial", "k": 3},
    "ones-window": {"weighting": "ones", "candidates": Window(3, padding=1)},
    "channels": {"weighting": weighting.PositionMLP(nn.Linear(1, D).double())},
}


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("backend", ["gather", "message_passing"])
@pytest.mark.parametrize("padding", [False, True], ids=["", "padding"])
def test_weights_have_every_axis_whatever_they_depend_on(name, backend, padding):
    layer = ConvNNAttention(E, H, **WEIGHTED[name], backend=backend).double()
    x = tokens(3, N, E)
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[:, 4:] = padding
    out, by_head = layer(x, key_padding_mask=mask, average_attn_weights=False)
    assert by_head.shape == (3, H, N, N) and layer(x[0])[1].shape == (N, N)
    assert not by_head[..., 4:].any() or not padding
    mean = layer(x, key_padding_mask=mask)[1]
    assert mean.shape == (3, N, N)
    equal(mean, by_head.mean(1))
    if name == "channels":
        return
    value = layer.operation(x).value
    equal(out, layer.out_proj((by_head @ value).transpose(1, 2).flatten(2)))


def test_unbatched_with_masks():
    ours, theirs = twins()
    q, k = tokens(N, E), tokens(M, E, seed=1)
    torch.manual_seed(0)
    padding = torch.tensor([False] * (M - 1) + [True])
    mask = torch.rand(H, N, M) < 0.3
    mask[..., 0] = False
    for need_weights in (False, True):
        options = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
        found, expected = ours(q, k, k, **options), theirs(q, k, k, **options)
        equal(found[0], expected[0])
        if need_weights:
            equal(found[1], expected[1])


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_is_drawn_as_torch_draws_it(need_weights):
    ours, theirs = twins(dropout=0.4)
    ours.train(), theirs.train()
    x = tokens(B, N, E)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        results.append(layer(x, x, x, need_weights=need_weights))
    equal(results[0][0], results[1][0])
    if need_weights:
        equal(results[0][1], results[1][1])
        assert bool((results[0][1] == 0).any())


@pytest.mark.parametrize("weighting_", [None, "softmax"])
def test_dropout_reaches_the_weights(weighting_):
    layer = ConvNNAttention(E, H, dropout=0.5, k=3, weighting=weighting_).double()
    x = tokens(B, N, E)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_rows_without_keys_give_the_projection_of_zero():
    """Torch gives NaN; masked candidates here weigh nothing, so nothing is summed."""
    layer = twins()[0]
    x = tokens(B, N, E)
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[2] = True
    for backend in ("native", "gather", "message_passing"):
        for k in (None, 2):
            if k and backend == "native":
                continue
            tested = ConvNNAttention(E, H, k=k, backend=backend).double()
            tested.load_state_dict(layer.state_dict())
            out = tested(x, x, x, attn_mask=mask, need_weights=False)[0]
            equal(out[:, 2], layer.out_proj.bias.expand(B, E))
            assert bool(out.isfinite().all())


# --- inside torch's transformers -----------------------------------------------------------


class Swap(nn.TransformerEncoderLayer):
    """An encoder layer whose attention is ours."""

    def __init__(self, **options: object) -> None:
        super().__init__(E, H, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
        attention = ConvNNAttention(E, H, **options).double()
        attention.load_state_dict(self.self_attn.state_dict(), strict=True)
        self.self_attn = attention


@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
@pytest.mark.parametrize("stack", [False, True], ids=["layer", "encoder"])
def test_encoder_layer_with_plain_attention_is_torchs(mask, stack):
    torch.manual_seed(0)
    ours = Swap()
    theirs = nn.TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    if stack:
        ours, theirs = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) for layer in (ours, theirs)
        )
    x = tokens(B, N, E)
    name = "mask" if stack else "src_mask"
    options = {
        "none": {},
        "causal": {
            name: nn.Transformer.generate_square_subsequent_mask(N).double(),
            "is_causal": True,
        },
        "padding": {
            "src_key_padding_mask": torch.tensor([[False] * N, [False] * (N - 2) + [True] * 2])
        },
    }[mask]
    for train in (True, False):
        ours.train(train), theirs.train(train)
        found, expected = ours(x, **options), theirs(x, **options)
        real = slice(None) if mask != "padding" else slice(0, N - 2)
        equal(found[:, real], expected[:, real])


@pytest.mark.parametrize("options", [{"k": 2}, {"k": 3, "kernel": "standard"}], ids=["k", "taps"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_the_fast_path_of_eval_does_not_bypass_the_neighbours(options, grad):
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True, dtype=torch.float64)
    layer = Swap(k=options["k"])
    if "kernel" in options:
        layer.self_attn = ConvNNAttention(E, H, **options).double()
        with torch.no_grad():
            layer.self_attn.taps.normal_()
    plain.load_state_dict(layer.state_dict(), strict=False)
    for module in (
        layer,
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
    ):
        x = tokens(B, N, E)
        with torch.set_grad_enabled(grad):
            trained, evaluated = module.train()(x), module.eval()(x)
        equal(evaluated, trained)
    assert not torch.allclose(layer(x), plain.eval()(x))


def test_decoder_layer():
    torch.manual_seed(0)
    theirs = nn.TransformerDecoderLayer(E, H, 16, 0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    for name in ("self_attn", "multihead_attn"):
        attention = ConvNNAttention(E, H).double()
        attention.load_state_dict(getattr(theirs, name).state_dict())
        setattr(ours, name, attention)
    x, memory = tokens(B, N, E), tokens(B, M, E, seed=1)
    causal = nn.Transformer.generate_square_subsequent_mask(N).double()
    options = {"tgt_mask": causal, "tgt_is_causal": True}
    equal(ours(x, memory, **options), theirs(x, memory, **options))


# --- k nearest keys ------------------------------------------------------------------------


def heads(layer: ConvNNAttention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Projected ``(b, heads, n, head_dim)``."""
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    return tuple(
        nn.functional.linear(x, w, b).unflatten(-1, (H, D)).transpose(1, 2)
        for x, w, b in zip((q, k, v), weights, biases, strict=True)
    )


def naive(
    layer: ConvNNAttention,
    q: Tensor,
    k: Tensor,
    hidden: Tensor | None = None,
    added: Tensor | None = None,
    order: str = "rank",
) -> tuple[Tensor, Tensor]:
    """k-NN attention with taps by double loop: output and weights ``(b, heads, n, m)``."""
    q, k, v = heads(layer, q, k, k)
    b, h, n, m = *q.shape[:3], k.shape[2]
    out = torch.zeros(b, h, n, D, dtype=q.dtype)
    weights = torch.zeros(b, h, n, m, dtype=q.dtype)
    for e in range(b):
        for head in range(h):
            for i in range(n):
                score = k[e, head] @ q[e, head, i] / D**0.5
                if added is not None:
                    score = score + added[i]
                open_ = [j for j in range(m) if hidden is None or not hidden[e, i, j]]
                best = sorted(open_, key=lambda j: (-score[j].item(), j))[: layer.k]
                rho = score[best].softmax(-1)
                weights[e, head, i, best] = rho
                if order == "raster":
                    rho = torch.stack([rho[best.index(j)] for j in sorted(best)])
                    best = sorted(best)
                for slot, j in enumerate(best):
                    message = rho[slot] * v[e, head, j]
                    if layer.taps is None:
                        out[e, head, i] += message
                        continue
                    taps = layer.taps[head] if layer.taps_per_head else layer.taps
                    tap = taps[..., slot]
                    if layer.kernel == "standard":
                        out[e, head, i] += tap @ message
                    else:
                        out[e, head, i] += tap[:, 0] * message
    if layer.pointwise is not None:
        out = out @ layer.pointwise.t()
    return layer.out_proj(out.transpose(1, 2).flatten(2)), weights


def randomised(layer: ConvNNAttention) -> ConvNNAttention:
    layer = layer.double()
    torch.manual_seed(11)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    return layer


def test_k_and_dropout_that_are_set_later_count():
    x = torch.randn(2, 12, 8)
    layer, same = ConvNNAttention(8, 2, k=3, dropout=0.5), ConvNNAttention(8, 2, k=5)
    layer.load_state_dict(same.state_dict())
    layer.k, layer.dropout = 5, 0.0
    assert torch.equal(layer(x)[0], same(x)[0])
    assert "k=5, dropout=0.0" in repr(layer)
    for other in (ConvNNAttention(8, 2), ConvNNAttention(8, 2, k=3, kernel="standard")):
        with pytest.raises(AttributeError, match=r"k: the layer .*make a new one with k=5"):
            other.k = 5
    with pytest.raises(AttributeError, match=r"dropout: .*never dropped"):
        ConvNNAttention(8, 2, weighting="ones").dropout = 0.5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    encoder.layers[0].self_attn = ConvNNAttention(8, 2, k=3)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), pytest.raises(TypeError, match=r"nested.*use_nested_tensor"):
        encoder.eval()(torch.randn(2, 5, 8), src_key_padding_mask=mask)
    encoder.use_nested_tensor = False
    assert encoder(torch.randn(2, 5, 8), src_key_padding_mask=mask).shape == (2, 5, 8)


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
@pytest.mark.parametrize("cross", [False, True])
def test_k_nearest_keys(backend, cross):
    layer = randomised(ConvNNAttention(E, H, k=3, backend=backend))
    q = tokens(B, N, E)
    k = tokens(B, M, E, seed=1) if cross else q
    expected, weights = naive(layer, q, k)
    equal(layer(q, k, k, need_weights=False)[0], expected)
    out, found = layer(q, k, k, average_attn_weights=False)
    equal(out, expected)
    equal(found, weights)
    equal(found.sum(-1), torch.ones(B, H, N).double())
    assert bool(((found > 0).sum(-1) == 3).all())


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
@pytest.mark.parametrize("order", ["rank", "raster"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "standard"},
        {"kernel": "standard", "taps_per_head": True},
        {"kernel": "depthwise"},
        {"kernel": "depthwise", "taps_per_head": True},
        {"kernel": "separable"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_taps_inside_heads(options, backend, order):
    layer = randomised(ConvNNAttention(E, H, k=3, order=order, backend=backend, **options))
    x = tokens(B, N, E)
    equal(layer(x, need_weights=False)[0], naive(layer, x, x, order=order)[0])


@pytest.mark.parametrize("kernel", ["standard", "depthwise", "separable"])
@pytest.mark.parametrize("per_head", [False, True])
def test_fresh_taps_are_a_plain_sum(kernel, per_head):
    if per_head and kernel == "separable":
        with pytest.raises(ValueError, match="shared by all heads"):
            ConvNNAttention(E, H, k=3, kernel=kernel, taps_per_head=True)
        return
    torch.manual_seed(0)
    taps = ConvNNAttention(E, H, k=3, kernel=kernel, taps_per_head=per_head).double()
    torch.manual_seed(0)
    plain = ConvNNAttention(E, H, k=3).double()
    x = tokens(B, N, E)
    equal(taps(x)[0], plain(x)[0])


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
@pytest.mark.parametrize("kernel", ["sum", "standard"])
def test_masked_keys_are_never_chosen(backend, kernel):
    """Some rows have fewer open keys than k."""
    layer = randomised(ConvNNAttention(E, H, k=3, backend=backend, kernel=kernel))
    q, k = tokens(B, N, E), tokens(B, M, E, seed=1)
    torch.manual_seed(1)
    mask = torch.rand(N, M) < 0.5
    mask[0, 1:], mask[0, 0] = True, False  # one open key
    mask[1, 2:], mask[1, :2] = True, False
    padding = torch.zeros(B, M, dtype=torch.bool)
    padding[1, -1] = True
    hidden = mask | padding[:, None]
    expected, weights = naive(layer, q, k, hidden)
    options = {"attn_mask": mask, "key_padding_mask": padding}
    equal(layer(q, k, k, **options, need_weights=False)[0], expected)
    found = layer(q, k, k, **options, average_attn_weights=False)[1]
    equal(found, weights)
    assert bool((found.transpose(1, 2)[hidden.unsqueeze(2).expand(B, N, H, M)] == 0).all())
    assert int((found[0, 0, 0] > 0).sum()) == 1 and int((found[0, 0, 1] > 0).sum()) == 2


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
def test_a_float_mask_changes_who_is_chosen(backend):
    layer = randomised(ConvNNAttention(E, H, k=2, backend=backend))
    q, k = tokens(B, N, E), tokens(B, M, E, seed=1)
    added = 20 * tokens(N, M, seed=4)
    expected, weights = naive(layer, q, k, added=added)
    assert not torch.equal(weights > 0, naive(layer, q, k)[1] > 0)
    out, found = layer(q, k, k, attn_mask=added, average_attn_weights=False)
    equal(out, expected)
    equal(found, weights)


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
def test_causal_k_nearest(backend):
    layer = randomised(ConvNNAttention(E, H, k=3, backend=backend))
    x = tokens(B, N, E)
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1).expand(B, N, N)
    expected = naive(layer, x, x, hidden)[0]
    equal(layer(x, is_causal=True)[0], expected)
    same = ConvNNAttention(E, H, k=3, candidates=Causal(), backend=backend).double()
    same.load_state_dict(layer.state_dict())
    equal(same(x)[0], expected)


@pytest.mark.parametrize("k", [None, 4])
def test_gradients_of_k_n_are_those_of_all(k):
    """k = n keeps every key: the same gradients as plain attention."""
    x = tokens(B, 4, E).requires_grad_()
    torch.manual_seed(0)
    layer = ConvNNAttention(E, H, k=k).double()
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(E, H, batch_first=True).double()
    results = []
    for module in (layer, plain):
        out = module(x, x, x, need_weights=False)[0].square().sum()
        results.append(torch.autograd.grad(out, (x, *module.parameters())))
    for a, b in zip(*results, strict=True):
        equal(a, b)


# --- where and how -------------------------------------------------------------------------


def test_grids_are_rows_of_tokens_with_positions():
    image = tokens(B, 3, 4, E)
    torch.manual_seed(0)
    layer = ConvNNAttention(E, H, k=3).double()
    out, weights = layer(image)
    assert out.shape == image.shape and weights.shape == (B, 12, 12)
    equal(out.flatten(1, 2), layer(image.flatten(1, 2))[0])  # the metric sees features alone
    near = ConvNNAttention(
        E, H, k=5, metric="spatial", weighting="ones", self_point="natural"
    ).double()
    weights = near(image)[1]
    middle = weights[0, 5].nonzero().flatten().tolist()  # pixel (1, 1)
    assert middle == [1, 4, 5, 6, 9]
    volume = tokens(B, 2, 3, 2, E)
    assert layer(volume, need_weights=False)[0].shape == volume.shape


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
def test_window_on_a_grid_keeps_keys_inside(backend):
    image = tokens(B, 4, 5, E)
    layer = randomised(ConvNNAttention(E, H, candidates=Window(3, padding=1), backend=backend))
    weights = layer(image)[1][0]
    assert weights[6].nonzero().flatten().tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert weights[0].nonzero().flatten().tolist() == [0, 1, 5, 6]
    equal(weights.sum(-1), torch.ones(20).double())


@pytest.mark.parametrize("backend", ["native", "gather", "message_passing"])
def test_blocks_are_attention_block_by_block(backend):
    layer = randomised(ConvNNAttention(E, H, candidates=Block(3), backend=backend))
    plain = nn.MultiheadAttention(E, H, batch_first=True).double()
    plain.load_state_dict(layer.state_dict())
    x = tokens(B, 6, E)
    expected = torch.cat([plain(part, part, part)[0] for part in x.split(3, 1)], 1)
    equal(layer(x, need_weights=False)[0], expected)


@pytest.mark.parametrize("per_example", [False, True])
def test_random_keys(per_example):
    layer = ConvNNAttention(E, H, k=3, candidates=Random(4, per_example=per_example)).double()
    x = tokens(B, 12, E)
    weights = layer(x, average_attn_weights=False)[1]
    used = (weights > 0).any(2)  # keys that any query chose, an example and head
    assert bool((used.sum(-1) <= 4).all())
    assert bool(((weights > 0).sum(-1) == 3).all())
    shared = bool((used == used[:1, :1]).all())
    assert not shared if per_example else int(used.flatten(0, 1).any(0).sum()) <= 4


def test_the_point_itself_first_or_excluded():
    x = tokens(B, N, E)
    eye = torch.eye(N, dtype=torch.bool)
    first = randomised(ConvNNAttention(E, H, k=2, self_point="first"))
    weights = first(x, average_attn_weights=False)[1]
    assert bool((weights[..., eye] > 0).all())
    excluded = randomised(ConvNNAttention(E, H, k=2, self_point="excluded"))
    weights = excluded(x, average_attn_weights=False)[1]
    assert bool((weights[..., eye] == 0).all())
    assert bool(((weights > 0).sum(-1) == 2).all())


@pytest.mark.parametrize("name", ["cosine", "euclidean", "dot", "manhattan", "pearson"])
@pytest.mark.parametrize("k", [None, 3])
def test_metrics_agree_across_backends(name, k):
    x = tokens(B, N, E)
    results = []
    for backend in ("auto", "gather", "message_passing"):
        layer = randomised(ConvNNAttention(E, H, k=k, metric=name, backend=backend))
        results.append(layer(x, need_weights=False)[0])
    equal(results[0], results[1])
    equal(results[0], results[2])


def test_position_bias_by_head_changes_who_is_chosen():
    bias = metrics.PositionBias((N,), heads=H)
    layer = randomised(ConvNNAttention(E, H, k=2, metric=metrics.Feature("dot") + bias))
    x = tokens(B, N, E)
    with torch.no_grad():
        bias.table.zero_()
        bias.table[0, N - 1 + 1] = 1e3  # head 0: the key one to the right
        bias.table[1, N - 1 - 1] = 1e3  # head 1: the key one to the left
    weights = layer(x, average_attn_weights=False)[1]
    assert all(weights[b, 0, i].argmax() == i + 1 for b in range(B) for i in range(N - 1))
    assert all(weights[b, 1, i].argmax() == i - 1 for b in range(B) for i in range(1, N))
    layer(x)[0].square().sum().backward()
    assert bias.table.grad is not None


def test_position_bias_with_every_key_is_an_added_mask():
    bias = metrics.PositionBias((N,), heads=H)
    layer = randomised(ConvNNAttention(E, H, metric=metrics.Feature("scaled_dot") + bias))
    plain = nn.MultiheadAttention(E, H, batch_first=True).double()
    state = layer.state_dict()
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("metric")})
    offset = torch.arange(N)[None] - torch.arange(N)[:, None] + N - 1
    mask = bias.table[:, offset].repeat(B, 1, 1)
    x = tokens(B, N, E)
    equal(layer(x)[0], plain(x, x, x, attn_mask=mask)[0])


def test_rotary_scores_depend_on_offsets_alone():
    layer = randomised(ConvNNAttention(E, H, encoding="rotary"))
    x = tokens(1, 1, E).expand(1, N, E)  # the same token everywhere
    weights = layer(x, average_attn_weights=False)[1][0]
    scores = weights.log() - weights.log().diagonal(dim1=1, dim2=2)[..., None]
    for step in (1, 2):
        line = scores.diagonal(step, 1, 2)
        equal(line, line[:, :1].expand_as(line))
    assert not torch.allclose(scores.diagonal(1, 1, 2), scores.diagonal(2, 1, 2)[:, :1])


def test_learned_absolute_encoding_is_added_to_the_tokens():
    table = encodings.LearnedAbsolute(E, (N,))
    layer = randomised(ConvNNAttention(E, H, k=3, encoding=table))
    plain = ConvNNAttention(E, H, k=3).double()
    state = layer.state_dict()
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("encoding")})
    x = tokens(B, N, E)
    equal(layer(x)[0], plain(x + table.table.t())[0])
    longer = tokens(B, 2 * N, E)
    assert layer(longer)[0].shape == longer.shape


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("masks", ["none", "padding", "bool", "float", "both"])
def test_positions_alone_take_the_masks_of_a_batch(masks, batch):
    layer = ConvNNAttention(8, 2, metric=metrics.Spatial(squared=True)).double()
    x = torch.randn(batch, 5, 8, dtype=torch.double)
    padding = torch.zeros(batch, 5, dtype=torch.bool)
    padding[1:, 3:] = True
    given = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "bool": {"attn_mask": torch.eye(5).expand(2 * batch, 5, 5) > 0},
        "float": {"attn_mask": torch.randn(2 * batch, 5, 5, dtype=torch.double)},
        "both": {"key_padding_mask": padding, "attn_mask": torch.ones(5, 5).triu(1) > 0},
    }[masks]
    out = layer(x, x, x, need_weights=False, **given)[0]
    layer.backend = "gather"
    torch.testing.assert_close(out, layer(x, x, x, need_weights=False, **given)[0])
    assert out.shape == x.shape


def test_any_weighting():
    layer = randomised(
        ConvNNAttention(E, H, k=3, metric="squared_euclidean", weighting=weighting.Gaussian(2.0))
    )
    x = tokens(B, N, E)
    q, k, v = heads(layer, x, x, x)
    distance = (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)
    near = distance.topk(3, largest=False)
    rho = torch.zeros_like(distance).scatter(-1, near.indices, (-near.values / 8).exp())
    equal(layer(x)[0], layer.out_proj((rho @ v).transpose(1, 2).flatten(2)))


def test_selection_in_place_of_k():
    layer = randomised(ConvNNAttention(E, H, selection=KNearest(3, dilation=2)))
    assert layer.k == 3
    weights = layer(tokens(B, N, E), average_attn_weights=False)[1]
    assert bool(((weights > 0).sum(-1) == 3).all())


def test_a_metric_that_cannot_learn_is_named_at_construction():
    with pytest.warns(UserWarning, match="will not learn") as caught:
        ConvNNAttention(E, H, k=3, metric=metrics.Bilinear(D), weighting="ones")
    assert len(caught) == 1 and caught[0].filename == __file__


def test_gradients_reach_every_parameter():
    layer = randomised(
        ConvNNAttention(E, H, k=3, metric=metrics.Bilinear(D), kernel="separable", add_bias_kv=True)
    )
    layer(tokens(B, N, E))[0].square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name


@pytest.mark.parametrize("name", ["coordinates", "fourier", "conditional", "rotary"])
@pytest.mark.parametrize("k", [None, 3])
def test_every_encoding_is_an_option_of_attention(name: str, k: int | None) -> None:
    torch.manual_seed(0)
    layer = ConvNNAttention(8, 2, k=k, encoding=name, axes=2)
    x = torch.randn(2, 3, 4, 8, requires_grad=True)
    out = layer(x, need_weights=False)[0]
    assert out.shape == x.shape
    moved = layer(x.flip(1), need_weights=False)[0].flip(1)
    assert not torch.allclose(out, moved, atol=1e-5)  # positions matter
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert gradient.abs().sum() > 0


def test_coordinates_are_seen_by_values_alone() -> None:
    layer = ConvNNAttention(8, 2, encoding="coordinates", axes=2)
    assert layer.q_proj_weight.shape == layer.k_proj_weight.shape == (8, 8)
    assert layer.v_proj_weight.shape == (8, 10)


def test_encoding_for_another_grid_is_an_error() -> None:
    layer = ConvNNAttention(8, 2, encoding="fourier", axes=2)
    with pytest.raises(ValueError, match="made for axes=2"):
        layer(torch.randn(1, 5, 8))


# -- knn_attention --------------------------------------------------------------------------


QKV = torch.randn(3, 2, 4, 20, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shape", [(20, 20), (20, 1), (1, 20), (4, 20, 20), (2, 1, 1, 20)])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("backend", ["auto", "gather"])
def test_knn_attention_takes_the_masks_that_torch_takes(shape, kind, backend):
    mask = torch.rand(shape) < 0.7
    if kind == "float":
        mask = torch.randn(shape).masked_fill(~mask, -torch.inf)
    wanted = F.scaled_dot_product_attention(*QKV, attn_mask=mask).nan_to_num(0.0)
    found = knn_attention(*QKV, 20, attn_mask=mask, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    few = knn_attention(*QKV, 5, attn_mask=mask, backend=backend)
    torch.testing.assert_close(
        few, knn_attention(*QKV, 5, attn_mask=mask.expand(2, 4, 20, 20).clone(), backend="gather")
    )


@pytest.mark.parametrize(
    "shape", [(19, 20), (20, 19), (3, 7), (3, 20, 20), (19,), (1, 2, 4, 20, 20)]
)
def test_knn_attention_refuses_masks_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"attn_mask: expected a shape that broadcasts to \(2, 4"):
        knn_attention(*QKV, 5, attn_mask=torch.ones(shape, dtype=torch.bool))


@pytest.fixture
def asked(monkeypatch):
    """How often a rule is chosen; nothing is remembered from before."""
    calls, choose = [], functional.choose
    monkeypatch.setattr(functional, "_AGAIN", {})
    monkeypatch.setattr(functional, "choose", lambda *args: calls.append(args) or choose(*args))
    return calls


def test_calls_that_look_alike_are_run_alike(asked):
    for _ in range(3):
        parts = torch.randn(3, 2, 4, 20, 8)
        wanted = knn_attention(*parts, 5, backend="message_passing")
        torch.testing.assert_close(knn_attention(*parts, 5), wanted, rtol=1e-4, atol=1e-5)
    assert len(asked) == 3 + 1  # message passing is asked for each time
    leaves = [[t.clone().requires_grad_() for t in parts] for _ in range(2)]
    found, wanted = (
        torch.autograd.grad(knn_attention(*t, 5, backend=backend).square().sum(), t)
        for t, backend in zip(leaves, ("auto", "gather"), strict=True)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(asked) == 3 + 1 + 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: knn_attention(*QKV, 4),
        lambda: knn_attention(*QKV[:, :1], 5),
        lambda: knn_attention(*QKV.double(), 5),
        lambda: knn_attention(*QKV, 5, scale=0.5),
        lambda: knn_attention(*QKV, 5, backend="gather"),
        lambda: knn_attention(*QKV, 5, is_causal=True),
        lambda: knn_attention(*QKV, 5, metric="cosine"),
        lambda: knn_attention(*QKV, 5, dropout_p=0.5),
        lambda: knn_attention(*QKV, 5, attn_mask=torch.ones(20, 20, dtype=torch.bool)),
        lambda: torch.func.vmap(lambda *t: knn_attention(*t, 5))(*QKV.expand(3, *QKV.shape[1:])),
    ],
)
def test_calls_that_differ_are_asked_for(asked, other):
    for _ in range(2):
        knn_attention(*QKV, 5)
    assert len(asked) == 1
    other()
    assert len(asked) == 2


@pytest.mark.parametrize("dropout", [False, None, "", torch.tensor(0.0)])
def test_what_is_remembered_lets_no_error_pass(asked, dropout):
    for _ in range(2):
        with pytest.raises(TypeError, match="dropout_p"):
            knn_attention(*QKV, 5, dropout_p=dropout)
        knn_attention(*QKV, 5)


def test_what_is_remembered_is_bounded(asked, monkeypatch):
    monkeypatch.setattr(functional, "_MOST", 3)
    for n in range(5, 12):
        knn_attention(*QKV[..., :n, :], 5)
        assert len(functional._AGAIN) <= 3


@pytest.mark.parametrize("backend", ["auto", "gather"])
@pytest.mark.parametrize("which", range(3))
def test_tensors_that_torch_is_yet_to_negate(asked, backend, which):
    parts = [t.clone() for t in QKV]
    wanted = knn_attention(*parts, 5, backend=backend)
    parts[which] = torch._neg_view(-parts[which])
    for _ in range(2):
        torch.testing.assert_close(knn_attention(*parts, 5, backend=backend), wanted)
    grads = []
    for view in (torch.neg, torch._neg_view):  # the same values, by a copy and by a bit
        leaf = (-QKV[which]).requires_grad_()
        parts[which] = view(leaf)
        knn_attention(*parts, 5, backend=backend).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ["auto", "gather", "compiled"])
def test_values_without_channels(backend):
    assert knn_attention(*QKV[:2], QKV[2][..., :0], 5, backend=backend).shape == (2, 4, 20, 0)


def test_knn_attention_over_all_keys_is_attention():
    for options in ({}, {"is_causal": True}, {"scale": 0.3}, {"scale": 0.0}, {"scale": -0.3}):
        wanted = F.scaled_dot_product_attention(*QKV, **options)
        torch.testing.assert_close(knn_attention(*QKV, 20, **options), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scores_of_any_sign_and_called_again(scale):
    wanted = knn_attention(QKV[0] * scale, *QKV[1:], 5, scale=1.0)
    for _ in range(3):  # a call that is remembered is of the query as it comes
        torch.testing.assert_close(knn_attention(*QKV, 5, scale=scale), wanted)


def test_groups_of_heads_share_keys_and_values():
    query, key, value = QKV[0], QKV[1, :, :2], QKV[2, :, :1]
    wide = key.repeat_interleave(2, 1), value.repeat_interleave(4, 1)
    for k in (5, 20):
        found = knn_attention(query, key, value, k, enable_gqa=True)
        assert torch.equal(found, knn_attention(query, *wide, k))
    wanted = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "gather"])
@pytest.mark.parametrize("halves", ["", "q", "k", "qkv"])
def test_knn_attention_under_autocast(backend, halves):
    """In the dtype that torch's has, and the neighbours of the numbers as they came."""
    half = torch.bfloat16
    given = [t.to(half) if name in halves else t for name, t in zip("qkv", QKV, strict=True)]
    wanted = knn_attention(*(t.float() for t in given), 5)
    with torch.autocast("cpu", half):
        found = knn_attention(*given, 5, backend=backend)
        assert found.dtype == F.scaled_dot_product_attention(*given).dtype == half
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)
    assert knn_attention(*QKV, 5, backend=backend).dtype == torch.float32


def jagged(t):
    return torch.nested.nested_tensor([t[0, 0], t[0, 1, :7]], layout=torch.jagged)


BAD = [
    (lambda: knn_attention(*QKV, 0), ValueError, "k"),
    (lambda: knn_attention(*QKV, 21), ValueError, "k=21 is larger than the number of keys, 20"),
    (lambda: knn_attention(*QKV, torch.ones(20, 20)), TypeError, "pass the mask as attn_mask="),
    (lambda: knn_attention(*QKV, 3, is_causal=True, attn_mask=QKV[0] > 0), ValueError, "not both"),
    (lambda: knn_attention(*QKV, 3, scale=1.0, metric="cosine"), ValueError, "metric or scale"),
    (lambda: knn_attention(*QKV, 3, scale=float("nan")), ValueError, "scale"),
    (
        lambda: knn_attention(*map(jagged, QKV), 3),
        TypeError,
        "pad",
    ),
    (
        lambda: knn_attention(*QKV, 3, attn_mask=causal_lower_right(20, 20)),
        TypeError,
        "got a CausalBias, which holds neither",
    ),
    (lambda: knn_attention(*QKV, 3, dropout_p=1.5), ValueError, "dropout"),
    (lambda: knn_attention(QKV[0], QKV[1][..., :8], QKV[2], 3), ValueError, "equal channels"),
    (lambda: knn_attention(QKV[0], QKV[1], QKV[2][..., :8, :], 3), ValueError, "equal lengths"),
    (lambda: knn_attention(QKV[0], QKV[1].double(), QKV[2], 3), TypeError, "convert one of them"),
    (lambda: knn_attention(*QKV.long(), 3), TypeError, "floating"),
    (lambda: knn_attention(QKV[0], QKV[1][:, :3], QKV[2], 3), ValueError, "do not broadcast"),
    (lambda: knn_attention(*QKV, 3, backend="fast"), ValueError, "unknown backend"),
    (lambda: knn_attention(*QKV[..., :0], 3), ValueError, "at least one channel"),
    (
        lambda: knn_attention(QKV[0], *QKV[1:, :, :3], 3, enable_gqa=True),
        ValueError,
        "key: its 3 heads do not divide the query's 4",
    ),
    (
        lambda: knn_attention(*QKV[:, 0, 0], 3, enable_gqa=True),
        ValueError,
        r"expected shape \(..., heads, n, d\) with enable_gqa",
    ),
]


@pytest.mark.parametrize("call, error, text", BAD)
def test_knn_attention_says_what_is_wrong(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("gap", [80.0, 90.0, 100.0, 1000.0])
@pytest.mark.parametrize("nearest", [0, 1])
def test_scores_that_lie_far_apart(gap, nearest):
    q, key = torch.ones(1, 1), torch.zeros(2, 1)
    key[nearest] = gap
    value = torch.tensor([[1.0], [2.0]])
    for k in (1, 2):
        assert knn_attention(q, key, value, k, backend="compiled").item() == nearest + 1


def test_large_scores_are_the_same_by_gather():
    q, key, value = torch.randn(3, 1, 1, 200, 16)
    for scale in (100.0, 1e4):
        found = knn_attention(scale * q, key, value, 5)
        wanted = knn_attention(scale * q, key, value, 5, backend="gather")
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_what_is_added_is_not_scaled():
    mask = torch.randn(20, 20)
    wanted = F.scaled_dot_product_attention(*QKV, attn_mask=mask, scale=0.1)
    found = knn_attention(*QKV, 20, attn_mask=mask, scale=0.1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wide", ["mask", "value", "key"])
def test_dropout_is_the_same_by_gather(wide):
    q, key, value = (torch.randn(1, 20, 8) for _ in range(3))
    mask = torch.rand(20, 20) < 0.8
    if wide == "mask":
        q, key, value = (t.expand(4, 20, 8) for t in (q, key, value))
        mask = torch.rand(4, 20, 20) < 0.8
    elif wide == "value":
        value = torch.randn(3, 20, 8)
    else:
        key = torch.randn(3, 20, 8)
    found = []
    for backend in ("compiled", "gather"):
        torch.manual_seed(1)
        found.append(knn_attention(q, key, value, 5, mask, 0.4, backend=backend))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", [None, "cosine", "squared_euclidean"])
def test_gradients_of_gradients(metric):
    parts = [(0.3 * torch.randn(1, 9, 12)).requires_grad_() for _ in range(3)]
    found = []
    for backend in ("auto", "gather"):
        out = knn_attention(*parts, 4, metric=metric, backend=backend)
        first = torch.autograd.grad(out.square().sum(), parts, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append([*first, *torch.autograd.grad(total, parts)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_transforms_of_functions_go_by_gather():
    q, key, value = torch.randn(3, 7, 9)
    direction = torch.randn(7, 9)
    for backend in ("gather", "auto"):
        attend = lambda x, b=backend: knn_attention(x, key, value, 4, backend=b)  # noqa: E731
        tangent = torch.func.jvp(attend, (q,), (direction,))[1]
        gradient = torch.func.grad(lambda x, f=attend: f(x).square().sum())(q)
        if backend == "gather":
            wanted = tangent, gradient
    torch.testing.assert_close(tangent, wanted[0])
    torch.testing.assert_close(gradient, wanted[1])
    assert wanted[0].abs().max() > 0


@pytest.mark.parametrize("case", ["plain", "not finite", "five axes"])
def test_knn_attention_compiles_by_inductor(case):
    shape = (1, 2, 2, 6, 16) if case == "five axes" else (2, 2, 6, 16)
    q, key, value = torch.randn(3, *shape)
    if case == "not finite":
        q = q * 1e30
    fast = torch.compile(lambda *t: knn_attention(*t, 3) * 2, fullgraph=True)
    torch.testing.assert_close(fast(q, key, value), knn_attention(q, key, value, 3) * 2)


def test_an_operation_takes_masks_by_place():
    layer, x = ConvNNAttention(E, H, k=3), torch.randn(1, 6, E)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    assert layer.operation(x, x, x, None, mask).mask is not None
    assert layer.operation(x, x, x, None, mask, need_weights=True).with_weights

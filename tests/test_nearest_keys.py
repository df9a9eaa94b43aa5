"""Attention over the nearest keys in models whose layers stay as they are."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convnn_geo.convert import NearestKeys
from convnn_geo.nn.functional import knn_attention

QKV = torch.randn(3, 2, 4, 20, 8, generator=torch.Generator().manual_seed(5))


def by_mask(k, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """All scores, and all but the ``k`` largest of each row hidden."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query @ key.transpose(-1, -2)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    least = scores.topk(min(k, scores.shape[-1]), dim=-1).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf).softmax(-1) @ value


class Attends(nn.Module):
    """Attention as models write it."""

    def __init__(self, **options):
        super().__init__()
        self.into, self.options = nn.Linear(8, 24), options

    def forward(self, x):
        q, k, v = self.into(x).view(*x.shape[:-1], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, **self.options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"attn_mask": torch.rand(2, 4, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.8},
        {"attn_mask": torch.randn(4, 20, 20, generator=torch.Generator().manual_seed(0))},
    ],
    ids=["plain", "scale", "mask", "bias"],
)
@pytest.mark.parametrize("k", [1, 5, 19, 20, 100])
def test_whoever_calls_attention_attends_to_the_nearest(options, k):
    wanted = by_mask(k, *QKV.double(), **options).float()
    with NearestKeys(k) as nearest:
        assert nearest.calls == 0
        found = F.scaled_dot_product_attention(*QKV, **options)
        query, key, value = QKV
        named = F.scaled_dot_product_attention(value=value, key=key, query=query, **options)
        assert nearest.calls == 2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, named)
    assert not torch.equal(F.scaled_dot_product_attention(*QKV, **options), found) or k >= 20


def test_causal_attention_and_what_is_given_by_position():
    with NearestKeys(3):
        found = F.scaled_dot_product_attention(*QKV, None, 0.0, True)
    assert torch.equal(found, knn_attention(*QKV, 3, is_causal=True))


def test_groups_of_queries_share_keys():
    query, key, value = QKV[0], QKV[1][:, :2], QKV[2][:, :2]
    with NearestKeys(3):
        found = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    wanted = by_mask(3, query, *(t.repeat_interleave(2, 1) for t in (key, value)))
    torch.testing.assert_close(found, wanted)


def test_nested_tensors_are_refused_by_name():
    one, two = QKV[0, 0, 0], QKV[1, 0, 0, :7]
    nested = torch.nested.nested_tensor([one, two], layout=torch.jagged)
    with NearestKeys(3), pytest.raises(TypeError, match="got a nested one; pad it"):
        F.scaled_dot_product_attention(nested, nested, nested)


def test_as_many_as_there_are_is_torchs_own():
    with NearestKeys(20):
        found = F.scaled_dot_product_attention(*QKV)
    assert torch.equal(found, F.scaled_dot_product_attention(*QKV))


def test_a_model_trains():
    model, x = Attends().double(), torch.randn(2, 20, 8, dtype=torch.float64)

    def loss(x):
        with NearestKeys(3):
            return model(x).square().sum()

    assert torch.autograd.gradcheck(loss, x.requires_grad_())
    loss(x).backward()
    assert model.into.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_compiles_whole_and_once(inside):
    model, x, built = Attends(), torch.randn(2, 20, 8), []

    def backend(graph, inputs):
        built.append(graph)
        return graph

    def attend(x):
        with NearestKeys(3):
            return model(x)

    wanted = attend(x)
    compiled = torch.compile(attend if inside else model, backend=backend, fullgraph=True)
    for _ in range(3):
        if inside:
            found = compiled(x)
        else:
            with NearestKeys(3):
                found = compiled(x)
        torch.testing.assert_close(found, wanted)
    assert len(built) == 1
    if not inside:
        torch.testing.assert_close(compiled(x), model(x))


def timm_model(name):
    timm = pytest.importorskip("timm")
    small = {
        "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (2, 2), "embed_dim": 12},
        "beit_base_patch16_224": {"img_size": 64, "embed_dim": 24, "num_heads": 2, "depth": 2},
        "eva02_tiny_patch14_224": {"img_size": 56, "embed_dim": 24, "num_heads": 2, "depth": 2},
        "vit_small_patch16_dinov3": {"img_size": 64, "embed_dim": 24, "num_heads": 2, "depth": 2},
    }[name]
    if name.startswith("swin"):
        small["num_heads"] = (2, 2)
    torch.manual_seed(0)
    fused = timm.layers.use_fused_attn(experimental=True)
    timm.layers.set_fused_attn(True, experimental=True)
    try:
        model = timm.create_model(name, **small).eval()
    finally:
        timm.layers.set_fused_attn(True, experimental=fused)
    for parameter in model.parameters():  # layers that start at nearly nothing would hide it
        nn.init.normal_(parameter, std=0.2)
    return model, torch.randn(2, 3, small["img_size"], small["img_size"])


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "beit_base_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
    ],
)
def test_models_of_timm(monkeypatch, name):
    """Windows and biases of places, rotary encodings: all stay what they are."""
    model, x = timm_model(name)
    with torch.no_grad():
        plain = model(x)
        with NearestKeys(4):
            found = model(x)
        with NearestKeys(10**6):
            assert torch.equal(model(x), plain)
        monkeypatch.setattr(
            F, "scaled_dot_product_attention", lambda *args, **rest: by_mask(4, *args, **rest)
        )
        wanted = model(x)
    changed = (found - plain).abs().max()
    assert changed > 1e-4 and (found - wanted).abs().max() < 0.01 * changed


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_torchs_layer_says_what_to_do(train, need_weights):
    x = torch.randn(2, 9, 8)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).train(train)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(train)
    for call in (lambda: layer(x, x, x, need_weights=need_weights), lambda: encoder(x)):
        says = pytest.raises(TypeError, match="to_convnn")
        with torch.set_grad_enabled(train), says, NearestKeys(3):
            call()


def test_a_context_without_attention_says_so():
    says = pytest.warns(UserWarning, match="nothing called scaled_dot_product_attention")
    with says, NearestKeys(3):
        nn.Linear(2, 2)(torch.randn(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="of its own"), NearestKeys(3):
            raise RuntimeError("an error of its own")


def test_the_innermost_context_holds():
    for outer, inner in ((3, 5), (5, 3), (3, 20), (3, 100), (100, 3)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with NearestKeys(outer), NearestKeys(inner):
                found = F.scaled_dot_product_attention(*QKV)
        wanted = knn_attention(*QKV, inner) if inner < 20 else F.scaled_dot_product_attention(*QKV)
        assert torch.equal(found, wanted)


def test_a_context_may_be_entered_again():
    nearest = NearestKeys(3)
    for _ in range(2):
        with nearest:
            found = F.scaled_dot_product_attention(*QKV)
        assert torch.equal(found, knn_attention(*QKV, 3))
    with pytest.warns(UserWarning, match="nothing called"), nearest:
        pass


def test_contexts_within_what_is_compiled():
    def nested(q):
        with NearestKeys(5), NearestKeys(3):
            return F.scaled_dot_product_attention(q, q, q)

    def idle(q):
        with NearestKeys(5):
            return q + 1

    q = QKV[0]
    options = {"backend": "eager", "fullgraph": True}
    torch.testing.assert_close(torch.compile(nested, **options)(q), knn_attention(q, q, q, 3))
    assert torch.equal(torch.compile(idle, **options)(q), q + 1)


@pytest.mark.parametrize("k, error", [(0, ValueError), (1.5, TypeError), ("9", TypeError)])
def test_k_is_a_count(k, error):
    with pytest.raises(error, match="k"):
        NearestKeys(k)

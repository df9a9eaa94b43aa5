"""The search by a bound finds what the search of every row by insertion finds."""

import pytest
import torch

from convnn_geo import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        gpu.refuses(torch.device(DEVICE)) is not None,
        reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
    ),
]


@pytest.fixture
def both(monkeypatch):
    """A search, once with the bound and once without; and the share of rows that it missed."""
    from convnn_geo.gpu import search, survivors

    def run(call):
        results, shares = [], []

        class Watched:
            def __getitem__(self, grid):
                def launch(*args, **kwargs):
                    kernel[grid](*args, **kwargs)
                    missed = next(t for t in args if getattr(t, "dtype", None) == torch.uint8)
                    shares.append(missed.float().mean().item())

                return launch

        kernel = search._nearest_survivors
        for shortest in (1, 10**9):
            with monkeypatch.context() as patch:
                patch.setattr(survivors, "SHORTEST", shortest)
                patch.setattr(search, "_nearest_survivors", Watched())
                results.append(call())
        (values, places), (wanted, order) = results
        assert torch.equal(places, order)
        (share,) = shares
        return values, wanted, share

    return run


def search(*args, **kwargs):
    from convnn_geo.gpu.search import nearest

    return nearest(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in args), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "n, m, d, k, biased",
    [(70, 300, 16, 9, True), (20, 256, 80, 32, False), (5, 200, 20, 1, False)],
)
def test_products(both, dtype, n, m, d, k, biased):
    torch.manual_seed(0)
    q, keys = torch.randn(2, 2, n, d).to(dtype), torch.randn(2, 2, m, d).to(dtype)
    bias = torch.randn(2, 2, m) if biased else None
    values, wanted, missed = both(lambda: search(q, keys, k, None, n, bias, 2.0))
    torch.testing.assert_close(values, wanted)
    assert missed < 0.1

"""Singular parts of a matrix against those of LAPACK, and what they must not depend on."""

import pytest
import torch

from litpeft.model.singular import largest, singular_parts


def matrix(*shape: int) -> torch.Tensor:
    """Returns a matrix (out, in) whose singular values fall by a tenth from one to the next."""
    draws = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=draws, dtype=torch.float64))[0] for n in shape)
    most = min(shape)
    return u[:, :most] * 0.9 ** torch.arange(most) @ v[:, :most].T


def close(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], limit: float) -> bool:
    return all(bool((x.double() - y).abs().max() <= limit) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (60, 60)])
def test_they_are_those_of_the_whole_decomposition(shape: tuple[int, int]) -> None:
    given = matrix(*shape)
    u, s, v = singular_parts(given, 30)
    whole, values, _ = torch.linalg.svd(given)
    assert (s[:8] / values[:8] - 1).abs().max() <= 1e-9
    assert ((u[:, :8] * whole[:, :8]).sum(0).abs() - 1).abs().max() <= 1e-9
    assert (given @ v - u * s)[:, :8].abs().max() <= 1e-9
    assert u.gather(0, u.abs().argmax(0, keepdim=True)).min() > 0
    assert (v.T @ v - torch.eye(30)).abs().max() <= 1e-12


@pytest.mark.parametrize("given", [torch.zeros(5, 7), torch.ones(6, 4), torch.ones(1, 9)], ids=["0", "1", "a row"])
def test_matrices_of_a_lower_rank_have_them_too(given: torch.Tensor) -> None:
    a, b = largest(given, 1)
    assert (b @ a - given).abs().max() <= 1e-6


def test_they_depend_on_no_draw_and_only_by_its_rounding_on_the_type() -> None:
    torch.manual_seed(0)
    want = singular_parts(matrix(40, 90), 12)
    torch.manual_seed(1)
    assert all(map(torch.equal, singular_parts(matrix(40, 90), 12), want))
    assert close(singular_parts(matrix(40, 90).float(), 12), want, 1e-5)


def test_they_are_the_same_where_factorisations_have_other_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a GPU's library may have."""
    want, qr, svd = singular_parts(matrix(40, 90), 12), torch.linalg.qr, torch.linalg.svd

    def signs(count: int) -> torch.Tensor:
        return torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64).repeat(count)[:count]

    def other_qr(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, r = qr(x)
        return q * signs(len(r)), signs(len(r))[:, None] * r

    def other_svd(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        u, s, v = svd(x)
        return u * signs(len(s)), s, signs(len(s))[:, None] * v

    monkeypatch.setattr(torch.linalg, "qr", other_qr)
    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    assert close(singular_parts(matrix(40, 90), 12), want, 1e-9)

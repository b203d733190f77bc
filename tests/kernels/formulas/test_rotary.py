"""Rotary embedding against multiplication of complex numbers in float64."""

import numpy as np
import pytest
import torch

from vllm_kvcompress.kernels.formulas.rotary import Rotary

HEAD_DIM = 24
CASES = [(True, 24), (False, 24), (True, 16), (False, 16), (True, 2)]
parametrize = pytest.mark.parametrize(("is_neox", "rotary_dim"), CASES)


def build(is_neox: bool, rotary_dim: int) -> Rotary:
    exponents = torch.arange(0, rotary_dim, 2) / rotary_dim
    return Rotary(inv_freq=10000.0**-exponents, is_neox=is_neox)


def turned(x: np.ndarray, positions: np.ndarray, rotary: Rotary) -> np.ndarray:
    """[n, D] by [n] positions: every pair of channels is a complex number times e^(i angle)."""
    result = x.copy()
    half = rotary.rotary_dim // 2
    for pair in range(half):
        first = pair if rotary.is_neox else 2 * pair
        second = pair + half if rotary.is_neox else 2 * pair + 1
        frequency = float(rotary.inv_freq[pair])
        number = (x[:, first] + 1j * x[:, second]) * np.exp(1j * positions * frequency)
        result[:, first], result[:, second] = number.real, number.imag
    return result


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


@parametrize
def test_rotation_is_complex_multiplication(is_neox: bool, rotary_dim: int) -> None:
    rotary, x = build(is_neox, rotary_dim), vectors(40)
    positions = torch.arange(40) * 7 - 50
    expected = turned(x.double().numpy(), positions.numpy(), rotary)
    np.testing.assert_allclose(rotary.rotate(x, positions).numpy(), expected, atol=1e-4)
    assert rotary.rotary_dim == rotary_dim


@parametrize
def test_split_and_join_are_inverse(is_neox: bool, rotary_dim: int) -> None:
    rotary, x = build(is_neox, rotary_dim), vectors(3, 5)
    a, b, rest = rotary.split(x)
    assert a.shape == b.shape == (3, 5, rotary_dim // 2)
    assert rest.shape == (3, 5, HEAD_DIM - rotary_dim)
    assert torch.equal(rotary.join(a, b, rest), x)


@parametrize
def test_rotating_back_undoes_it(is_neox: bool, rotary_dim: int) -> None:
    rotary, x = build(is_neox, rotary_dim), vectors(2, 50)
    positions = torch.arange(50) * 613
    back = rotary.rotate(rotary.rotate(x, positions), -positions)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


def test_positions_per_head_and_for_all_heads() -> None:
    rotary, x = build(True, 24), vectors(2, 9)
    positions = torch.stack([torch.arange(9), torch.arange(9) * 5])
    found = rotary.rotate(x, positions)
    for head in range(2):
        assert torch.equal(found[head], rotary.rotate(x[head], positions[head]))
    shared = rotary.rotate(x, positions[1])
    assert torch.equal(shared[1], found[1])
    assert not torch.equal(shared[0], found[0])


def test_rotations_compose_so_that_scores_depend_on_distance_only() -> None:
    rotary, queries, keys = build(False, 16), vectors(30, seed=1), vectors(30, seed=2)
    positions = torch.arange(30)
    near = (rotary.rotate(queries, positions + 3) * rotary.rotate(keys, positions)).sum(-1)
    far = (rotary.rotate(queries, positions + 203) * rotary.rotate(keys, positions + 200)).sum(-1)
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept_and_computed_in_float32(dtype: torch.dtype) -> None:
    rotary, x, positions = build(True, 24), vectors(20).to(dtype), torch.arange(20) * 100
    found = rotary.rotate(x, positions)
    assert found.dtype == dtype
    assert torch.equal(found, rotary.rotate(x.float(), positions).to(dtype))
    assert rotary.rotate_on_average(x, positions).dtype == dtype


@parametrize
def test_average_rotation_is_the_mean_of_rotations(is_neox: bool, rotary_dim: int) -> None:
    rotary, x = build(is_neox, rotary_dim), vectors(3)
    positions = np.arange(700, 780)
    expected = np.mean(
        [turned(x.double().numpy(), np.full(3, position), rotary) for position in positions], axis=0
    )
    found = rotary.rotate_on_average(x, torch.from_numpy(positions))
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)


@parametrize
def test_average_rotation_of_a_matrix_from_both_sides(is_neox: bool, rotary_dim: int) -> None:
    """M C M^T, with M the mean of the rotation matrices, from the rotated unit vectors."""
    rotary, positions = build(is_neox, rotary_dim), np.arange(30, 80)
    units = np.eye(HEAD_DIM)
    columns = [turned(units, np.full(HEAD_DIM, position), rotary) for position in positions]
    matrix = np.mean(columns, axis=0).T
    root = vectors(HEAD_DIM).double().numpy()
    covariance = root @ root.T
    half = rotary.rotate_on_average(torch.from_numpy(covariance), torch.from_numpy(positions))
    found = rotary.rotate_on_average(half.T, torch.from_numpy(positions))
    np.testing.assert_allclose(found.numpy(), matrix @ covariance @ matrix.T, atol=1e-3)

"""Modulation in the Fourier domain: against NumPy, and what it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.devices import cores
from ibjax.information import fourier

X = np.random.default_rng(0).uniform(size=(2, 8, 6, 3)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)


@pytest.fixture(params=[(0, 10, 2), (0, 11, 0)], autouse=True, ids=["fft", "products"])
def version(request, monkeypatch):
    """All holds for both forms: by jnp.fft, and by products where an FFT could hang."""
    monkeypatch.setattr(jax, "__version_info__", request.param)
    return request.param


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 5, 7, 2), (1, 1, 2, 1)])
def test_transforms_are_those_of_numpy(shape, version):
    """Also of a spectrum that belongs to no real image, where NumPy takes the real part."""
    rng = np.random.default_rng(2)
    x, half = rng.uniform(size=shape), shape[2] // 2 + 1
    f = rng.normal(size=(2, *shape[:2], half, shape[3]))
    f = f[0] + 1j * f[1]
    spectrum = np.fft.rfft2(x, axes=(1, 2), norm="ortho")
    image = np.fft.irfft2(f, s=shape[1:3], axes=(1, 2), norm="ortho")
    x, f = np.float32(x), np.complex64(f)
    found = jax.jit(lambda x, f: (fourier.transform(x), fourier.inverse(f, x)))(x, f)
    np.testing.assert_allclose(found[0], spectrum, atol=1e-6)
    np.testing.assert_allclose(found[1], image, atol=2e-6)
    program = str(jax.make_jaxpr(lambda x: fourier.transform(x))(x))
    assert ("fft[" in program) == (version < (0, 11))
    with cores.elsewhere():  # the fault is the CPU's
        assert "fft[" in str(jax.make_jaxpr(lambda x: fourier.transform(x))(x))


def mixed(weights):
    return lambda f: jnp.matmul(f, weights, precision="highest")


@pytest.mark.parametrize("modulate", [fourier.amplitude, fourier.amplitude_and_phase, fourier.parts])
def test_the_identity_changes_nothing(modulate):
    np.testing.assert_allclose(jax.jit(lambda x: modulate(x, lambda f: f))(X), X, atol=1e-5)


def test_amplitude_keeps_the_phase_and_mixes_the_amplitudes():
    """Against the full complex transform of NumPy; weights are positive, so that phases can be compared."""
    weights = np.abs(W)
    y = jax.jit(lambda x: fourier.amplitude(x, mixed(weights)))(X)
    before, after = np.fft.fft2(X, axes=(1, 2)), np.fft.fft2(np.asarray(y), axes=(1, 2))
    np.testing.assert_allclose(np.abs(after), np.abs(before) @ weights, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(after / np.abs(after), before / np.abs(before), atol=2e-3)


def test_a_real_map_of_real_and_imaginary_parts_alike_only_mixes_colours():
    """The negative: it does nothing in the spectrum. The amplitude's does, as does one that tells the parts apart."""
    alike = np.kron(np.eye(2, dtype=np.float32), W)
    apart = alike * np.float32([[1], [1], [1], [2], [2], [2]])  # W for the real part, 2 W for the imaginary one

    @jax.jit
    def modulated(x):
        return (
            fourier.parts(x, mixed(alike)),
            fourier.amplitude(x, mixed(W)),
            fourier.parts(x, mixed(apart)),
        )

    colours = X @ W
    of_alike, of_amplitude, of_apart = modulated(X)
    np.testing.assert_allclose(of_alike, colours, atol=1e-5)
    assert np.abs(of_amplitude - colours).max() > 0.1
    assert np.abs(of_apart - colours).max() > 0.1


@pytest.mark.parametrize("modulate", [fourier.amplitude, fourier.amplitude_and_phase, fourier.parts])
def test_gradients_are_finite_where_the_spectrum_is_zero(modulate):
    gradient = jax.jit(jax.grad(lambda x: jnp.square(modulate(x, lambda f: 2 * f)).sum()))
    x = np.ones((2, 4, 4, 1), np.float32)
    x[0] = 0  # at every frequency; beside it an image of which only the mean is not zero
    assert np.isfinite(gradient(x)).all()

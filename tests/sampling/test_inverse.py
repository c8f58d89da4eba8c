"""Linear measurements, and the stochastic ascent of Kadkhodaie & Simoncelli."""

import math

import pytest
import torch
from ebmkit_tests.support import known_targets as known
from pydantic import ValidationError

from ebmkit.errors import UserError
from ebmkit.sampling import Chains
from ebmkit.sampling.ascent import StochasticAscent, StochasticAscentConfig
from ebmkit.sampling.inverse import (
    BlockAverage,
    Compressed,
    LowPass,
    Pixels,
    center_hole,
    random_pixels,
)

SHAPE = (2, 8, 6)
MEASUREMENTS = {
    "mask": lambda: Pixels(SHAPE, torch.rand(8, 6, generator=known.generator()) < 0.4),
    "mask of channels": lambda: Pixels(SHAPE, torch.rand(*SHAPE) < 0.4),
    "hole": lambda: center_hole(SHAPE, 0.25),
    "pixels": lambda: random_pixels(SHAPE, 0.3, seed=2),
    "blocks": lambda: BlockAverage(SHAPE, 2),
    "low pass": lambda: LowPass(SHAPE, 0.3),
    "compressed": lambda: Compressed(SHAPE, 0.3, seed=3),
}


@pytest.fixture(params=MEASUREMENTS)
def measurement(request):
    return MEASUREMENTS[request.param]()


def images(count=3, seed=1):
    return torch.randn(count, *SHAPE, dtype=torch.float64, generator=known.generator(seed))


def test_measurements_have_orthonormal_columns_and_a_correct_adjoint(measurement):
    x = images()
    m = torch.randn(3, measurement.count, dtype=torch.float64, generator=known.generator(4))
    inner = (measurement.measure(x) * m).sum(1)
    torch.testing.assert_close(inner, (x * measurement.adjoint(m)).flatten(1).sum(1))
    torch.testing.assert_close(measurement.measure(measurement.adjoint(m)), m)
    once = measurement.project(x)
    torch.testing.assert_close(measurement.project(once), once)
    imposed = measurement.impose(x, m)
    torch.testing.assert_close(measurement.measure(imposed), m)
    torch.testing.assert_close(imposed - measurement.project(imposed), x - once)


def test_pixels_blocks_and_hole_measure_the_documented_values():
    x = images()
    pixels = random_pixels(SHAPE, 0.25, seed=5)
    assert pixels.count == 2 * 12
    shown = pixels.project(x) != 0
    assert torch.equal(shown[:, 0], shown[:, 1])
    blocks = BlockAverage(SHAPE, 2)
    torch.testing.assert_close(
        blocks.small_images(blocks.measure(x))[0, 0, 0, 0], x[0, 0, :2, :2].mean()
    )
    small = blocks.small_images(blocks.measure(x))
    torch.testing.assert_close(blocks.of_small_images(small), blocks.measure(x))
    hole = center_hole(SHAPE, 0.25)
    assert (hole.project(torch.ones(1, *SHAPE))[0, 0, 2:6, 1:4] == 0)[:, 1:].all()
    assert hole.count == 2 * (48 - 4 * 3)


def test_low_pass_matches_a_fourier_filter():
    """Equal to a complex FFT that keeps the same low frequencies."""
    x, filtered = images(), LowPass(SHAPE, 0.3)
    rows, columns = torch.fft.fftfreq(8)[:, None], torch.fft.fftfreq(6)
    radius = (rows**2 + columns**2).sqrt()
    limit = radius.flatten().sort().values[math.ceil(0.3 * 48) - 1]
    kept = radius <= limit + 1e-6
    expected = torch.fft.ifft2(torch.fft.fft2(x) * kept).real
    torch.testing.assert_close(filtered.project(x), expected)
    assert filtered.count == 2 * int(kept.sum())


def test_compressed_measurements_weight_all_pixels_similarly():
    """Of each unit image about the measured share of the squared norm is kept."""
    shape = (1, 16, 16)
    measurement = Compressed(shape, 0.25, seed=0)
    unit = torch.eye(256, dtype=torch.float64).reshape(-1, *shape)
    kept = measurement.measure(unit).square().sum(1)
    assert kept.mean() == pytest.approx(0.25)
    assert kept.max() < 0.45
    assert kept.min() > 0.05


# --- stochastic ascent ---------------------------------------------------------------------------


def paper_algorithm(denoiser, y, noise, h0, beta, steps, matrix=None, measured=None):
    """Algorithms 1 and 2 of the paper, with M as a matrix (N, n), for a fixed number of steps."""
    for t in range(1, steps + 1):
        h = h0 * t / (1 + h0 * (t - 1))
        d = denoiser(y) - y
        if matrix is not None:
            flat = d.flatten(1)
            eye = torch.eye(len(matrix), dtype=y.dtype)
            d = flat @ (eye - matrix @ matrix.T) + (measured - y.flatten(1) @ matrix) @ matrix.T
            d = d.reshape(y.shape)
        sigma = d.flatten(1).norm(dim=1) / math.sqrt(y[0].numel())
        gamma = (((1 - beta * h) ** 2 - (1 - h) ** 2) * sigma**2).sqrt()
        y = y + h * d + gamma[:, None, None, None] * noise[t - 1]
    return y


@pytest.mark.parametrize("constrained", [False, True])
def test_steps_match_the_algorithms_of_the_paper(constrained):
    def denoiser(y, sigma=None):
        return 0.5 + 0.3 * (y - 0.5).tanh() + 0.1 * y.flip(-1)

    measurement = Compressed(SHAPE, 0.3) if constrained else None
    measured = measurement.measure(images(seed=8)) if measurement else None
    matrix = None
    if measurement:
        unit = torch.eye(96, dtype=torch.float64).reshape(-1, *SHAPE)
        matrix = measurement.measure(unit)
    config = StochasticAscentConfig(last_sigma=1e-6, first_step=0.05, beta=0.1)
    sampler = StochasticAscent(denoiser, config, measurement, measured)
    start = sampler.start((3, *SHAPE), known.generator(2), torch.float64)
    source = known.generator(3)
    noise = [torch.randn(start.shape, dtype=torch.float64, generator=source) for _ in range(12)]
    expected = paper_algorithm(denoiser, start, noise, 0.05, 0.1, 12, matrix, measured)
    torch.testing.assert_close(known.run(sampler, start, 12, seed=3), expected)


def low_rank_gaussian_denoiser(axes, covariance):
    """Posterior mean of a Gaussian about gray on orthonormal axes (rank, C, H, W).

    Sigma is estimated orthogonally to the axes, which is exact in many dimensions.
    """
    basis = axes.flatten(1)
    variances, turn = torch.linalg.eigh(covariance)
    principal = turn.T @ basis

    def denoiser(y, sigma=None):
        offsets = (y - 0.5).flatten(1)
        inside = offsets @ principal.T
        off = offsets.square().sum(1) - inside.square().sum(1)
        level = off / (offsets.shape[1] - len(basis))
        return 0.5 + ((variances / (variances + level[:, None]) * inside) @ principal).view_as(y)

    return denoiser


def random_axes(rank, shape):
    matrix = torch.randn(math.prod(shape), rank, dtype=torch.float64, generator=known.generator())
    return torch.linalg.qr(matrix).Q.T.reshape(rank, *shape)


def variance_by_recursion(v, share, first, last, h0, beta, largest):
    """Variance of samples along an axis, by a recursion over the steps, in many dimensions."""
    noise, along, t = first**2, first**2, 0
    while True:
        t += 1
        kappa = noise / (v + noise)
        level = (1 - share) * noise + share * kappa**2 * along
        if level <= last**2:
            return (1 - kappa) ** 2 * along
        h = min(largest, h0 * t / (1 + h0 * (t - 1)))
        gamma = ((1 - beta * h) ** 2 - (1 - h) ** 2) * level
        noise = (1 - h) ** 2 * noise + gamma
        along = (1 - h * kappa) ** 2 * along + gamma


BIASES = {
    # (first step, beta, largest step, rank out of 144): variance relative to the exact one
    (0.01, 0.05, 1.0, 4): 0.70,
    (0.05, 0.2, 0.2, 4): 0.90,
    (0.01, 0.05, 1.0, 72): 0.79,
}


@pytest.mark.parametrize(
    "setting",
    [pytest.param(key, marks=[pytest.mark.slow] if k else []) for k, key in enumerate(BIASES)],
)
def test_variance_of_samples_has_the_documented_bias(setting):
    """The paper's steps reduce the variance of a Gaussian; smaller steps reduce it less."""
    first_step, beta, largest, rank = setting
    shape, v, count = (1, 12, 12), 0.04, 300
    axes = random_axes(rank, shape)
    denoiser = low_rank_gaussian_denoiser(axes, v * torch.eye(rank, dtype=torch.float64))
    config = StochasticAscentConfig(
        last_sigma=0.005, first_step=first_step, beta=beta, largest_step=largest, steps=1000
    )
    sampler = StochasticAscent(denoiser, config)
    start = sampler.start((count, *shape), known.generator(), torch.float64)
    chains = Chains(sampler, sampler.init(start))
    end = chains.run(1000, known.generator(1)).x
    assert bool(chains.finished.all())
    assert not chains.diverged
    assert chains.state.step < 1000
    found = ((end - 0.5).flatten(1) @ axes.flatten(1).T).square()
    expected = variance_by_recursion(v, rank / 144, 1.0, 0.005, first_step, beta, largest)
    # in 144 dimensions the levels of chains differ by 6 %, which the recursion neglects: 2 %
    error = 4 * (2 / found.numel()) ** 0.5 + 0.02
    assert float(found.mean()) / expected == pytest.approx(1, abs=error)
    assert expected / v == pytest.approx(BIASES[setting], abs=0.01)


@pytest.mark.slow
def test_inpainting_samples_the_posterior_of_a_gaussian():
    """Two correlated patterns, one in the known half: mean and variance of the other one."""
    shape, v, rho, count = (1, 12, 12), 0.04, 0.8, 600
    axes = torch.zeros(2, *shape, dtype=torch.float64)
    axes[0, 0, :6], axes[1, 0, 6:] = 1, 1
    axes /= 72**0.5
    covariance = v * torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)
    known_half = torch.zeros(12, 12, dtype=torch.bool)
    known_half[:6] = True
    measurement = Pixels(shape, known_half)
    coordinate, beta = 0.3, 0.1
    measured = measurement.measure(0.5 + coordinate * axes[:1])
    config = StochasticAscentConfig(last_sigma=0.005, first_step=0.05, beta=beta, largest_step=0.2)
    sampler = StochasticAscent(
        low_rank_gaussian_denoiser(axes, covariance), config, measurement, measured
    )
    start = sampler.start((count, *shape), known.generator(), torch.float64)
    end = known.run(sampler, start, 2000)
    torch.testing.assert_close(measurement.measure(end), measured.expand(count, -1))
    z = ((end - 0.5) * axes[1]).flatten(1).sum(1)
    exact = v * (1 - rho**2)
    # chains stop at a noise of about beta v, where the known half has weight 1 / (1 + beta)
    error = 4 * (exact / count) ** 0.5 + beta * rho * coordinate
    assert float(z.mean()) == pytest.approx(rho * coordinate, abs=error)
    assert float(z.var()) / exact == pytest.approx(1, abs=4 * (2 / count) ** 0.5 + beta)


def test_each_chain_stops_at_its_own_step_and_does_not_move_again():
    axes = random_axes(4, (1, 12, 12))
    denoiser = low_rank_gaussian_denoiser(axes, 0.04 * torch.eye(4, dtype=torch.float64))
    config = StochasticAscentConfig(last_sigma=0.02, first_step=0.05, beta=0.5)
    sampler = StochasticAscent(denoiser, config)
    start = sampler.start((4, 1, 12, 12), known.generator(), torch.float64)
    start[0] = 0.5 + 0.1 * (start[0] - 0.5)
    chains, ended = Chains(sampler, sampler.init(start)), {}

    def check(state, info):
        for chain in torch.nonzero(chains.finished).flatten().tolist():
            _, x = ended.setdefault(chain, (state.step, state.x[chain].clone()))
            assert torch.equal(state.x[chain], x)

    chains.run(2000, known.generator(1), check)
    assert sorted(ended) == [0, 1, 2, 3]
    assert ended[0][0] < min(ended[k][0] for k in (1, 2, 3))
    short = StochasticAscent(denoiser, config.model_copy(update={"steps": 3}))
    chains = Chains(short, short.init(start))
    assert chains.run(2000, known.generator(1)).step == 3
    assert chains.done


# --- errors --------------------------------------------------------------------------------------


def ascent(measured=None, **settings):
    config = StochasticAscentConfig(**settings)
    return StochasticAscent(lambda y, sigma=None: y, config, None, measured)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Pixels((1, 4, 4), torch.ones(5, 4)),
            "a mask of 5 x 4 does not fit images of 4 x 4",
        ),
        (lambda: Pixels((1, 4, 4), torch.zeros(4, 4)), "nothing is measured"),
        (lambda: BlockAverage((1, 4, 6), 4), "factor 4 does not divide images of 4 x 6"),
        (lambda: BlockAverage((1, 4, 6), 1), "factor 1"),
        (lambda: LowPass((1, 4, 4), 0.0), "share 0.0 must be"),
        (lambda: Compressed((1, 4, 4), 1.5), "share 1.5 must be"),
        (lambda: random_pixels((1, 4, 4), math.nan), "share nan must be"),
        (lambda: center_hole((1, 4, 4), 0.001), "leaves no hole, or no pixel"),
        (lambda: Compressed((4, 4), 0.5), "have a shape"),
        (lambda: random_pixels(SHAPE, 0.5).measure(torch.ones(1, 2, 8, 8)), "is of images"),
        (lambda: random_pixels(SHAPE, 0.5).adjoint(torch.ones(1, 3)), "has 48 numbers"),
        (lambda: ascent(first_sigma=0.01), "first sigma 0.01 is not above last sigma 0.01"),
        (lambda: ascent(beta=0), "beta"),
        (lambda: ascent(first_step=2), "first_step"),
        (lambda: ascent(steps=0), "steps"),
        (lambda: ascent(measured=torch.ones(1, 3)), "belong together"),
    ],
)
def test_illegal_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert isinstance(raised.value, UserError | ValidationError)

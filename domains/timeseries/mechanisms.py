"""Series of mechanisms that training never sees: equations of motion, queues, tides, growth, a heated house.

Each function draws its parameters and gives values (T,) and what repeats in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import odeint
from scipy.signal import lfilter

from vertebra.domains.timeseries.structure import Doubles, Season

HOURLY = Season("h", (24.0, 168.0), 24)

TIDES = {
    "M2": 12.4206012, "S2": 12.0, "N2": 12.65834751, "K2": 11.96723606, "K1": 23.93447213, "O1": 25.81933871,
    "P1": 24.06588766, "Q1": 26.868350, "M4": 6.210300601, "Mf": 327.8599387, "Mm": 661.3111655,
}  # fmt: skip
"""Periods of tidal constituents, in hours (NOAA, Harmonic constituents)."""

_LUNAR_DAY = 24.8412  # hours: two M2
_TIDAL_SIZES = {
    "M2": 1.0, "S2": 0.45, "N2": 0.2, "K2": 0.12, "K1": 0.4, "O1": 0.35,
    "P1": 0.13, "Q1": 0.07, "M4": 0.05, "Mf": 0.04, "Mm": 0.03,
}  # fmt: skip

Motion = Callable[[float, Sequence[float]], tuple[float, ...]]


def _solve(motion: Motion, state: Sequence[float], times: NDArray[np.floating[Any]]) -> Doubles:
    """Return the states (len(times), S); ``state`` is that of time 0."""
    begins = times[0] == 0
    grid = times if begins else np.append(0, times)
    solved = odeint(motion, state, grid, tfirst=True, rtol=1e-6, atol=1e-8, mxstep=5000)
    return solved if begins else solved[1:]  # in compiled code, many times as fast as solve_ivp


def oscillator(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    """Draw a Van der Pol oscillator, Lotka-Volterra's hunters and prey, or a pendulum of large swings.

    Its period is found in a first run; it is then sampled at 8 to 60 whole steps a period, and measured with an error.
    """
    kind = int(rng.integers(3))
    stiff, swing = rng.uniform(0.3, 4), rng.uniform(0.8, 2.9)
    births, hunger = rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)

    def motion(time: float, at: Sequence[float]) -> tuple[float, ...]:
        x, y = at
        if kind == 0:
            return y, stiff * (1 - x * x) * y - x
        if kind == 1:
            return births * x * (1 - y), hunger * y * (x - 1)
        return y, -math.sin(x)

    begin = ((1.0, 0.0), (rng.uniform(0.3, 0.8), 1.0), (swing, 0.0))[kind]
    times = np.linspace(0, 80, 4000)
    first = _solve(motion, begin, times)
    centred = first[2000:, 0] - first[2000:, 0].mean()  # on its cycle by then
    rises = np.flatnonzero((centred[:-1] < 0) & (centred[1:] >= 0))
    period = (rises[-1] - rises[0]) / (len(rises) - 1) * (times[1] - times[0])
    steps = int(rng.integers(8, 61))
    states = _solve(motion, first[2000].tolist(), period / steps * np.arange(length + 1))[1:]
    values = states[:, int(rng.integers(2))]
    error = rng.uniform(0, 0.08) * values.std()
    return values + error * rng.standard_normal(length), Season("step", (float(steps),))


def lorenz(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    """Draw x, y or z of Lorenz's system (1963, sigma 10, rho 28, beta 8/3), sampled every 0.02 to 0.1."""

    def motion(time: float, at: Sequence[float]) -> tuple[float, ...]:
        x, y, z = at
        return 10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z

    step = rng.uniform(0.02, 0.1)
    states = _solve(motion, rng.normal((0, 0, 25), 5).tolist(), 10 + step * np.arange(length))
    values = states[:, int(rng.integers(3))]
    return values + rng.uniform(0, 0.03) * values.std() * rng.standard_normal(length), Season("step", ())


def queue(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    """Draw the people who wait in a queue of limited capacity, those served, or the stock of a shop, each hour."""
    hours = np.arange(length) + int(rng.integers(168))
    hour, weekday = hours % 24, hours // 24 % 7
    centre, width = rng.uniform(10, 17), rng.uniform(2.5, 5)
    busy = 0.05 + np.exp(-0.5 * ((hour - centre) / width) ** 2)
    busy *= np.where(weekday >= 5, rng.uniform(0.3, 1.2), 1.0)
    days = np.exp(rng.uniform(0.05, 0.3) * rng.standard_normal(int(hours[-1]) // 24 + 1))
    rate = 10 ** rng.uniform(0.7, 2.5) * busy * days[hours // 24]
    arrivals = rng.poisson(rate)
    kind = int(rng.integers(3))
    values = np.empty(length)
    if kind == 2:  # ordered up to a mark when it falls below another; delivered in the morning
        most = 24 * rate.mean() * rng.uniform(1.5, 6)
        stock, reorder = most, most * rng.uniform(0.2, 0.5)
        for at in range(length):
            if hour[at] == 6 and stock < reorder:
                stock = most
            stock = max(0.0, stock - arrivals[at])
            values[at] = stock
        return values, HOURLY
    capacity, waiting = max(1, int(rate.mean() * rng.uniform(1.1, 1.8))), 0
    for at in range(length):
        present = waiting + int(arrivals[at])
        served = min(present, capacity)
        waiting = present - served
        values[at] = waiting if kind == 0 else served
    return values, HOURLY


def tides(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    """Draw the level of the sea, each hour: constituents of true periods, and surge that comes and goes in days."""
    hours = np.arange(length)
    daily = 10 ** rng.uniform(-0.8, 0.8)  # of the tides once a day, against those twice a day
    values = np.zeros(length)
    for name, period in TIDES.items():
        size = _TIDAL_SIZES[name] * rng.uniform(0.6, 1.4) * (daily if 23 < period < 27 else 1.0)
        values += size * np.cos(2 * np.pi * (hours / period + rng.random()))
    keep = 1 - 1 / rng.uniform(15, 60)
    surge = lfilter([math.sqrt(1 - keep**2)], [1, -keep], rng.standard_normal(length + 300))[300:]
    values += rng.uniform(0, 0.4) * surge + rng.uniform(0, 0.03) * rng.standard_normal(length)
    return values, Season("h", (_LUNAR_DAY, TIDES["M2"]))


def growth_seasonal(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    """Draw monthly sales: logistic growth, a factor for each month, and a holiday that moves by the year.

    The holiday's day of the year goes back by 11 days a year, or wanders between two months.
    """
    months = np.arange(length) + int(rng.integers(12))
    middle, span = rng.uniform(0.1, 1) * min(length, 300), rng.uniform(15, 80)
    growth = rng.uniform(0.1, 0.5) + 1 / (1 + np.exp(-(months - middle) / span))
    factor = np.exp(rng.uniform(0.05, 0.35) * rng.standard_normal(12))
    years = np.arange(months[-1] // 12 + 2)
    if rng.random() < 0.5:
        day = (rng.uniform(0, 365) - 10.88 * years) % 365.25
    else:
        day = 30.44 * int(rng.integers(1, 11)) + rng.uniform(-15, 15, len(years))
    holiday = np.zeros(12 * len(years))
    for year, date in enumerate(day):  # a week, which may lie in two months
        for part in range(7):
            holiday[(12 * year + int((date + part) / 30.44)) % len(holiday)] += 1 / 7
    lift = rng.uniform(0.1, 0.6) * (1 if rng.random() < 0.7 else -0.7)
    error = np.exp(rng.uniform(0.01, 0.08) * rng.standard_normal(length))
    return growth * factor[months % 12] * (1 + lift * holiday[months]) * error, Season("MS", (12.0,))


def thermal(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    """Draw the temperature in a heated building, or the heat it takes, each hour.

    One thermal mass loses heat to the weather and gains it from the sun and a thermostat that is set back at night:
    ``dT/dt = (outside - T) / RC + sun + heat``. The weather is a year's and a day's wave and fronts that pass in days.
    """
    hours = np.arange(length) + int(rng.integers(8766))
    keep = 1 - 1 / rng.uniform(20, 80)
    fronts = lfilter([math.sqrt(1 - keep**2)], [1, -keep], rng.standard_normal(length + 300))[300:]
    day, year = np.cos(2 * np.pi * (hours - 15) / 24), np.cos(2 * np.pi * (hours / 8766 - 0.55))
    outside = rng.uniform(2, 12) + rng.uniform(4, 10) * year + rng.uniform(2, 6) * day + rng.uniform(2, 5) * fronts
    sky = 1 / (1 + np.exp(-2 * fronts - rng.standard_normal(length)))
    sun = rng.uniform(0, 0.8) * np.maximum(0, -np.cos(2 * np.pi * hours / 24) + 0.3 * year) * sky
    mass, power = rng.uniform(10, 60), rng.uniform(1, 3)  # hours; degrees an hour
    awake = (hours % 24 >= rng.uniform(5, 8)) & (hours % 24 < rng.uniform(18, 23))
    if rng.random() < 0.5:
        awake &= hours // 24 % 7 < 5
    wanted = np.where(awake, rng.uniform(19, 22), rng.uniform(15, 18))
    inside, on = float(wanted[0]), False
    temperature, heat = np.empty(length), np.empty(length)
    for at, (target, air, gain) in enumerate(zip(wanted.tolist(), outside.tolist(), sun.tolist(), strict=True)):
        minutes = 0
        for _ in range(6):  # ten minutes each, as a thermostat switches
            on = inside < target + (0.3 if on else -0.3)
            inside += ((air - inside) / mass + gain + power * on) / 6
            minutes += 10 * on
        temperature[at], heat[at] = inside, minutes / 60
    if heat.std() > 0.05 and rng.random() < 0.5:
        return heat, HOURLY
    return temperature + 0.05 * rng.standard_normal(length), HOURLY

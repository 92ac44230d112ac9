"""What the digits of three languages are made of: phones, as targets of the vocal tract, and words."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """What the vocal tract aims at for a while: seconds, Hz, and amplitudes from 0 to 1."""

    seconds: float
    f1: float
    f2: float
    f3: float
    voice: float = 0.0
    breath: float = 0.0
    hiss: float = 0.0
    centre: float = 3000.0
    width: float = 3000.0
    damping: float = 1.0


# Stops are a closure, a burst and, where they are aspirated, breath. Two targets make a diphthong.
PHONES: dict[str, tuple[Target, ...]] = {
    # English, as ARPAbet names them
    "iy": (Target(0.150, 275, 2250, 2950, voice=1.0),),
    "ih": (Target(0.085, 400, 1950, 2550, voice=1.0),),
    "eh": (Target(0.095, 540, 1800, 2480, voice=1.0),),
    "ah": (Target(0.130, 650, 1200, 2400, voice=1.0),),
    "uh": (Target(0.070, 480, 1350, 2350, voice=0.8),),
    "ao": (Target(0.140, 540, 830, 2400, voice=1.0),),
    "uw": (Target(0.080, 330, 1550, 2400, voice=1.0), Target(0.110, 310, 1050, 2240, voice=0.9)),
    "ey": (Target(0.080, 500, 1750, 2500, voice=1.0), Target(0.090, 330, 2150, 2750, voice=0.9)),
    "ay": (Target(0.120, 720, 1200, 2450, voice=1.0), Target(0.080, 420, 1900, 2550, voice=0.7)),
    "ow": (Target(0.100, 520, 1000, 2350, voice=1.0), Target(0.110, 380, 780, 2250, voice=0.8)),
    "r": (Target(0.075, 340, 1080, 1450, voice=0.8),),
    "er": (Target(0.090, 470, 1080, 1720, voice=0.6),),
    "w": (Target(0.070, 290, 610, 2150, voice=0.7),),
    "n": (Target(0.085, 260, 1450, 2550, voice=0.45, damping=2.5),),
    "v": (Target(0.075, 230, 1100, 2100, voice=0.30, hiss=0.06, centre=4500, width=5000, damping=1.5),),
    "z": (Target(0.080, 240, 1400, 2500, voice=0.30, hiss=0.22, centre=4800, width=2200, damping=1.5),),
    "s": (Target(0.110, 320, 1450, 2550, hiss=0.50, centre=5000, width=2200),),
    "f": (Target(0.055, 330, 1100, 2100, hiss=0.05, centre=4000, width=7000),),
    "th": (Target(0.065, 320, 1350, 2550, hiss=0.05, centre=5500, width=3500),),
    "t": (
        Target(0.030, 250, 1750, 2650),
        Target(0.015, 300, 1750, 2650, hiss=0.80, centre=4200, width=2500),
        Target(0.040, 350, 1600, 2600, breath=0.30, hiss=0.12, centre=4200, width=2500),
    ),
    "k": (
        Target(0.065, 250, 1900, 2300),
        Target(0.020, 300, 1900, 2300, hiss=0.55, centre=1900, width=500),
        Target(0.020, 300, 1800, 2350, breath=0.20),
    ),
    # vowels of German and Spanish; "ii" is long, "y" rounded, "ax" the end of vier, "oy" that of neun
    "a": (Target(0.100, 760, 1350, 2500, voice=1.0),),
    "e": (Target(0.090, 460, 1950, 2600, voice=1.0),),
    "i": (Target(0.090, 300, 2250, 2950, voice=1.0),),
    "ii": (Target(0.140, 280, 2200, 3000, voice=1.0),),
    "o": (Target(0.095, 470, 880, 2400, voice=1.0),),
    "u": (Target(0.100, 320, 760, 2250, voice=1.0),),
    "uu": (Target(0.080, 400, 930, 2300, voice=1.0),),
    "y": (Target(0.085, 370, 1480, 2150, voice=1.0),),
    "ax": (Target(0.080, 600, 1300, 2450, voice=0.7),),
    "oy": (Target(0.100, 530, 900, 2400, voice=1.0), Target(0.085, 370, 1700, 2350, voice=0.8)),
    "ei": (Target(0.075, 470, 1850, 2550, voice=1.0), Target(0.075, 320, 2200, 2850, voice=0.9)),
    # their consonants; "rh" is of the uvula, "rr" rolled, "bv" the soft b of nueve
    "j": (Target(0.050, 280, 2250, 3000, voice=0.8),),
    "l": (Target(0.080, 330, 1300, 2700, voice=0.55),),
    "m": (Target(0.070, 250, 1050, 2200, voice=0.45, damping=2.5),),
    "ng": (Target(0.065, 270, 1950, 2350, voice=0.45, damping=2.5),),
    "x": (Target(0.085, 600, 1250, 2400, hiss=0.30, centre=1500, width=900),),
    "rh": (Target(0.065, 430, 1150, 2300, voice=0.45, hiss=0.10, centre=1300, width=900, damping=1.5),),
    "rr": (
        Target(0.028, 350, 1450, 2150, voice=0.10, damping=2.0),
        Target(0.020, 430, 1500, 2300, voice=0.80),
        Target(0.028, 350, 1450, 2150, voice=0.10, damping=2.0),
    ),
    "bv": (Target(0.060, 280, 950, 2200, voice=0.40, hiss=0.03, centre=1500, width=2000, damping=1.8),),
    "b": (
        Target(0.045, 220, 900, 2200, voice=0.15, damping=2.5),
        Target(0.012, 300, 1000, 2250, voice=0.40, hiss=0.12, centre=900, width=800),
    ),
    "d": (
        Target(0.045, 230, 1700, 2600, voice=0.15, damping=2.5),
        Target(0.012, 300, 1700, 2650, voice=0.40, hiss=0.30, centre=3800, width=2500),
    ),
    "ts": (
        Target(0.030, 250, 1600, 2600),
        Target(0.012, 300, 1600, 2600, hiss=0.80, centre=4300, width=2500),
        Target(0.075, 320, 1450, 2550, hiss=0.45, centre=5000, width=2200),
    ),
    "ch": (
        Target(0.045, 250, 1800, 2600),
        Target(0.015, 280, 1850, 2600, hiss=0.75, centre=3100, width=1200),
        Target(0.065, 280, 1900, 2600, hiss=0.45, centre=2800, width=1100),
    ),
    "td": (
        Target(0.045, 250, 1600, 2600),
        Target(0.012, 300, 1600, 2600, hiss=0.45, centre=3300, width=2500),
    ),
    "kg": (
        Target(0.050, 250, 1500, 2250),
        Target(0.018, 300, 1500, 2250, hiss=0.45, centre=1600, width=600),
    ),
}  # fmt: skip
"""Targets of every phone."""

WORDS: dict[str, dict[str, str]] = {
    "eng": {
        "zero": "z ih r ow",
        "one": "w ah n",
        "two": "t uw",
        "three": "th r iy",
        "four": "f ao er",
        "five": "f ay v",
        "six": "s ih k s",
        "seven": "s eh v uh n",
        "eight": "ey t",
        "nine": "n ay n",
    },
    "deu": {
        "null": "n uu l",
        "eins": "ay n s",
        "zwei": "ts v ay",
        "drei": "d rh ay",
        "vier": "f ii ax",
        "fünf": "f y n f",
        "sechs": "z eh k s",
        "sieben": "z ii b m",
        "acht": "a x t",
        "neun": "n oy n",
    },
    "spa": {
        "cero": "s e rr o",
        "uno": "u n o",
        "dos": "d o s",
        "tres": "td rr e s",
        "cuatro": "kg w a td rr o",
        "cinco": "s i ng kg o",
        "seis": "s ei s",
        "siete": "s j e td e",
        "ocho": "o ch o",
        "nueve": "n w e bv e",
    },
}
"""Phones of every word, from zero to nine, by language."""

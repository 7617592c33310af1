"""Well-known data sets by name. One is a file here with its PRESET, and an entry of PRESETS.

A preset names the place of the rows, their licence and their shape. It also turns a row into one of the formats in
litpeft/data/formats.
"""

from litpeft.data.presets import (
    alpaca,
    alpaca_2k,
    alpaca_cleaned,
    alpaca_gpt4,
    deita,
    dolly,
    flan,
    gsm8k,
    lima,
    longform,
    openassistant,
    ultrachat,
)
from litpeft.data.presets.preset import Preset

PRESETS: dict[str, Preset] = {
    "alpaca": alpaca.PRESET,
    "alpaca_cleaned": alpaca_cleaned.PRESET,
    "alpaca_2k": alpaca_2k.PRESET,
    "alpaca_gpt4": alpaca_gpt4.PRESET,
    "dolly": dolly.PRESET,
    "lima": lima.PRESET,
    "longform": longform.PRESET,
    "flan": flan.PRESET,
    "deita": deita.PRESET,
    "openassistant": openassistant.PRESET,
    "ultrachat": ultrachat.PRESET,
    "gsm8k": gsm8k.PRESET,
}

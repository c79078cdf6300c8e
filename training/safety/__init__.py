"""Safety LoRAs: concepts erased, everything else held."""

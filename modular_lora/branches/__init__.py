"""The unmerged forward: y = W0·x + b and beside it what the LoRAs add."""

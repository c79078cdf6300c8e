"""Safety LoRAs in closed form: words in, a file out, no gradient. One function a method, each beside its paper."""

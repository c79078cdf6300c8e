"""Task LoRAs: the denoising loss on captioned images."""

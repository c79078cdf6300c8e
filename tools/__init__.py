"""What a clone has beside the pack: installation, the demo, benchmarks, the demo world."""

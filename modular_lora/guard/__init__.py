"""The guard: built of safety and task LoRAs, whole or stopped, and what is said of it."""

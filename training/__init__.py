"""Trainers of task LoRAs and safety LoRAs; two engines (embedded, kohya sd-scripts) behind one set of options."""

"""The core of Modular LoRA Guard: LoRA files, branch maths, guard and reports; torch and safetensors only, no host."""

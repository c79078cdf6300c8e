"""The paper's claim at equal quality, on the demo world's narrow net: protocol, trainings, images, counts."""

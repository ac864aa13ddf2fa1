"""Procedural objects, textures and scene parts that training, evaluation and the demo share."""

"""The course of a training: Trainer, phases, checkpoints, and what is written at the end."""

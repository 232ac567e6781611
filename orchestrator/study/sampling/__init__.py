"""Samplers: the sampling policy, adaptive, random and staged samplers, and warm start."""

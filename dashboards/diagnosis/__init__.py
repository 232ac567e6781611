"""Findings about a sweep with numbers and the next step; pure functions of its frame."""

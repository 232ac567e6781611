"""Diagnosis of a sweep: findings with evidence and next step, as pure functions of its frame."""

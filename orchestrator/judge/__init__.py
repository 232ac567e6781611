"""Judging answers: whom to ask and how, and what the preferences come to."""

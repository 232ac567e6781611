"""Answers to fixed prompts for a judge to compare, and a reward model that is one."""

"""What is wrong or noteworthy about a sweep, in words with numbers and the next step. Pure functions of its frame."""

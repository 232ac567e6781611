"""Configuration of one trial: frozen pydantic types, no torch."""

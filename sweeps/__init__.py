"""The sweeps that ship with the product: one YAML per setup."""

"""The service: a queue of sweeps whose drivers outlive it, and who may use it."""

"""Forward and backward passes over preference pairs: packing, attention, hidden states and output layer."""

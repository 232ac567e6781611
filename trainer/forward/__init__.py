"""One model over preference pairs: packing, attention, hidden states and output layer."""
